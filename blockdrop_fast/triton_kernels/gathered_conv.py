"""The kernel of ``gathered_conv_``: an implicit matrix product over the active images' pixels.

The rows of the product are the pixels of all active images, one image after the other; tiles do
not end at an image's last pixel. The reduction goes over the taps, and within a tap over the input
channels, as ``pack_conv`` lays the weights out. How many rows there are is read from the device:
programs without a tile leave at once. See NOTES.md for what it should cost and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockdrop_fast.triton_kernels.config import Config, Problem, choose_config

# More programs than a multiprocessor holds at once, so that the last ones even out the load. With
# more tiles than that a program computes several.
PROGRAMS_PER_SM = 8
# From so many elements on, offsets are computed in 64 bits.
OFFSET_LIMIT = 2**31
_only_compile: ContextVar[bool] = ContextVar("_only_compile", default=False)


# Pointers into a plan's tensors come with any alignment; one compiled kernel serves them all.
@triton.jit(do_not_specialize_on_alignment=["active", "count"])
def gathered_conv_kernel(
    out,  # [R_out, H_OUT, W_OUT, C_OUT]
    x,  # [R, H, W, C_IN]
    weight,  # [KERNEL_SIZE * KERNEL_SIZE * C_IN, C_OUT]
    bias,  # [C_OUT] float32
    active,  # [N]
    count,  # [1]
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    WIDE: tl.constexpr,  # offsets do not fit into 32 bits
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    W_OUT: tl.constexpr = (W - 1) // STRIDE + 1
    PIXELS: tl.constexpr = ((H - 1) // STRIDE + 1) * W_OUT
    PADDING: tl.constexpr = KERNEL_SIZE // 2
    TAPS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    CHUNKS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    TILES_N: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    MASK_K: tl.constexpr = C_IN % BLOCK_K != 0
    MASK_N: tl.constexpr = C_OUT % BLOCK_N != 0

    rows = tl.load(count) * PIXELS
    channels = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M) * TILES_N, tl.num_programs(0)):
        # Tiles of the same pixels follow each other, so that x comes from memory once; all of the
        # weights stay in the L2 cache anyway.
        row = tile // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = row < rows
        slot = row // PIXELS
        pixel = row % PIXELS
        image = slot
        if GATHER:
            image = tl.load(active + slot, mask=valid, other=0)
        if WIDE:
            image = image.to(tl.int64)
        h = pixel // W_OUT * STRIDE - PADDING
        w = pixel % W_OUT * STRIDE - PADDING
        first_tap = ((image * H + h) * W + w) * C_IN  # outside of x where it is padding
        # Bit t: tap t of this row lies within the image.
        within = valid.to(tl.int32)
        if PADDING > 0:
            within = tl.zeros((BLOCK_M,), dtype=tl.int32)
            for t in tl.static_range(TAPS):
                tap_h = h + t // KERNEL_SIZE
                tap_w = w + t % KERNEL_SIZE
                inside = valid & (tap_h >= 0) & (tap_h < H) & (tap_w >= 0) & (tap_w < W)
                within |= inside.to(tl.int32) << t
        x_tile = first_tap[:, None] + channels[None, :]
        weight_tile = channels[:, None] * C_OUT + n[None, :]

        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        # One flat loop, so that the copies into shared memory run ahead across taps.
        for step in range(TAPS * CHUNKS):
            tap = step // CHUNKS
            k = step % CHUNKS * BLOCK_K
            offset = (tap // KERNEL_SIZE * W + tap % KERNEL_SIZE) * C_IN + k
            x_mask = (((within >> tap) & 1) != 0)[:, None]
            weight_offset = (tap * C_IN + k) * C_OUT
            if MASK_K:
                x_mask = x_mask & (k + channels < C_IN)[None, :]
            a = tl.load(x + (x_tile + offset), mask=x_mask, other=0.0)
            if MASK_K or MASK_N:
                weight_mask = (k + channels < C_IN)[:, None] & (n < C_OUT)[None, :]
                b = tl.load(weight + (weight_tile + weight_offset), mask=weight_mask, other=0.0)
            else:
                b = tl.load(weight + (weight_tile + weight_offset))
            sums = tl.dot(a, b, sums)

        target = slot
        if SCATTER:
            target = tl.load(active + slot, mask=valid, other=0)
        if WIDE:
            target = target.to(tl.int64)
        out_tile = ((target * PIXELS + pixel) * C_OUT)[:, None] + n[None, :]
        out_mask = valid[:, None] & (n < C_OUT)[None, :]
        sums += tl.load(bias + n, mask=n < C_OUT, other=0.0)[None, :]
        if SCATTER:
            # Only this program has this tile, and an image is active once: no race.
            sums += tl.load(out + out_tile, mask=out_mask, other=0.0).to(tl.float32)
        sums = tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out + out_tile, sums.to(out.dtype.element_ty), mask=out_mask)


def launch_gathered_conv(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    active: Tensor,
    count: Tensor,
    kernel_size: int,
    stride: int,
    gather: bool,
    scatter: bool,
    config: Config | None = None,
    programs: int | None = None,
) -> None:
    """Launch the kernel on the current stream of x's device; nothing waits for it.

    Args:
        out, x, weight, bias, active, count, kernel_size, stride, gather, scatter: as for
            ``gathered_conv_``, already checked; float32 in Triton's interpreter only.
        config: None: the one of the tables, or the rule where they have none.
        programs: size of the grid; None: as many as there are tiles if all images are active, but
            at most ``PROGRAMS_PER_SM`` for each multiprocessor.
    """
    pixels = out.shape[2] * out.shape[3]
    if len(active) == 0 or pixels == 0 or out.shape[1] == 0:
        return
    if len(active) * pixels >= 2**31:
        raise ValueError(
            f"active: expected fewer than 2**31 pixels of out, got {len(active)} images of {pixels}"
        )
    dtype = str(x.dtype).removeprefix("torch.")
    problem = Problem(kernel_size, stride, x.shape[1], out.shape[1], pixels, dtype, len(active))
    on_gpu = x.device.type == "cuda"  # else it is Triton's interpreter, which computes on the CPU
    if config is None:
        config = choose_config(problem, x.device)
    if programs is None:
        programs = problem.tiles(config)
        if on_gpu:
            properties = torch.cuda.get_device_properties(x.device)
            programs = min(programs, PROGRAMS_PER_SM * properties.multi_processor_count)
    launch = gathered_conv_kernel[(programs,)]
    if _only_compile.get():
        launch = partial(gathered_conv_kernel.warmup, grid=(programs,))
    with torch.cuda.device(x.device if on_gpu else -1):  # -1: stay
        launch(
            *(out.detach(), x.detach(), weight.detach(), bias.detach(), active, count),
            C_IN=problem.c_in,
            C_OUT=problem.c_out,
            H=x.shape[2],
            W=x.shape[3],
            KERNEL_SIZE=kernel_size,
            STRIDE=stride,
            GATHER=gather,
            SCATTER=scatter,
            WIDE=max(x.numel(), out.numel()) >= OFFSET_LIMIT,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.warps,
            num_stages=config.stages,
        )


@contextmanager
def compiling_together(threads: int | None = None) -> Iterator[None]:
    """What is launched in here is compiled, all of it at the same time, and not run.

    A kernel takes a second or two, a network has some twenty. Those that cannot be compiled are
    left to their first launch, which raises.

    Args:
        threads: None: as many as a pool of Python's has.
    """
    token = _only_compile.set(True)
    try:
        with (
            ThreadPoolExecutor(threads) as pool,
            triton.AsyncCompileMode(pool, ignore_errors=True),
        ):
            yield
    finally:
        _only_compile.reset(token)
