"""`gathered_conv_` on a GPU: `make gpu-check`. Everywhere else these tests are skipped."""

from __future__ import annotations

import pytest
import torch

from blockdrop_fast.ops import gathered_conv_, gathered_conv_reference_, plan
from tests.gpu.conditions import on_gpu
from tests.ops.gathered_conv_cases import FORMS, make_case
from tests.random_networks import random_decisions

pytestmark = on_gpu
DTYPES = [torch.bfloat16, torch.float16]
# Relative to the largest result: one rounding of it, or of the factors of its sums.
CONV_ERROR = {torch.float16: 2**-10, torch.bfloat16: 2**-7}
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


def run_conv(kernel_size, stride, shape, count, form, dtype=torch.bfloat16, **choices):
    """Run the kernel on a case with NaN wherever nothing may be read; the result has to be right.

    Rows that are not addressed have to stay as they are, bit for bit.
    """
    from blockdrop_fast.triton_kernels.gathered_conv import launch_gathered_conv

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
    assert torch.equal(out[~addressed].view(torch.int16), before[~addressed].view(torch.int16))
    if count:
        error = (out[addressed].double() - expected[addressed]).abs().max()
        assert error <= CONV_ERROR[dtype] * expected[addressed].abs().max()


# Each shape, form and dtype is compiled for itself, so not all combinations.
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_small_gathered_conv_like_reference(kernel_size, stride, form):
    for count in (0, 1, 3, 5):
        run_conv(kernel_size, stride, (24, 40, 5, 7), count, form)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_small_gathered_conv_of_any_dtype(kernel_size, dtype):
    run_conv(kernel_size, 1, (33, 64, 1, 9), 3, "gather-scatter", dtype)


@pytest.mark.parametrize(("dtype", "convs"), [(torch.bfloat16, CONVS), (torch.float16, CONVS[:3])])
def test_gathered_conv_of_real_networks(dtype, convs):
    for kernel_size, stride, shape in convs:
        form = "scatter" if shape[1] > shape[0] else "gather"
        run_conv(kernel_size, stride, shape, 11, form, dtype, images=16)


# 36 kernels, a second or two of compilation each: in parts, for several processes.
@pytest.mark.parametrize("channels", [64, 256])
@pytest.mark.parametrize("stages", [2, 3, 4, 6])
def test_3x3_gathered_conv_in_all_configurations(channels, stages):
    """Triton's own 3x3 convolutions have been wrong in some; here on loops unrolled and not."""
    from blockdrop_fast.triton_kernels.config import Problem, candidates

    problem = Problem(3, 1, channels, channels, 196, "bfloat16", rows=8)
    configs = candidates(problem, _shared_bytes())
    assert {config.stages for config in configs} <= {2, 3, 4, 6}
    for config in (one for one in configs if one.stages == stages):
        shape = (channels, channels, 14, 14)
        choices = {"config": config, "images": 8}
        run_conv(3, 1, shape, 7, "gather-scatter", **choices)


def _shared_bytes() -> int:
    from blockdrop_fast.triton_kernels.config import shared_bytes

    return shared_bytes(torch.cuda.get_device_capability())


@pytest.mark.parametrize("programs", [pytest.param(1, marks=pytest.mark.sanitizer), 3, 1000])
def test_small_gathered_conv_in_any_grid(programs):
    from blockdrop_fast.triton_kernels.config import Config

    choices = {"programs": programs, "config": Config(64, 32, 32, 4, 3)}
    run_conv(3, 1, (64, 96, 9, 9), 3, "scatter", **choices)


@pytest.mark.sanitizer
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


def test_gathered_conv_beyond_32_bits():
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

    decisions = random_decisions(torch.Generator().manual_seed(0), 13, 5).cuda()
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
