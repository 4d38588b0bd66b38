"""The GPU's gather executor on a CPU: plans, buffers, patterns; and what is recorded when."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from blockdrop_fast.engine import compile
from blockdrop_fast.executors import choice, gather_graph
from blockdrop_fast.executors.gather import GatherExecutor
from blockdrop_fast.executors.gather_graph import GraphGatherExecutor, Way, padded_batch
from blockdrop_fast.executors.recording import Recorded
from blockdrop_fast.measure.tolerance import make_reference
from blockdrop_fast.networks.folding import fold_network
from blockdrop_fast.networks.resnet import ResNetConfig
from tests.random_networks import (
    BOTTLENECK,
    CIFAR,
    CUSTOM,
    make_decisions,
    make_images,
    make_model,
    make_network,
    make_policy,
)

KINDS = ["all kept", "all dropped", "one image", "random"]
LAUNCHES = get_args(gather_graph.Launch)


def make_executor(config=BOTTLENECK, dtype=torch.float32, **options):
    network = make_network(config)
    return network, GraphGatherExecutor(fold_network(network, dtype), **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar", *CUSTOM])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_within_tolerance(name, kind, launch):
    config = CUSTOM.get(name, CIFAR)
    network, executor = make_executor(config, launch=launch)
    images = make_images(config, 64)
    decisions = make_decisions(kind, 64, network.num_blocks)
    reference = make_reference(network, images, decisions, torch.float32)
    for _ in range(2):  # by the universal way, then by the pattern's own
        reference.check("gather", executor.run(images, decisions))


@pytest.mark.parametrize("dense_from", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_every_way_gives_the_same(dense_from, launch):
    network, executor = make_executor(dense_from=lambda batch: dense_from, launch=launch)
    images = make_images(BOTTLENECK, 64)
    decisions = make_decisions("random", 64, network.num_blocks)
    reference = make_reference(network, images, decisions, torch.float32)
    for _ in range(2):
        reference.check("gather", executor.run(images, decisions))


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_beyond_the_batch_do_not_matter(launch, kind):
    """Batches of one padded size share buffers; what an earlier one left there is not read."""
    network, executor = make_executor(CIFAR, launch=launch)
    assert padded_batch(17) == padded_batch(18) == 18
    images, decisions = make_images(CIFAR, 18), make_decisions(kind, 18, 5)
    eager = GatherExecutor(fold_network(network, torch.float32))
    poisoned = torch.full_like(images, torch.nan)
    kept = torch.ones_like(decisions)
    for batch in (18, 17):
        executor.run(poisoned, kept)
        logits = executor.run(images[:batch], decisions[:batch])
        assert logits.shape == (batch, 10)
        torch.testing.assert_close(logits, eager.run(images[:batch], decisions[:batch]))


@pytest.mark.parametrize("pool", [1, 2])
def test_policy_decides(pool):
    _, executor = make_executor(CIFAR)
    images = make_images(CIFAR, 34) if pool == 1 else torch.randn(34, 3, 16, 16)
    policy = make_policy(5, images, pool=pool).network
    executor.set_policy(fold_network(policy, torch.float32), pool)
    with torch.no_grad():
        wanted = policy(torch.nn.functional.avg_pool2d(images, pool)) >= 0
    for batch in (34, 33, 1):  # 33 runs in the rows of 34
        logits, decisions = executor.run_policy(images[:batch])
        assert torch.equal(decisions, wanted[:batch])
        torch.testing.assert_close(logits, executor.run(images[:batch], decisions))
    assert wanted.any()
    assert not wanted.all()


def test_graphs_of_the_caller_change_the_number_of_images(monkeypatch):
    """A replay of one, captured for fewer images in the same rows, comes between two calls."""
    _, executor = make_executor(CIFAR, launch="universal")
    images = make_images(CIFAR, 18)
    policy = make_policy(5, images).network
    assert executor.set_policy(fold_network(policy, torch.float32), 1)
    _, wanted = executor.run_policy(images)
    with monkeypatch.context() as capturing:
        capturing.setattr(gather_graph, "is_capturing", lambda device: True)
        executor.run_policy(images[:17])
    (batch,) = executor._batches.values()
    for _ in range(2):
        _, decisions = executor.run_policy(images)
        assert torch.equal(decisions, wanted)
        batch._is_image[17:] = False  # as the replay does
    assert wanted[17].any()


def test_outputs_outlive_the_next_call():
    _, executor = make_executor(CIFAR)
    executor.set_policy(
        fold_network(make_policy(5, make_images(CIFAR, 8)).network, torch.float32), 1
    )
    images = make_images(CIFAR, 8)
    first = executor.run_policy(images)
    before = [tensor.clone() for tensor in first]
    executor.run_policy(-images)
    assert all(torch.equal(*pair) for pair in zip(first, before, strict=True))


def test_sets_share_prefixes():
    _, executor = make_executor(CIFAR)
    images = make_images(CIFAR, 6)
    sets = torch.stack([make_decisions("random", 6, 5, seed) for seed in range(3)])
    for logits, decisions in zip(executor.run_sets(images, sets), sets, strict=True):
        torch.testing.assert_close(logits, executor.run(images, decisions))


def test_refuses_other_launches():
    with pytest.raises(ValueError, match=r"launch: expected one of .*got 'graph'"):
        make_executor(launch="graph")


def test_no_policy():
    with pytest.raises(RuntimeError, match="has no policy network"):
        make_executor()[1].run_policy(make_images(BOTTLENECK, 2))


def test_refuses_float64():
    with pytest.raises(TypeError, match=r"float16.*got torch\.float64"):
        make_executor(dtype=torch.float64)


def test_padded_batch():
    for batch in range(1, 2000):
        padded = padded_batch(batch)
        assert batch <= padded <= batch * 9 / 8
        assert padded_batch(padded) == padded <= padded_batch(batch + 1)


def test_ways_by_counts():
    """A block's way follows from its count; a pattern has its own recording when it comes back."""
    _, executor = make_executor(
        ResNetConfig("basic", (4,), (8,), "cifar", "subsample", 2), dense_from=lambda batch: 0.75
    )
    decisions = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]).bool()
    images = make_images(CIFAR, 4)
    executor.run(images, decisions)
    (batch,) = executor._batches.values()
    assert not batch._patterns
    executor.run(images, decisions)
    assert list(batch._patterns) == [(Way.NONE, Way.SOME, Way.MASKED, Way.ALL)]


