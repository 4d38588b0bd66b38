"""Gather with CUDA graphs on a GPU: `make gpu-check`. Everywhere else these tests are skipped.

The operator's own tests are in test_gathered_conv.py. Each test calls the engine several times:
first runs, captures and replays are different code.
"""

from __future__ import annotations

from functools import partial
from typing import get_args

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast import triton_kernels
from blockdrop_fast.executors import graph_choice
from blockdrop_fast.executors.gather import GatherExecutor
from blockdrop_fast.executors.gather_graph import GraphGatherExecutor, Launch
from blockdrop_fast.measure.tolerance import make_policy_reference, make_reference
from blockdrop_fast.networks.resnet import ResNetConfig
from tests.gpu.conditions import on_gpu
from tests.random_networks import make_decisions, make_network, make_policy, random_images

pytestmark = on_gpu
DTYPES = [torch.bfloat16, torch.float16]
BOTTLENECK = ResNetConfig("bottleneck", (2, 3, 2), (16, 32, 64), "imagenet", "projection", 10)
BASIC = ResNetConfig("basic", (2, 2, 3), (16, 32, 64), "cifar", "average_pool", 10)
LAUNCHES = get_args(Launch)
CALLS = 5  # the universal graph's run and capture, the pattern's own, replays
make_images = partial(random_images, size=64, device="cuda")


@pytest.fixture(autouse=True)
def _graphs_at_once(monkeypatch):
    """Of each pattern, from its second batch on."""
    monkeypatch.setattr(graph_choice, "RECORDING_US", 0)


def make_model(config=BOTTLENECK, pool: int = 2):
    """A model that keeps half of the blocks of ``make_images(64)``."""
    images = make_images(64, torch.float32).cpu()
    policy = make_policy(sum(config.layers), images, pool=pool)
    return bdf.BlockDrop(make_network(config), policy).eval().cuda()


def make_engine(config=BOTTLENECK, dtype=torch.bfloat16, **options):
    engine = bdf.compile(make_model(config), dtype=dtype, strategy="gather", **options)
    assert isinstance(engine._choice.executor, GraphGatherExecutor), engine.strategy_reason
    assert engine._choice.executor.launch == options.get("launch", "counts"), engine.strategy_reason
    return engine


def test_triton_kernels_run():
    assert triton_kernels.why_not() == ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [BOTTLENECK, BASIC], ids=["bottleneck", "basic"])
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("kind", ["random", "all kept", "all dropped", "one image"])
def test_within_tolerance(dtype, config, launch, kind):
    engine = make_engine(config, dtype, launch=launch)
    images = make_images(64, dtype)
    decisions = make_decisions(kind, 64, engine.config.num_blocks).cuda()
    reference = make_reference(engine.backbone, images, decisions, dtype)
    for _ in range(CALLS):
        reference.check("gather", engine.run(images, decisions))


@pytest.mark.parametrize("launch", LAUNCHES)
def test_decisions_change_from_call_to_call(launch):
    """Graphs that were recorded for other decisions of the same pattern are right for these."""
    engine = make_engine(launch=launch)
    images = make_images(64)
    for seed in range(2 * CALLS):
        decisions = make_decisions("random", 64, engine.config.num_blocks, seed).cuda()
        decisions[0], decisions[1] = True, False  # every block is kept by some
        make_reference(engine.backbone, images, decisions, torch.bfloat16).check(
            "gather", engine.run(images, decisions)
        )


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("batch", [1, 7, 33, 64])
def test_policy_decides(batch, launch):
    """As the policy network's logits are signed, but for those within rounding of zero."""
    engine, images = make_engine(launch=launch), make_images(64)
    reference = make_policy_reference(engine.model.policy, images, torch.bfloat16)
    for _ in range(CALLS):
        outputs = [engine(part) for part in images.split(batch)]
        logits, decisions = map(torch.cat, zip(*outputs, strict=True))
        reference.check_decisions("gather", decisions)
        assert 0.25 < decisions.float().mean() < 0.75
        make_reference(engine.backbone, images, decisions, torch.bfloat16).check("gather", logits)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_batches_of_changing_size(launch):
    engine = make_engine(BASIC, launch=launch)
    images = make_images(64)
    decisions = make_decisions("random", 64, engine.config.num_blocks).cuda()
    reference = make_reference(engine.backbone, images, decisions, torch.bfloat16)
    for sizes in ([33, 31], [34, 30], [17, 18, 29], [64], [33, 31]):
        logits = torch.cat(
            [
                engine.run(*part)
                for part in zip(images.split(sizes), decisions.split(sizes), strict=True)
            ]
        )
        reference.check("gather", logits)


