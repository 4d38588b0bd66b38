"""Checks of what every public call takes: images, decisions and their weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_PIXELS = 2**30


def check_tensor(name: str, tensor: Tensor, device: torch.device | None) -> None:
    """Raise unless an argument is a tensor that can be computed with on a device.

    Args:
        name: of the argument.
        tensor: what came.
        device: where it has to be; None: anywhere.

    Raises:
        TypeError: not a tensor, a sparse one, or one on the meta device that has no values.
        ValueError: it is on another device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else f"{tensor.layout} of {tensor.dtype}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")
    if device is None or tensor.device == device:
        return
    if tensor.is_meta:
        raise TypeError(f"{name}: expected a tensor with values, got one on the meta device")
    raise ValueError(f"{name}: expected on {device}, got on {tensor.device}")


def check_values(name: str, tensor: Tensor) -> None:
    """``check_tensor`` for one that is read at once, wherever it is: not on the meta device."""
    check_tensor(name, tensor, None)
    if tensor.is_meta:
        raise TypeError(f"{name}: expected a tensor with values, got one on the meta device")


def check_images(
    images: Tensor,
    *,
    channels: int,
    size_multiple: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> None:
    """Raise a clear error unless ``images`` is a batch that a network can take.

    Args:
        images: expected (B, channels, H, W), floating point, normalised; B may be 0.
        channels: number of input channels of the network.
        size_multiple: H and W must be positive multiples of this; their product at most 2^30,
            beyond which PyTorch's kernels count wrongly.
        dtype: the floating-point type of the network's weights.
        device: where the network is; None: wherever the images are.

    Raises:
        TypeError: see ``check_tensor``, or another dtype than the network's (nothing is silently
            cast).
        ValueError: wrong shape, size or device; NaN or infinite values. Values are checked only
            where that costs no device synchronisation, i.e. on the CPU.
    """
    check_tensor("images", images, device)
    if images.dtype != dtype and not _autocasts(images, dtype):
        raise TypeError(
            f"images: expected dtype {dtype} as the network's weights, got {images.dtype}"
        )
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"images: expected shape (B, {channels}, H, W), got {tuple(images.shape)}")
    height, width = images.shape[2:]
    if (
        height < size_multiple
        or width < size_multiple
        or height % size_multiple
        or (width % size_multiple)
    ):
        raise ValueError(
            f"images: height and width must be positive multiples of {size_multiple}, "
            f"got {height}x{width}"
        )
    if height * width > MOST_PIXELS:
        raise ValueError(f"images: expected at most {MOST_PIXELS} pixels, got {height}x{width}")
    # Looking at the sum first is cheap: it is finite unless a value is not, or it overflows.
    if (
        images.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not math.isfinite(images.sum().item())
        and not torch.isfinite(images).all()
    ):
        raise ValueError("images: contain NaN or infinite values")


def check_features(features: Tensor, channels: int, weight: Tensor, size_multiple: int = 1) -> None:
    """Raise unless ``features`` are those of a network on the way.

    Args:
        features: expected (B, channels, H, W), not without pixels.
        channels: C.
        weight: one of the network's, for dtype and device.
        size_multiple: of H and W.

    Raises:
        TypeError: see ``check_tensor``, or another dtype.
        ValueError: wrong shape or device.
    """
    check_tensor("features", features, weight.device)
    if features.dtype != weight.dtype and not _autocasts(features, weight.dtype):
        raise TypeError(f"features: expected dtype {weight.dtype}, got {features.dtype}")
    if features.ndim != 4 or features.shape[1] != channels or 0 in features.shape[2:]:
        raise ValueError(
            f"features: expected shape (B, {channels}, H, W), got {tuple(features.shape)}"
        )
    height, width = features.shape[2:]
    if height % size_multiple or width % size_multiple:
        raise ValueError(
            f"features: height and width must be multiples of {size_multiple}, got {height}x{width}"
        )


def check_decisions(
    decisions: Tensor,
    *,
    batch: int,
    num_blocks: int,
    device: torch.device,
    values: bool = True,
) -> Tensor:
    """Check decisions and return them as a bool tensor.

    Args:
        decisions: (B, K), bool or 0/1 of any dtype; 1 = keep the block.
        batch: B, the number of images.
        num_blocks: K, the number of residual blocks of the backbone.
        device: where the images are.
        values: also check that every value is 0 or 1. On a GPU this waits for the device;
            without it, every non-zero value means keep.

    Returns:
        (B, K) bool, on the same device; the input itself if it already is bool.

    Raises:
        TypeError: see ``check_tensor``, or of a complex dtype.
        ValueError: wrong shape or device, or values other than 0 and 1.
    """
    check_tensor("decisions", decisions, device)
    if decisions.is_complex():
        raise TypeError(f"decisions: expected bool or 0/1 values, got dtype {decisions.dtype}")
    if decisions.ndim != 2 or decisions.shape != (batch, num_blocks):
        raise ValueError(
            f"decisions: expected shape (B, K) = ({batch}, {num_blocks}), "
            f"got {tuple(decisions.shape)}"
        )
    if decisions.dtype == torch.bool:
        return decisions
    keep = decisions != 0
    if values and not decisions.is_meta and not torch.compiler.is_compiling():
        wrong = decisions[keep & (decisions != 1)]  # NaN compares unequal to both
        if wrong.numel():
            raise ValueError(f"decisions: expected only 0 and 1, got {wrong[0].item()}")
    return keep


def check_weights(
    weights: Tensor, *, decisions: Tensor, device: torch.device, values: bool = True
) -> None:
    """Raise unless ``weights`` are those of kept blocks' outputs.

    Args:
        weights: expected as ``decisions``, (B, K), of a floating-point dtype.
        decisions: checked already.
        device: where the images are.
        values: also check that weights of kept blocks are finite, which waits for a GPU.

    Raises:
        TypeError: see ``check_tensor``, or of another dtype.
        ValueError: wrong shape, device or values.
    """
    check_tensor("weights", weights, device)
    if not weights.is_floating_point():
        raise TypeError(f"weights: expected a floating-point dtype, got {weights.dtype}")
    if weights.shape != decisions.shape:
        raise ValueError(
            f"weights: expected the shape of decisions, {tuple(decisions.shape)}, "
            f"got {tuple(weights.shape)}"
        )
    if values and not weights[decisions].isfinite().all():
        raise ValueError("weights: contain NaN or infinite values")


def _autocasts(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether PyTorch now casts a tensor and weights of another dtype to one that both have."""
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return False
    return {tensor.dtype, dtype} <= {torch.float32, torch.bfloat16, torch.float16}
