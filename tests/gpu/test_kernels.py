"""The CUDA kernels on a GPU: `make gpu-check`. Everywhere else these tests are skipped.

Names with "small" are the cases that compute-sanitizer can run in a few minutes.
"""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.executors.walk_half import WalkHalfExecutor
from blockdrop_fast.measure.tolerance import make_reference
from blockdrop_fast.networks.folding import fold_network
from blockdrop_fast.ops import (
    gathered_conv_,
    gathered_conv_reference_,
    plan,
    plan_reference,
    walk_half,
    walk_half_reference,
)
from tests.gpu.conditions import on_gpu
from tests.ops.gathered_conv_cases import FORMS, make_case
from tests.random_networks import make_cifar_network as make_network
from tests.random_networks import make_policy, random_decisions, random_images

pytestmark = on_gpu
DTYPES = [torch.bfloat16, torch.float16]
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
def test_small_clusters_on_every_path(dtype, shortcut):
    """A cluster an image (few paths) and a thread block an image (many) give the same bits."""
    _, executor = make_executor((1, 2, 1), shortcut, dtype)
    images = make_images(2, dtype)
    paths = torch.tensor(list(itertools.product([False, True], repeat=4)), device="cuda")
    decisions = paths[:, None].expand(16, 2, 4).contiguous()
    expected = executor.run_sets(images, decisions)
    for one, logits in zip(decisions, expected, strict=True):
        assert torch.equal(executor.run(images, one), logits)


@pytest.mark.parametrize("batch", [1, 5])
def test_small_clusters_decide_alike(batch):
    engine = make_engine()
    images = make_images(40)
    expected, output = engine(images), engine(images[:batch])
    assert torch.equal(output.decisions, expected.decisions[:batch])
    assert torch.equal(output.logits, expected.logits[:batch])


@pytest.mark.parametrize(("batch", "kernel"), [(1, "cluster_kernel"), (64, "walk_kernel")])
def test_which_kernel_runs(batch, kernel):
    if torch.cuda.get_device_capability() < (9, 0) and batch == 1:
        kernel = "walk_kernel"  # without clusters
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


# gathered_conv_ --------------------------------------------------------------------------------

# Relative to the largest result: one rounding of it, or of the factors of its sums.
CONV_ERROR = {
    "float16": 2**-10,
    "bfloat16": 2**-7,
    "tf32": 2**-9,
    "float32": 2**-19,
}
# ResNet-101's convolutions at 14x14 and 7x7, a first one of a segment, and a CIFAR network's.
CONVS = [
    (1, 1, (1024, 256, 14, 14)),
    (3, 1, (256, 256, 14, 14)),
    (1, 1, (256, 1024, 14, 14)),
    (3, 1, (512, 512, 7, 7)),
    (3, 2, (128, 128, 28, 28)),
    (1, 2, (256, 512, 56, 56)),
    (3, 1, (16, 16, 32, 32)),
]


def run_conv(kernel_size, stride, shape, count, form, arithmetic, monkeypatch, **choices):
    """Run the kernel on a case with NaN wherever nothing may be read; the result has to be right.

    Rows that are not addressed have to stay as they are, bit for bit.
    """
    from blockdrop_fast.triton_kernels.gathered_conv import launch_gathered_conv

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", arithmetic == "tf32")
    dtype = torch.float32 if arithmetic in ("tf32", "float32") else getattr(torch, arithmetic)
    images = choices.pop("images", 5)
    case = make_case(kernel_size, stride, shape, count, *FORMS[form], dtype, images=images)
    before, rest = case[0], case[1:]
    on_gpu = [part.cuda() if isinstance(part, torch.Tensor) else part for part in case]
    if choices:
        launch_gathered_conv(*on_gpu, **choices)
    else:
        gathered_conv_(*on_gpu)
    out = on_gpu[0].cpu()
    expected = before.double()
    wide = [part.double() if part.is_floating_point() else part for part in rest[:5]]
    gathered_conv_reference_(expected, *wide, *rest[5:])
    addressed = torch.zeros(images, dtype=torch.bool)
    addressed[rest[3][:count].long() if FORMS[form][1] else slice(count)] = True
    as_integers = torch.int16 if out.element_size() == 2 else torch.int32
    assert torch.equal(out[~addressed].view(as_integers), before[~addressed].view(as_integers))
    if count:
        error = (out[addressed].double() - expected[addressed]).abs().max()
        assert error <= CONV_ERROR[arithmetic] * expected[addressed].abs().max()


