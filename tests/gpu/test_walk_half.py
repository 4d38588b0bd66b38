"""The CUDA walk on a GPU: `make gpu-check`. Everywhere else these tests are skipped.

Names with "small_walk" are what a GPU runs first. The marker "sanitizer" is for few and tiny cases
that end under compute-sanitizer.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.executors import crossover, measured, proven
from blockdrop_fast.executors.walk_half import WalkHalfExecutor
from blockdrop_fast.measure.tolerance import make_reference
from blockdrop_fast.networks.folding import fold_network
from blockdrop_fast.ops import walk_half, walk_half_reference
from tests.gpu.conditions import on_gpu
from tests.random_networks import make_cifar_network as make_network
from tests.random_networks import make_policy, random_decisions, random_images

pytestmark = on_gpu
DTYPES = [torch.bfloat16, torch.float16]
THREAD_SECONDS = 20
make_images = partial(random_images, device="cuda")


def make_decisions(*shape: int) -> torch.Tensor:
    return random_decisions(torch.Generator().manual_seed(0), *shape).cuda()


def make_executor(layers, shortcut="average_pool", dtype=torch.bfloat16, num_classes=10):
    network = make_network(layers, shortcut, num_classes).cuda()
    return network, WalkHalfExecutor(fold_network(network, dtype))


def make_engine(dtype=torch.bfloat16, layers=(2, 1, 2)):
    policy = make_policy(sum(layers), make_images(64, torch.float32).cpu())
    model = bdf.BlockDrop(make_network(layers), policy).eval().cuda()
    engine = bdf.compile(model, dtype=dtype, strategy="walk")
    assert engine.strategy == "walk"
    return engine


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shortcut", ["average_pool", "subsample"])
@pytest.mark.parametrize("keep", ["random", "all", "none"])
def test_walk_within_tolerance(dtype, shortcut, keep):
    network, executor = make_executor((3, 2, 3), shortcut, dtype, num_classes=19)
    images, decisions = make_images(64, dtype), make_decisions(64, 8)
    if keep != "random":
        decisions.fill_(keep == "all")
    logits = executor.run(images, decisions)
    make_reference(network, images, decisions, dtype).check("walk", logits)


# On sm_90: a cluster an image, and a thread block an image.
@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_small_walk_like_reference(dtype, batch):
    _, executor = make_executor((1, 1, 1), dtype=dtype)
    images, decisions = make_images(batch, dtype), make_decisions(2, batch, 3)
    logits = executor.run(images, decisions)
    expected = walk_half_reference(images.cpu(), decisions.cpu(), *_on_cpu(executor._network))
    limit = 8 * torch.finfo(dtype).eps * expected.abs().max()
    assert (logits.cpu() - expected).abs().max() <= limit


def _on_cpu(network):
    return (network[0].cpu(), *network[1:])


@pytest.mark.parametrize("batch", [1, 2, 15, 16, 17, 263, 1024])
def test_same_logits_in_any_batch(batch):
    """Bit for bit, whichever thread block or cluster walks an image, in whichever order.

    An H100 or H200 runs 16 clusters of eight at once, at most.
    """
    _, executor = make_executor((2, 1, 1))
    images, decisions = make_images(1024), make_decisions(1024, 4)
    expected = executor.run(images, decisions)
    assert torch.equal(executor.run(images[-batch:], decisions[-batch:]), expected[-batch:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shortcut", ["average_pool", "subsample"])
def test_clusters_on_every_path(dtype, shortcut):
    """A cluster an image (few paths) and a thread block an image (many) give the same bits."""
    _, executor = make_executor((1, 2, 1), shortcut, dtype)
    images = make_images(2, dtype)
    paths = torch.tensor(list(itertools.product([False, True], repeat=4)), device="cuda")
    decisions = paths[:, None].expand(16, 2, 4).contiguous()
    expected = executor.run_sets(images, decisions)
    for one, logits in zip(decisions, expected, strict=True):
        assert torch.equal(executor.run(images, one), logits)


@pytest.mark.parametrize("batch", [1, 5])
def test_clusters_decide_alike(batch):
    engine = make_engine()
    images = make_images(40)
    expected, output = engine(images), engine(images[:batch])
    assert torch.equal(output.decisions, expected.decisions[:batch])
    assert torch.equal(output.logits, expected.logits[:batch])


@pytest.mark.parametrize(("batch", "kernel"), [(1, "cluster_kernel"), (64, "walk_kernel")])
def test_which_kernel_runs(batch, kernel):
    # Clusters are built for sm_90a; all others run a thread block an image.
    has_clusters = torch.cuda.get_device_capability() == (9, 0)
    if not has_clusters or os.environ.get("BLOCKDROP_CLUSTERS") == "0":
        kernel = "walk_kernel"
    _, executor = make_executor((1, 1, 1))
    images, decisions = make_images(batch), make_decisions(batch, 3)
    executor.run(images, decisions)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        executor.run(images, decisions)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages() if "walk_half" in event.key]
    if not profile.key_averages():
        pytest.skip("the profiler sees no kernels here")
    assert len(names) == 1
    assert kernel in names[0]


@pytest.mark.parametrize("clusters", ["0", "1", "off"])
def test_clusters_turned_off(clusters, tmp_path):
    """The same bits either way. A process asks its environment once, so each gets its own."""
    code = (
        "import sys, torch; from tests.gpu.test_walk_half import *\n"
        "_, executor = make_executor((2, 1, 1))\n"
        "torch.save(executor.run(make_images(5), make_decisions(5, 4)).cpu(), sys.argv[1])"
    )
    path = tmp_path / "logits.pt"
    done = subprocess.run(
        [sys.executable, "-c", code, path], env=os.environ | {"BLOCKDROP_CLUSTERS": clusters},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if clusters == "off":
        assert "BLOCKDROP_CLUSTERS: expected 0 or 1, got 'off'" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    _, executor = make_executor((2, 1, 1))
    assert torch.equal(torch.load(path), executor.run(make_images(5), make_decisions(5, 4)).cpu())


@pytest.mark.sanitizer
def test_small_walk_with_a_policy():
    engine = make_engine(layers=(1, 1, 1))
    images = make_images(5)
    output = engine(images)
    assert torch.equal(output.decisions, engine.decide(images))
    assert torch.equal(output.logits, engine.run(images, output.decisions))
    assert output.decisions.any()
    assert not output.decisions.all()


def test_no_synchronisation():
    engine = make_engine()
    images = make_images(1024)
    decisions = engine(images).decisions
    engine.run(images, decisions)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine(images)
        engine.run(images, decisions)
        engine.run(images[:1], decisions[:1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("batch", [1, 17, 700])
def test_captured_in_a_graph(batch):
    """The captured call reads what is in its input at each replay, and needs no reset."""
    engine = make_engine()
    images = make_images(batch)
    engine(images)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = engine(images)
    for _ in range(2):
        images.copy_(torch.randn(images.shape))
        graph.replay()
        expected = engine(images)
        assert torch.equal(captured.decisions, expected.decisions)
        assert torch.equal(captured.logits, expected.logits)


def test_given_decisions_captured_in_a_graph():
    """More images than thread blocks at once, so the longest paths go first: a plan is in it."""
    engine = make_engine()
    images, decisions = make_images(700), make_decisions(700, 5)
    engine.run(images, decisions)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = engine.run(images, decisions)
    for _ in range(2):
        images.copy_(torch.randn(images.shape))
        decisions.copy_(torch.rand(decisions.shape) < 0.5)
        graph.replay()
        assert torch.equal(captured, engine.run(images, decisions))


def test_two_threads_alternate_networks_of_different_size():
    """How much shared memory a kernel may have is state of the process; networks differ in it."""
    images = make_images(300)

    def work(seed: int) -> int:
        # Begun in different order, so that the threads are at different networks.
        engines = [make_engine(layers=layers) for layers in ((5, 5, 5), (18, 18, 18))]
        calls = 0
        torch.cuda.synchronize()  # weights were packed on another stream
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            expected = [[engine(images[:n]) for n in (1, 300)] for engine in engines]
            until = time.monotonic() + THREAD_SECONDS
            while time.monotonic() < until:
                which, size = (calls + seed) % 2, calls // 2 % 2
                output = engines[which](images[: (1, 300)[size]])
                assert torch.equal(output.decisions, expected[which][size].decisions)
                assert torch.equal(output.logits, expected[which][size].logits)
                calls += 1
        return calls

    with ThreadPoolExecutor(2) as pool:
        assert min(pool.map(work, range(2))) > 10


def test_auto_takes_the_walk_where_it_has_passed_and_won(tmp_path, monkeypatch):
    monkeypatch.setenv(measured.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(measured, "PACKAGED", tmp_path / "none")
    model, images = make_engine().model, make_images(64)
    assert bdf.compile(model, dtype=torch.bfloat16).strategy == "gather"
    seconds = {"dense": 3.0, "gather": 2.0, "walk": 1.0}
    cells = [crossover.Cell(64, 0.5, seconds)]
    crossover.save(model.backbone.config, torch.bfloat16, images.device, cells)
    engine = bdf.compile(model, dtype=torch.bfloat16)
    assert "have not passed" in engine.strategy_reason
    proven.save(["walk"], images.device)
    engine = bdf.compile(model, dtype=torch.bfloat16)
    assert engine.strategy == "walk", engine.strategy_reason
    assert torch.equal(engine(images).logits, make_engine()(images).logits)


def test_runs_on_the_current_stream():
    engine = make_engine()
    images = make_images(64)
    expected = engine(images).logits
    late = torch.zeros_like(images)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would see zeros
        late.copy_(images)
        logits = engine(late).logits
    side.synchronize()
    assert torch.equal(logits, expected)


def test_compiled_without_graph_breaks():
    _, executor = make_executor((1, 1, 1))
    images, decisions = make_images(4), make_decisions(4, 3)

    def run(images, decisions):
        return walk_half(images, decisions, *executor._network) * 2

    compiled = torch.compile(run, fullgraph=True)
    torch.testing.assert_close(compiled(images, decisions), run(images, decisions))
