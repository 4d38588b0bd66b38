"""The walk with 16-bit weights and activations, for GPUs: images to logits in one launch.

Kernels: ``csrc/cuda/walk_half.cu``. There is none for CPUs: they run the reference.

Packed weights are bytes, in the order in which a thread block reads them:

* the stem with its input channels filled up to 16, then both convolutions of each block; each as
  slices of 16 input channels, with a part for every 16 output channels: their bias (16 float32,
  the same in each slice), then for each of the 9 taps the 16 x 16 weights as the fragments of
  ``mma.m16n8k16``: (lane, 8 values of 16 bits);
* the classifier in float32: the bias (num_classes), then the weights (64, num_classes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdrop_fast.ops.walk_network import (
    WIDTHS,
    check_decisions,
    check_length,
    check_network,
    conv_shapes,
    define_walk,
    run_network,
    run_policy,
)

DTYPES = (torch.bfloat16, torch.float16)
IMAGE_SIZE = 32
TILE = 16
BIAS_BYTES = TILE * 4
FRAGMENT_BYTES = TILE * TILE * 2


def walk_half(
    images: Tensor,
    decisions: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
    order: Tensor | None = None,
) -> Tensor:
    """Run a CIFAR ResNet, each image through the blocks that its decisions keep.

    Products are summed in float32; activations are rounded to the images' dtype after each
    convolution. Nothing waits for the device.

    Args:
        images: (B, 3, 32, 32) bfloat16 or float16, of any strides; B may be 0.
        decisions: (B, K) bool, or (S, B, K) for S sets of decisions of the same images.
        weights: uint8 vector of weights packed for the images' dtype, see the module's docstring.
        layers: the residual blocks of the three segments of 16, 32 and 64 channels; K is their sum.
        num_classes: number of classes.
        subsample: as for ``blockdrop_fast.ops.walk``.
        order: (B,) or (S * B,) int32, a permutation: which image (of which set) is begun when,
            best the longest first, as ``plan`` orders them. It has no influence on results.

    Returns:
        (B, num_classes) or (S, B, num_classes) float32 logits.

    Raises:
        TypeError: images, decisions, weights or order of another dtype.
        ValueError: shapes that do not fit each other, or the layout above.
    """
    return torch.ops.blockdrop_fast.walk_half(
        images, decisions, weights, layers, num_classes, subsample, order
    )


def walk_half_policy(
    images: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
    policy_weights: Tensor,
    policy_layers: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``blockdrop_fast.ops.walk_policy``, in one launch.

    Images and packed weights are as for ``walk_half``; logits and policy logits are float32.
    """
    return torch.ops.blockdrop_fast.walk_half_policy(
        images, weights, layers, num_classes, subsample, policy_weights, policy_layers
    )


