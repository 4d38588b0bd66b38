"""The GPU's gather executor on a CPU: plans, buffers, graphs' patterns, failures."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from blockdrop_fast.engine import compile
from blockdrop_fast.executors import choice, gather_graph, graph_choice
from blockdrop_fast.executors.gather import GatherExecutor
from blockdrop_fast.executors.gather_graph import GraphGatherExecutor, padded_batch
from blockdrop_fast.executors.graph_choice import UNIVERSAL, Way
from blockdrop_fast.measure.tolerance import make_reference
from blockdrop_fast.networks.folding import fold_network
from blockdrop_fast.networks.resnet import ResNetConfig
from tests.random_networks import (
    BOTTLENECK,
    CIFAR,
    CUSTOM,
    GROUPED,
    make_decisions,
    make_images,
    make_model,
    make_network,
    make_policy,
)

KINDS = ["all kept", "all dropped", "one image", "random"]
LAUNCHES = get_args(gather_graph.Launch)


@pytest.fixture(autouse=True)
def _graphs_at_once(monkeypatch):
    """Of each pattern, from its second batch on."""
    monkeypatch.setattr(graph_choice, "RECORDING_US", 0)


def make_executor(config=BOTTLENECK, dtype=torch.float32, **options):
    network = make_network(config)
    return network, GraphGatherExecutor(fold_network(network, dtype), **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["cifar", *(name for name, config in CUSTOM.items() if config.groups == 1)]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_within_tolerance(name, kind, launch):
    config = CUSTOM.get(name, CIFAR)
    network, executor = make_executor(config, launch=launch)
    images = make_images(config, 64)
    decisions = make_decisions(kind, 64, network.num_blocks)
    reference = make_reference(network, images, decisions, torch.float32)
    for _ in range(2):  # by the universal graph, then by their own
        reference.check("gather", executor.run(images, decisions))


@pytest.mark.parametrize("dense_from", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_every_way_gives_the_same(dense_from, launch):
    network, executor = make_executor(dense_from=lambda batch: dense_from, launch=launch)
    images = make_images(BOTTLENECK, 64)
    decisions = make_decisions("random", 64, network.num_blocks)
    reference = make_reference(network, images, decisions, torch.float32)
    for _ in range(2):  # by the universal graph, then by their own
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


def test_graphs_of_the_caller_have_buffers_of_their_own(monkeypatch):
    """A replay of one may come between two calls, at any time and on any stream."""
    _, executor = make_executor(CIFAR)
    images = make_images(CIFAR, 18)
    policy = make_policy(5, images).network
    assert executor.set_policy(fold_network(policy, torch.float32), 1)
    expected = executor.run_policy(images)
    with monkeypatch.context() as capturing:
        capturing.setattr(gather_graph, "is_capturing", lambda device: True)
        capturing.setattr(executor._side, "fork", None)  # not the stream of other calls, either
        captured = executor.run_policy(images[:17])
    for one, other in zip(captured, expected, strict=True):
        torch.testing.assert_close(one, other[:17])
    (batch,) = executor._batches.values()
    assert batch.buffers.is_image.all()


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


def test_padded_batch():
    for batch in range(1, 2000):
        padded = padded_batch(batch)
        assert batch <= padded <= batch * 9 / 8
        assert padded_batch(padded) == padded <= padded_batch(batch + 1)


def test_every_graph_that_serves_a_batch_gives_the_same(monkeypatch):
    config = ResNetConfig("basic", (4,), (8,), "cifar", "subsample", 2)
    _, executor = make_executor(config, dense_from=lambda batch: 0.75)
    decisions = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]).bool()
    images = make_images(CIFAR, 4)
    expected = executor.run(images, decisions)
    (batch,) = executor._batches.values()
    seen = []
    own = [Way.NONE, Way.SOME, Way.MASKED, Way.ALL]
    for ways in ([0, 0, 0, 0], own, [0, 0, 2, 2], [1, 0, 0, 6]):
        pattern = int.from_bytes(bytes(ways), "little")
        monkeypatch.setattr(batch._choice, "choose", lambda w, p=pattern: seen.append(w) or p)
        torch.testing.assert_close(executor.run(images, decisions), expected)
        assert pattern in batch._blocks
    assert {*seen} == {int.from_bytes(bytes(own), "little")}


def test_graphs_that_are_no_longer_chosen_from_go(monkeypatch):
    _, executor = make_executor(CIFAR)
    images, decisions = make_images(CIFAR, 2), make_decisions("all kept", 2, 5)
    executor.run(images, decisions)
    (batch,) = executor._batches.values()
    for graphs in [(1, UNIVERSAL), (2, UNIVERSAL), (3, 2, UNIVERSAL)]:
        batch._choice.graphs = graphs
        batch.blocks(graphs[0])
        assert set(batch._blocks) <= {*graphs}
    assert len(batch._blocks) == 3


def test_memory_goes_with_the_last_reference():
    """Not when garbage is collected: freeing a graph would break another's capture."""
    _, executor = make_executor(CIFAR)
    images, decisions = make_images(CIFAR, 2), make_decisions("random", 2, 5)
    executor.run(images, decisions)
    (batch,) = executor._batches.values()
    alive = [weakref.ref(one) for one in (executor, batch, batch.stem)]
    gc.disable()
    try:
        del executor, batch
        assert [one() for one in alive] == [None] * 3
    finally:
        gc.enable()