def test_never_waits_without_counts():
    engine = make_engine(launch="universal")
    images = make_images(64)
    for _ in range(3):
        engine(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decisions = engine(images).decisions
        engine.run(images, decisions)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("warm", [True, False])
def test_captured_in_a_graph_of_the_caller(warm, launch):
    engine = make_engine(launch=launch)
    images = make_images(64)
    for _ in range(CALLS if warm else 1):
        engine(images)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = engine(images)
    for _ in range(2):
        images.copy_(torch.randn(images.shape))
        graph.replay()
        make_reference(engine.backbone, images, captured.decisions, torch.bfloat16).check(
            "gather", captured.logits
        )
        assert torch.equal(captured.decisions, engine(images).decisions)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_runs_on_the_current_stream(launch):
    engine = make_engine(launch=launch)
    images = make_images(64)
    for _ in range(CALLS):
        expected = engine(images).logits.clone()
    late = torch.zeros_like(images)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would see zeros
        late.copy_(images)
        logits = engine(late).logits
    # Buffers are shared with the call above, which is still under way.
    again = engine(images).logits
    side.synchronize()
    assert torch.equal(logits, expected)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_refresh_takes_over_weights(launch):
    engine = make_engine(launch=launch)
    images = make_images(8)
    for _ in range(CALLS):
        before = engine(images).logits
    with torch.no_grad():
        engine.model.backbone.fc.bias += 1
    engine.refresh()
    for _ in range(CALLS):
        after = engine(images).logits
        torch.testing.assert_close(after, before + 1, rtol=0.05, atol=0.05)


def test_float32_is_plain_pytorch():
    engine = bdf.compile(make_model(), strategy="gather")
    assert isinstance(engine._choice.executor, GatherExecutor)
    assert "do not compute in torch.float32" in engine.strategy_reason


def test_size_first_met_in_a_graph_of_the_caller():
    engine, images = make_engine(), make_images(8)
    with (
        pytest.raises(RuntimeError, match="images: this thread meets a batch of their size"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        engine(images)
    for _ in range(CALLS):
        output = engine(images)
    reference = make_reference(engine.backbone, images, output.decisions, torch.bfloat16)
    reference.check("gather", output.logits)
    assert "failed" not in engine.strategy_reason


@pytest.mark.parametrize("strategy", ["gather", "dense"])
def test_graphs_of_the_caller_outlive_a_refresh(strategy):
    """They have the old weights, in memory that nothing else gets."""
    engine = bdf.compile(make_model(), dtype=torch.bfloat16, strategy=strategy)
    images = make_images(8)
    engine(images)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = engine(images)
    graph.replay()
    expected = captured.logits.clone()
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.zero_()
    engine.refresh()
    poison = [torch.full((1 << size,), torch.nan, device="cuda") for size in range(8, 24)]
    assert not torch.equal(engine(images).logits, expected)
    graph.replay()
    assert torch.equal(captured.logits, expected)
    del poison


def test_goes_on_by_plain_pytorch_after_a_failed_capture(monkeypatch):
    engine, images = make_engine(launch="universal"), make_images(64)
    executor = engine._choice.executor
    classifier = executor.layers.classifier

    def wait(x):
        x.sum().item()
        return classifier(x)

    monkeypatch.setattr(executor.layers, "classifier", wait)
    stream = torch.cuda.current_stream()
    engine(images)  # which still may wait
    with pytest.warns(RuntimeWarning, match="plain PyTorch since our kernels or graphs failed"):
        output = engine(images)
    assert torch.cuda.current_stream() == stream
    assert "plain PyTorch since" in engine.strategy_reason
    reference = make_reference(engine.backbone, images, output.decisions, torch.bfloat16)
    reference.check("gather", output.logits)
    other = make_engine()  # graphs can be captured as before
    for _ in range(CALLS):
        output = other(images)
    reference = make_reference(other.backbone, images, output.decisions, torch.bfloat16)
    reference.check("gather", output.logits)
    assert "failed" not in other.strategy_reason


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU here")
def test_on_the_second_gpu():
    """The current device is the first one."""
    model = make_model().to("cuda:1")
    engine = bdf.compile(model, dtype=torch.bfloat16, strategy="gather")
    for seed in range(CALLS):
        images = make_images(64, seed=seed).to("cuda:1")
        output = engine(images)
        reference = make_reference(engine.backbone, images, output.decisions, torch.bfloat16)
        reference.check("gather", output.logits)
    assert torch.cuda.current_device() == 0