def test_oldest_pattern_goes(monkeypatch):
    monkeypatch.setattr(gather_graph, "MAX_PATTERNS", 2)
    monkeypatch.setattr(gather_graph, "MAX_SEEN", 2)
    network, executor = make_executor(CIFAR)
    images = make_images(CIFAR, 1)
    rows = torch.eye(5, dtype=torch.bool)
    eager = GatherExecutor(fold_network(network, torch.float32))
    for index in (0, 0, 1, 1, 0, 2, 2, 3, 4):
        logits = executor.run(images, rows[index : index + 1])
        torch.testing.assert_close(logits, eager.run(images, rows[index : index + 1]))
    (batch,) = executor._batches.values()
    kept = [[way is Way.ALL for way in pattern].index(True) for pattern in batch._patterns]
    assert kept == [0, 2]
    assert len(batch._seen) <= 2


@pytest.mark.parametrize("launch", LAUNCHES)
def test_in_an_engine(monkeypatch, launch):
    monkeypatch.setattr(
        choice,
        "_make_gather",
        lambda network, table, launch: (GraphGatherExecutor(network, launch=launch), ""),
    )
    model, images = make_model()
    engine = compile(model, strategy="gather", launch=launch)
    assert engine.strategy == "gather"
    assert engine._choice.executor.launch == launch
    output = engine(images)
    assert torch.equal(output.decisions, engine.decide(images))
    make_reference(model.backbone, images, output.decisions, torch.float32).check(
        "gather", output.logits
    )
    torch.testing.assert_close(engine.run(images, output.decisions), output.logits)
    empty = engine(images[:0])
    assert empty.logits.shape == (0, 10)
    assert empty.decisions.shape == (0, 5)
    # 8 x 12 suits the backbone, but not a policy network after pooling by 3.
    model.policy = make_policy(5, torch.randn(4, 3, 12, 12), pool=3)
    with pytest.raises(ValueError, match=r"images: .* for the policy network"):
        compile(model, strategy="gather")(images)


def test_engine_refuses_other_launches():
    with pytest.raises(ValueError, match=r"launch: expected one of .*got True"):
        compile(make_model()[0], launch=True)


class FakeGraphs:
    """Stands in for torch.cuda's graphs: what runs while capturing only leaves a recording."""

    def __init__(self, monkeypatch):
        self.capturing = self.outer = False
        self.replays = 0
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.outer)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=self._replay))
        monkeypatch.setattr(torch.cuda, "graph", self._graph)

    def _replay(self):
        self.replays += 1

    @contextmanager
    def _graph(self, graph, pool, capture_error_mode):
        assert pool == (0, 1)
        assert torch.backends.cudnn.benchmark
        self.capturing = True
        yield
        self.capturing = False


def test_runs_then_captures_then_replays(monkeypatch):
    graphs, calls = FakeGraphs(monkeypatch), []

    def function():
        calls.append(graphs.capturing)
        return len(calls)

    before = torch.backends.cudnn.benchmark
    recorded = Recorded(function, pool=(0, 1))
    assert [recorded() for _ in range(4)] == [1, 2, 2, 2]
    assert calls == [False, True]
    assert graphs.replays == 3  # capturing does not execute
    assert torch.backends.cudnn.benchmark == before


def test_captures_in_a_thread_that_has_run(monkeypatch):
    """Another thread's choices of algorithms are not known, and a capture cannot make them."""
    graphs, calls = FakeGraphs(monkeypatch), []
    recorded = Recorded(lambda: calls.append(graphs.capturing), pool=(0, 1))
    recorded()
    for _ in range(2):
        thread = threading.Thread(target=recorded)
        thread.start()
        thread.join()
    assert calls == [False] * 3
    recorded()
    assert calls == [False] * 3 + [True]
    assert graphs.replays == 1


def test_runs_in_the_graph_of_somebody_else(monkeypatch):
    graphs, calls = FakeGraphs(monkeypatch), []
    recorded = Recorded(lambda: calls.append(0), pool=(0, 1))
    recorded()
    recorded()
    graphs.outer = True
    recorded()
    assert len(calls) == 3
    assert graphs.replays == 1