def test_goes_on_by_plain_pytorch(monkeypatch):
    make_gather_by_graphs(monkeypatch)
    model, images = make_model()
    engine = compile(model, strategy="gather")
    expected = engine(images)
    decisions = expected.decisions

    def fail(*_, **__):
        raise RuntimeError("no tensor cores\nat all")

    monkeypatch.setattr(gather_graph, "gathered_conv_", fail)
    with pytest.raises(RuntimeError, match=r"convolution|channels"):  # an input that nobody can run
        engine._choice.executor.run(images.repeat(1, 2, 1, 1), decisions)
    assert engine.strategy_reason == "asked for"
    with pytest.warns(
        RuntimeWarning, match="plain PyTorch since .*: RuntimeError: no tensor cores$"
    ):
        output = engine(images)
    monkeypatch.undo()
    for one in (output, engine(images)):
        assert torch.equal(one.decisions, decisions)
        torch.testing.assert_close(one.logits, expected.logits)
    torch.testing.assert_close(engine.run(images, decisions), expected.logits)
    assert not engine._choice.executor._batches
    assert engine.strategy_reason.endswith("RuntimeError: no tensor cores")
    engine.refresh()
    assert "failed" not in engine.strategy_reason


def test_float32_on_a_gpu_is_plain_pytorch(monkeypatch):
    """And goes by its table, which was measured so."""
    weight = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda", 0))
    network = SimpleNamespace(stem=SimpleNamespace(weight=weight))
    table = SimpleNamespace(dense_from=0.5, source="today")
    monkeypatch.setattr(choice, "GatherExecutor", lambda network, **rule: rule)
    rule, remark = choice._make_gather(network, table, "counts")
    assert rule == {"dense_from": 0.5}
    assert "do not compute in torch.float32" in remark
    assert "today" in remark
    with pytest.raises(TypeError, match=r"float16.*got torch\.float32"):
        GraphGatherExecutor(network)


def test_groups_on_a_gpu_are_plain_pytorch(monkeypatch):
    """Its convolutions, cuDNN's, serve them; a table would be of our kernels."""
    weight = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda", 0))
    network = SimpleNamespace(stem=SimpleNamespace(weight=weight), config=GROUPED)
    table = SimpleNamespace(dense_from=0.5, source="today")
    monkeypatch.setattr(choice, "GatherExecutor", lambda network, **rule: rule)
    rule, remark = choice._make_gather(network, table, "counts")
    assert rule == {}
    assert remark == "; by plain PyTorch, as our kernels serve no convolutions of several groups"
    with pytest.raises(ValueError, match=r"convolutions of one group, .* got 4 groups"):
        make_executor(GROUPED)


def make_gather_by_graphs(monkeypatch):
    """Engines' gather is the GPU's, on the CPU."""

    def make(network, table, launch):
        return GraphGatherExecutor(network, launch=launch), ""

    monkeypatch.setattr(choice, "_make_gather", make)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_in_an_engine(monkeypatch, launch):
    make_gather_by_graphs(monkeypatch)
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
