"""One convolution of a residual block on a batch's active images, with all that surrounds it.

Kernel: ``blockdrop_fast/triton_kernels/gathered_conv.py``, for CUDA. A residual block on its active
images is a chain of these: the first one gathers its input rows, the last one adds to the residual
and stores in place; between them lie compact buffers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdrop_fast.decisions import check_tensor
from blockdrop_fast.ops._library import LIBRARY, define

KERNEL_SIZES = (1, 3)
STRIDES = (1, 2)


def gathered_conv_(
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
) -> None:
    """Convolution, bias and ReLU of the active images; optionally gathered, residual, scattered.

    For each slot s < count, with i = active[s] where gather, else s:

    * without scatter: ``out[s] = relu(conv(x[i]) + bias)``;
    * with scatter: ``out[active[s]] = relu(out[active[s]] + conv(x[i]) + bias)``.

    All other rows of out stay as they are. Products are summed in float32 (float64 for float64)
    and rounded once, at the end. The kernel does not wait for the device, and can be captured in a
    CUDA graph whose replays read ``active`` and ``count`` anew; the reference waits for ``count``.

    Args:
        out: (R_out, C_out, H_out, W_out), channels-last, changed in place. H_out is
            (H - 1) // stride + 1, W_out likewise.
        x: (R, C_in, H, W) of out's dtype, channels-last, in other memory than out. The kernel takes
            float16 and bfloat16; other dtypes are the reference's.
        weight: (kernel_size² · C_in, C_out) of x's dtype, made by ``pack_conv``.
        bias: (C_out,) float32; float64 for float64 x.
        active: (N,) int32 with N <= R, R_out. The first count are the active images, each once.
        count: (1,) int32, 0 <= count <= N.
        kernel_size: 1 or 3; the padding is kernel_size // 2.
        stride: 1 or 2.
        gather: x holds the rows of all images, not of the slots.
        scatter: out holds the rows of all images, which are the residual.

    Raises:
        TypeError: a tensor's dtype is another one.
        ValueError: shapes, layouts or devices do not fit, or x shares memory with out. The
            reference also checks the values of count and active.
    """
    torch.ops.blockdrop_fast.gathered_conv_(
        out, x, weight, bias, active, count, kernel_size, stride, gather, scatter
    )


def pack_conv(weight: Tensor) -> Tensor:
    """(C_out, C_in, k, k) weight -> (k² · C_in, C_out), rows by tap, then by input channel.

    Raises:
        TypeError, ValueError: no such weight.
    """
    check_tensor("weight", weight, None)
    if weight.ndim != 4:
        raise ValueError(f"weight: expected shape (C_out, C_in, k, k), got {tuple(weight.shape)}")
    return weight.permute(2, 3, 1, 0).reshape(weight.shape[1:].numel(), len(weight)).contiguous()


def unpack_conv(packed: Tensor, kernel_size: int) -> Tensor:
    """The inverse of ``pack_conv``."""
    return packed.unflatten(0, (kernel_size, kernel_size, -1)).permute(3, 2, 0, 1)


def gathered_conv_reference_(
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
) -> None:
    """What ``gathered_conv_`` computes, in PyTorch operations; runs on any device, any dtype."""
    check(out, x, weight, bias, active, count, kernel_size, stride)
    slots = int(count)
    if not 0 <= slots <= len(active):
        raise ValueError(f"count: expected 0 to {len(active)}, as active is long, got {slots}")
    images = active[:slots].long()
    _check_images(images, x, out, gather, scatter)
    if slots == 0:
        return
    taken = x[images] if gather else x[:slots]
    filters = unpack_conv(weight, kernel_size).to(bias.dtype)
    sums = F.conv2d(taken.to(bias.dtype), filters, bias, stride, padding=kernel_size // 2)
    if scatter:
        out[images] = F.relu(out[images] + sums).to(out.dtype)
    else:
        out[:slots] = F.relu(sums).to(out.dtype)


def check(out, x, weight, bias, active, count, kernel_size, stride, *_) -> None:
    """Raise what ``gathered_conv_`` promises to, as far as it is known without the values."""
    _check_layouts(out, x, weight, bias, active, count, kernel_size, stride)
    if _overlap(x, out):
        raise ValueError("x: expected other memory than out's, got tensors that overlap")


def _check_layouts(out, x, weight, bias, active, count, kernel_size, stride, *_) -> None:
    """``check`` without looking at where memory is, which tensors that are traced have none of."""
    if kernel_size not in KERNEL_SIZES:
        raise ValueError(f"kernel_size: expected 1 or 3, got {kernel_size}")
    if stride not in STRIDES:
        raise ValueError(f"stride: expected 1 or 2, got {stride}")
    _check_tensor("x", x, x.dtype, "(R, C_in, H, W)", (None,) * 4, x.device)
    if not x.dtype.is_floating_point:
        raise TypeError(f"x: expected a floating-point dtype, got {x.dtype}")
    _check_tensor("weight", weight, x.dtype, "(k² · C_in, C_out)", (None, None), x.device)
    c_in, height, width = x.shape[1:]
    packed = (kernel_size**2 * c_in, weight.shape[1])
    _check_tensor("weight", weight, x.dtype, "(k² · C_in, C_out)", packed, x.device)
    if not weight.is_contiguous():
        raise ValueError(f"weight: expected contiguous memory, got strides {weight.stride()}")
    bias_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    _check_tensor("bias", bias, bias_dtype, "(C_out,)", packed[1:], x.device)
    _check_tensor("active", active, torch.int32, "(N,)", (None,), x.device)
    _check_tensor("count", count, torch.int32, "(1,)", (1,), x.device)
    expected = (None, packed[1], (height - 1) // stride + 1, (width - 1) // stride + 1)
    _check_tensor("out", out, x.dtype, "(R_out, C_out, H_out, W_out)", expected, x.device)
    for name, tensor in (("x", x), ("out", out)):
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"{name}: expected channels-last memory, got shape {tuple(tensor.shape)} with "
                f"strides {tensor.stride()}"
            )
        if len(active) > len(tensor):
            raise ValueError(
                f"active: expected at most {len(tensor)} images, as {name} has rows, "
                f"got {len(active)}"
            )
    for name, tensor in (("bias", bias), ("active", active)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected contiguous memory, got strides {tensor.stride()}")


def _check_tensor(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    words: str,
    sizes: tuple[int | None, ...],
    device: torch.device,
) -> None:
    """Check dtype, shape (None: any size) and device; ``words`` are the shape's names."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    fits = tensor.ndim == len(sizes) and all(
        wanted is None or size == wanted for size, wanted in zip(tensor.shape, sizes, strict=True)
    )
    if not fits:
        known = "" if None in sizes else f" = {sizes}"
        if None in sizes and any(size is not None for size in sizes):
            known = f" = ({', '.join('any' if size is None else str(size) for size in sizes)})"
        raise ValueError(f"{name}: expected shape {words}{known}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, as x, got {tensor.device}")


