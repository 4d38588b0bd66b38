"""The CUDA kernels on a GPU: `make gpu-check`. Everywhere else these tests are skipped.

Names with "small" are the cases that compute-sanitizer can run in a few minutes.
"""

from __future__ import annotations

import pytest
import torch
from test_walk import make_network, make_policy, random_decisions

import blockdrop_fast as bdf
from blockdrop_fast._extension import extension_status
from blockdrop_fast.executors.walk_half import WalkHalfExecutor
from blockdrop_fast.folding import fold_network
from blockdrop_fast.ops import plan, plan_reference, walk_half, walk_half_reference
from blockdrop_fast.timing import make_reference


def _why_skip() -> str:
    if not torch.cuda.is_available():
        return "there is no GPU here"
    if extension_status().build_info.get("cuda") is None:
        return "the extension has no CUDA kernels"
    return ""


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(_why_skip()), reason=_why_skip() or "-"),
]
DTYPES = [torch.bfloat16, torch.float16]


def make_images(count: int, dtype=torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 32, 32, generator=generator).to("cuda", dtype)


def make_decisions(*shape: int) -> torch.Tensor:
    return random_decisions(torch.Generator().manual_seed(0), *shape).cuda()


def make_executor(layers, shortcut="average_pool", dtype=torch.bfloat16, num_classes=10):
    network = make_network(layers, shortcut, num_classes).cuda()
    return network, WalkHalfExecutor(fold_network(network, dtype))


def make_engine(dtype=torch.bfloat16, layers=(2, 1, 2)):
    network, policy = make_network(layers), make_policy(sum(layers))
    images = make_images(64, torch.float32).cpu()
    with torch.no_grad():  # policy logits around zero, so that it keeps and drops
        policy.network.fc.bias -= policy.logits(images).median(0).values
    engine = bdf.compile(bdf.BlockDrop(network, policy).eval().cuda(), dtype=dtype, strategy="walk")
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_small_walk_like_reference(dtype, batch):
    _, executor = make_executor((1, 1, 1), dtype=dtype)
    images, decisions = make_images(batch, dtype), make_decisions(2, batch, 3)
    logits = executor.run(images, decisions)
    expected = walk_half_reference(images.cpu(), decisions.cpu(), *_on_cpu(executor._network))
    limit = 8 * torch.finfo(dtype).eps * expected.abs().max()
    assert (logits.cpu() - expected).abs().max() <= limit


def _on_cpu(network):
    return (network[0].cpu(), *network[1:])


@pytest.mark.parametrize("batch", [1, 2, 263, 1024])
def test_same_logits_in_any_batch(batch):
    """Bit for bit, whichever thread block walks an image, in whichever order."""
    _, executor = make_executor((2, 1, 1))
    images, decisions = make_images(1024), make_decisions(1024, 4)
    expected = executor.run(images, decisions)
    assert torch.equal(executor.run(images[-batch:], decisions[-batch:]), expected[-batch:])


def test_small_policy_decides():
    engine = make_engine()
    images = make_images(5)
    output = engine(images)
    assert torch.equal(output.decisions, engine.probabilities(images) >= 0.5)
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


@pytest.mark.parametrize("batch", [1, 700])
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


@pytest.mark.parametrize(("batch", "blocks"), [(1, 1), (33, 54), (1500, 54), (70, 11000)])
def test_small_plan_like_reference(batch, blocks):
    decisions = make_decisions(batch, blocks)
    for result, expected in zip(plan(decisions), plan_reference(decisions.cpu()), strict=True):
        assert torch.equal(result.cpu(), expected)