def pack_conv(weight: Tensor, bias: Tensor) -> Tensor:
    """(C_out, C_in, 3, 3) weight of 16 bits and (C_out,) bias -> bytes for the kernels."""
    weight = F.pad(weight, (0, 0, 0, 0, 0, -weight.shape[1] % TILE))
    c_out, c_in = weight.shape[:2]
    # A lane holds rows lane // 4 and 8 more, columns 2 * (lane % 4), the next, and 8 more.
    parts = weight.reshape(c_out // TILE, 2, 8, c_in // TILE, 2, 4, 2, 9)
    # (out, row half, row, in, column half, column pair, column, tap)
    fragments = parts.permute(3, 0, 7, 2, 5, 4, 1, 6).reshape(c_in // TILE, c_out // TILE, -1)
    biases = bias.float().view(-1, TILE).expand(c_in // TILE, -1, -1).contiguous()
    return torch.cat([biases.view(torch.uint8), fragments.view(torch.uint8)], dim=2).flatten()


def pack_classifier(weight: Tensor, bias: Tensor) -> Tensor:
    """(num_classes, 64) weight and (num_classes,) bias -> bytes for the kernels."""
    return torch.cat([bias.float(), weight.float().t().flatten()]).view(torch.uint8)


def packed_bytes(layers: Sequence[int], num_classes: int) -> int:
    """The length of a network's packed weights."""
    return classifier_offset(layers) + (1 + WIDTHS[-1]) * num_classes * 4


def classifier_offset(layers: Sequence[int]) -> int:
    """Where a network's classifier begins in its packed weights, in bytes."""
    return sum(_conv_bytes(c_in, c_out) for c_in, c_out in conv_shapes(layers))


def walk_half_reference(
    images: Tensor,
    decisions: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
    order: Tensor | None = None,
) -> Tensor:
    """What ``walk_half`` computes, in PyTorch operations, on any device."""
    _check_walk(images, decisions, weights, layers, num_classes, subsample, order)
    parameters = list(_unpack(weights, layers, num_classes, images.dtype))
    return run_network(images, decisions, parameters, layers, subsample)


def walk_half_policy_reference(images: Tensor, *networks) -> tuple[Tensor, Tensor, Tensor]:
    """What ``walk_half_policy`` computes, in PyTorch operations."""
    _check_policy(images, *networks)
    return run_policy(walk_half_reference, images, *networks)


def _conv_bytes(c_in: int, c_out: int) -> int:
    return -(-c_in // TILE) * c_out // TILE * (BIAS_BYTES + 9 * FRAGMENT_BYTES)


def _unpack(
    weights: Tensor, layers: Sequence[int], num_classes: int, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """(weight, bias) in float32 of each convolution in order, and of the classifier."""
    weights = weights.clone()  # to where memory can be seen as float32
    offset = 0
    for c_in, c_out in conv_shapes(layers):
        num_slices = -(-c_in // TILE)
        size = _conv_bytes(c_in, c_out)
        slices = weights[offset : offset + size].view(num_slices, c_out // TILE, -1)
        offset += size
        bias = slices[0, :, :BIAS_BYTES].flatten().view(torch.float32)
        fragments = slices[:, :, BIAS_BYTES:].contiguous().view(dtype).float()
        # (in, out, tap, row, column pair, column half, row half, column)
        parts = fragments.view(num_slices, c_out // TILE, 9, 8, 4, 2, 2, 2)
        weight = parts.permute(1, 6, 3, 0, 5, 4, 7, 2).reshape(c_out, num_slices * TILE, 3, 3)
        yield weight[:, :c_in], bias
    classifier = weights[offset:].view(torch.float32).view(1 + WIDTHS[-1], num_classes)
    yield classifier[1:].t(), classifier[0]


def _check(images: Tensor, weights: Tensor, layers, num_classes: int, name: str = "weights"):
    if images.dtype not in DTYPES:
        raise TypeError(
            f"images: expected dtype torch.bfloat16 or torch.float16, got {images.dtype}"
        )
    check_network(images, layers, num_classes)
    if images.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"images: expected shape (B, 3, 32, 32), got {tuple(images.shape)}")
    if weights.dtype != torch.uint8:
        raise TypeError(f"{name}: expected dtype torch.uint8, got {weights.dtype}")
    check_length(name, weights, packed_bytes(layers, num_classes), "packed bytes")


def _check_walk(
    images: Tensor,
    decisions: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    _subsample: bool,
    order: Tensor | None = None,
) -> None:
    _check(images, weights, layers, num_classes)
    check_decisions(decisions, images.shape[0], sum(layers))
    if order is None:
        return
    if order.dtype != torch.int32:
        raise TypeError(f"order: expected dtype torch.int32, got {order.dtype}")
    check_length("order", order, decisions.shape[:-1].numel())


def _check_policy(
    images: Tensor, weights, layers, num_classes, _subsample, policy_weights, policy_layers
):
    _check(images, weights, layers, num_classes)
    _check(images, policy_weights, policy_layers, sum(layers), "policy_weights")


define_walk(
    "walk_half",
    (walk_half_reference, walk_half_policy_reference),
    (_check_walk, _check_policy),
    ", Tensor? order=None",
)