def _check_images(images: Tensor, x: Tensor, out: Tensor, gather: bool, scatter: bool) -> None:
    rows = min([len(x)] * gather + [len(out)] * scatter, default=None)
    if rows is None or len(images) == 0:
        return
    if images.min() < 0 or images.max() >= rows:
        raise ValueError(
            f"active: expected images from 0 to {rows - 1}, "
            f"got {int(images.min())} to {int(images.max())}"
        )
    if scatter and len(images.unique()) < len(images):
        raise ValueError("active: expected each image once, got one of them twice")


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors without gaps in their memory have a byte in common."""
    starts = [tensor.data_ptr() for tensor in (one, other)]
    ends = [tensor.data_ptr() + tensor.numel() * tensor.element_size() for tensor in (one, other)]
    return max(starts) < min(ends)


def _gathered_conv_cuda(*arguments) -> None:
    # Imported at the first call: the package works without triton.
    from blockdrop_fast.triton_kernels import KERNEL_DTYPES, why_not

    x = arguments[1]
    if x.dtype not in KERNEL_DTYPES or why_not(x.device):
        gathered_conv_reference_(*arguments)
        return
    from blockdrop_fast.triton_kernels.gathered_conv import launch_gathered_conv

    check(*arguments)
    launch_gathered_conv(*arguments)


def _refuse_negated(*_) -> None:
    """PyTorch's own handling of lazy negation needs an output that is returned."""
    raise ValueError("out: expected no lazily negated tensors, see torch.Tensor.resolve_neg")


define(
    "gathered_conv_(Tensor(a!) out, Tensor x, Tensor weight, Tensor bias, Tensor active, "
    "Tensor count, int kernel_size, int stride, bool gather, bool scatter) -> ()",
    gathered_conv_reference_,
    lambda *_: None,
    _check_layouts,
)
LIBRARY.impl("gathered_conv_", _gathered_conv_cuda, "CUDA")
LIBRARY.impl("gathered_conv_", _refuse_negated, "Negative")