# Each shape, form and dtype is compiled for itself, so not all combinations.
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_small_gathered_conv_like_reference(kernel_size, stride, form, monkeypatch):
    for count in (0, 1, 3, 5):
        run_conv(kernel_size, stride, (24, 40, 5, 7), count, form, "bfloat16", monkeypatch)


@pytest.mark.parametrize("arithmetic", CONV_ERROR)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_small_gathered_conv_of_any_dtype(kernel_size, arithmetic, monkeypatch):
    shape = (33, 64, 1, 9)
    run_conv(kernel_size, 1, shape, 3, "gather-scatter", arithmetic, monkeypatch)


@pytest.mark.parametrize(
    ("arithmetic", "convs"),
    [("bfloat16", CONVS), ("float16", CONVS[:3]), ("tf32", CONVS[:3]), ("float32", CONVS[1:2])],
)
def test_gathered_conv_of_real_networks(arithmetic, convs, monkeypatch):
    for kernel_size, stride, shape in convs:
        form = "scatter" if shape[1] > shape[0] else "gather"
        run_conv(kernel_size, stride, shape, 11, form, arithmetic, monkeypatch, images=16)


@pytest.mark.parametrize("channels", [64, 256])
def test_3x3_gathered_conv_in_all_configurations(channels, monkeypatch):
    """Triton's own 3x3 convolutions have been wrong in some; here on loops unrolled and not."""
    from blockdrop_fast.triton_kernels.config import Problem, candidates

    problem = Problem(3, 1, channels, channels, 196, "bfloat16", rows=8)
    for config in candidates(problem, _shared_bytes()):
        shape = (channels, channels, 14, 14)
        choices = {"config": config, "images": 8}
        run_conv(3, 1, shape, 7, "gather-scatter", "bfloat16", monkeypatch, **choices)


def _shared_bytes() -> int:
    from blockdrop_fast.triton_kernels.config import shared_bytes

    return shared_bytes(torch.cuda.get_device_capability())


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_small_gathered_conv_in_any_grid(programs, monkeypatch):
    from blockdrop_fast.triton_kernels.config import Config

    choices = {"programs": programs, "config": Config(64, 32, 32, 4, 3)}
    run_conv(3, 1, (64, 96, 9, 9), 3, "scatter", "bfloat16", monkeypatch, **choices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_gathered_conv_keeps_nan(dtype):
    """A NaN pixel of an active image gives NaN there, which ReLU must not hide, and only there."""
    case = make_case(1, 1, (16, 16, 4, 4), 3, True, False, dtype)
    out, x, *rest = [part.cuda() if isinstance(part, torch.Tensor) else part for part in case]
    x[rest[2][1].long(), :, 2, 2] = torch.nan
    gathered_conv_(out, x, *rest)
    expected = torch.zeros(3, 4, 4, dtype=torch.bool)
    expected[1, 2, 2] = True
    assert torch.equal(out[:3].isnan().all(1).cpu(), expected)
    assert torch.equal(out[:3].isnan().any(1).cpu(), expected)


def test_gathered_conv_beyond_32_bits(monkeypatch):
    """x holds more than 2**31 elements; only the last and the first image are active."""
    rows, c_in, c_out, size = 2800, 256, 16, 56
    x = torch.empty(
        *(rows, c_in, size, size),
        dtype=torch.bfloat16,
        device="cuda",
        memory_format=torch.channels_last,
    )
    assert x.numel() > 2**31
    x[0], x[-1] = torch.randn(2, c_in, size, size).unbind()
    active = torch.tensor([rows - 1, 0], dtype=torch.int32, device="cuda")
    count = torch.tensor([2], dtype=torch.int32, device="cuda")
    weight = (torch.randn(c_in, c_out) / c_in**0.5).to("cuda", torch.bfloat16)
    bias = torch.randn(c_out, device="cuda")
    out = torch.full((2, c_out, size, size), torch.nan, dtype=torch.bfloat16, device="cuda")
    out = out.contiguous(memory_format=torch.channels_last)
    gathered_conv_(out, x, weight, bias, active, count, 1, 1, True, False)
    few = torch.stack([x[-1], x[0]]).contiguous(memory_format=torch.channels_last)
    expected = torch.empty_like(out)
    gathered_conv_(expected, few, weight, bias, active, count, 1, 1, False, False)
    assert torch.equal(out, expected)


def make_block(images: int):
    """What a bottleneck's three convolutions take, as a plan's row and a folded network give it."""
    generator = torch.Generator().manual_seed(0)

    def random(*sizes, dtype=torch.bfloat16):
        return torch.randn(sizes, generator=generator).to("cuda", dtype)

    def activations(channels):
        return random(images, channels, 7, 7).contiguous(memory_format=torch.channels_last)

    x, narrow, wide = activations(256), activations(64), activations(64)
    weights = [random(256, 64) / 16, random(576, 64) / 24, random(64, 256) / 8]
    biases = [random(size, dtype=torch.float32) for size in (64, 64, 256)]

    def run(active, count):
        operands = [(*pair, active, count) for pair in zip(weights, biases, strict=True)]
        gathered_conv_(narrow, x, *operands[0], 1, 1, True, False)
        gathered_conv_(wide, narrow, *operands[1], 3, 1, False, False)
        gathered_conv_(x, wide, *operands[2], 1, 1, False, True)

    return x, run


def test_gathered_conv_with_any_plan_without_compiling_anew():
    """Rows of a plan lie at any alignment, counts are any number: one kernel for all."""
    from blockdrop_fast.triton_kernels.gathered_conv import gathered_conv_kernel

    decisions = make_decisions(13, 5)
    _, run = make_block(13)
    indices, counts, _ = plan(decisions)
    run(indices[0], counts[:1])
    kernels = gathered_conv_kernel.device_caches[torch.cuda.current_device()][0]
    compiled = len(kernels)
    for k in range(1, 5):
        run(indices[k], counts[k : k + 1])
    counts.fill_(1)
    run(indices[0], counts[:1])
    assert compiled > 0
    assert len(kernels) == compiled


def test_gathered_conv_without_synchronisation_captured_with_other_counts():
    x, run = make_block(24)
    start = x.clone()
    active = torch.randperm(24, device="cuda").int()
    count = torch.tensor([24], dtype=torch.int32, device="cuda")
    run(active, count)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(active, count)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(active, count)
    for images in (0, 1, 7, 24):
        active.copy_(torch.randperm(24).int())
        count.fill_(images)
        x.copy_(start)
        graph.replay()
        captured = x.clone()
        x.copy_(start)
        run(active, count)
        assert torch.equal(captured, x)
        kept = active[:images].long()
        changed = (captured != start).flatten(1).any(1)
        assert torch.equal(changed.nonzero().flatten(), kept.sort().values)


def test_tuned_gathered_conv_is_used(tmp_path, monkeypatch):
    from blockdrop_fast.measure.tune import Shape, tune
    from blockdrop_fast.triton_kernels import config as configs

    monkeypatch.setenv("BLOCKDROP_CACHE", str(tmp_path))
    choices = [configs.Config(64, 64, 64, 4, 2), configs.Config(64, 32, 64, 4, 3)]
    shape = Shape(3, 1, 64, 64, 14, 14)
    [entry] = tune([shape], torch.bfloat16, 8, choices=lambda *_: choices)
    assert entry.config in choices
    assert entry.microseconds > 0
    problem = configs.Problem(3, 1, 64, 64, 196, "bfloat16", rows=7)
    assert configs.choose_config(problem, torch.device("cuda")) == entry.config
    configs.forget_tables()
