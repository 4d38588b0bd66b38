"""The walk with 16-bit weights and activations, for GPUs: images to logits in one launch.

Kernels: ``csrc/cuda/walk.cu``. There is none for CPUs: they run the reference.

Packed weights are bytes, in the order in which a thread block reads them:

* the stem with its input channels filled up to 16, then both convolutions of each block; each as
  slices of 16 input channels: the bias (C_out float32, the same in each slice), then for every 16
  output channels and each of the 9 taps the 16 x 16 weights as the fragments of
  ``mma.m16n8k16``: (lane, 8 values of 16 bits);
* the classifier in float32: the bias (num_classes), then the weights (64, num_classes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdrop_fast.ops._library import LIBRARY, REFERENCE
from blockdrop_fast.ops.walk import WIDTHS, residual_shapes, shape_changing_shortcut

DTYPES = (torch.bfloat16, torch.float16)
IMAGE_SIZE = 32
TILE = 16
FRAGMENT_BYTES = TILE * TILE * 2

_NETWORK = "Tensor weights, int[] layers, int num_classes, bool subsample"
LIBRARY.define(
    f"walk_half(Tensor images, Tensor decisions, {_NETWORK}, Tensor? order=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    f"walk_half_policy(Tensor images, {_NETWORK}, Tensor policy_weights, int[] policy_layers)"
    " -> (Tensor logits, Tensor decisions, Tensor policy_logits)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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
    """Run the policy network, and the backbone at its thresholded decisions, in one launch.

    Args:
        images, weights, layers, num_classes, subsample: as for ``walk_half``.
        policy_weights: packed like ``weights``; a network of K classes, average-pooling shortcuts.
        policy_layers: the residual blocks of the policy network's segments.

    Returns:
        logits: (B, num_classes) float32.
        decisions: (B, K) bool, True where the policy logit is >= 0.
        policy_logits: (B, K) float32.

    Raises:
        TypeError, ValueError: as for ``walk_half``.
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
    fragments = parts.permute(3, 0, 7, 2, 5, 4, 1, 6).reshape(c_in // TILE, -1)
    biases = bias.float().expand(c_in // TILE, -1).contiguous()
    return torch.cat([biases.view(torch.uint8), fragments.view(torch.uint8)], dim=1).flatten()


def pack_classifier(weight: Tensor, bias: Tensor) -> Tensor:
    """(num_classes, 64) weight and (num_classes,) bias -> bytes for the kernels."""
    return torch.cat([bias.float(), weight.float().t().flatten()]).view(torch.uint8)


def packed_bytes(layers: Sequence[int], num_classes: int) -> int:
    """The length of a network's packed weights."""
    return classifier_offset(layers) + (1 + WIDTHS[-1]) * num_classes * 4


def classifier_offset(layers: Sequence[int]) -> int:
    """Where a network's classifier begins in its packed weights, in bytes."""
    return sum(_conv_bytes(c_in, c_out) for c_in, c_out in _shapes(layers))


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
    _check(images, decisions, weights, layers, num_classes, order)
    if decisions.ndim == 3:
        arguments = (weights, layers, num_classes, subsample)
        if len(decisions) == 0:
            return images.new_empty((0, len(images), num_classes), dtype=torch.float32)
        return torch.stack([walk_half_reference(images, one, *arguments) for one in decisions])
    dtype = images.dtype
    convs, classifier = _unpack(weights, layers, num_classes, dtype)

    def convolve(x: Tensor, stride: int = 1, residual: Tensor | float = 0.0) -> Tensor:
        weight, bias = next(convs)
        sums = F.conv2d(x.float(), weight[:, : x.shape[1]], bias, stride, padding=1)
        return F.relu(sums + residual).to(dtype)

    x = convolve(images)
    block = 0
    for segment, num_blocks in enumerate(layers):
        for index in range(num_blocks):
            stride = 2 if segment > 0 and index == 0 else 1
            shortcut = x
            if stride == 2:
                shortcut = shape_changing_shortcut(x.float(), subsample).to(dtype)
            kept = convolve(convolve(x, stride), residual=shortcut)
            x = torch.where(decisions[:, block, None, None, None], kept, shortcut)
            block += 1
    return F.linear(x.float().mean((2, 3)), *classifier)


def walk_half_policy_reference(
    images: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
    policy_weights: Tensor,
    policy_layers: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``walk_half_policy`` computes, in PyTorch operations."""
    keep_all = images.new_ones((len(images), sum(policy_layers)), dtype=torch.bool)
    policy_logits = walk_half_reference(
        images, keep_all, policy_weights, policy_layers, sum(layers), False
    )
    decisions = policy_logits >= 0
    logits = walk_half_reference(images, decisions, weights, layers, num_classes, subsample)
    return logits, decisions, policy_logits


def _shapes(layers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(C_in, C_out) of the stem, filled up, and of the blocks' convolutions, in order."""
    yield TILE, WIDTHS[0]
    yield from residual_shapes(layers)


def _conv_bytes(c_in: int, c_out: int) -> int:
    return c_in // TILE * (c_out * 4 + c_out // TILE * 9 * FRAGMENT_BYTES)


def _unpack(
    weights: Tensor, layers: Sequence[int], num_classes: int, dtype: torch.dtype
) -> tuple[Iterator[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """(weight, bias) in float32: of each convolution in order, and of the classifier."""

    def convs() -> Iterator[tuple[Tensor, Tensor]]:
        offset = 0
        for c_in, c_out in _shapes(layers):
            size = _conv_bytes(c_in, c_out)
            slices = weights[offset : offset + size].view(c_in // TILE, -1)
            offset += size
            bias = slices[0, : c_out * 4].clone().view(torch.float32)
            fragments = slices[:, c_out * 4 :].contiguous().view(dtype).float()
            # (in, out, tap, row, column pair, column half, row half, column)
            parts = fragments.view(c_in // TILE, c_out // TILE, 9, 8, 4, 2, 2, 2)
            weight = parts.permute(1, 6, 3, 0, 5, 4, 7, 2).reshape(c_out, c_in, 3, 3)
            yield weight, bias

    classifier = weights[classifier_offset(layers) :].clone().view(torch.float32)
    classifier = classifier.view(1 + WIDTHS[-1], num_classes)
    return convs(), (classifier[1:].t(), classifier[0])


def _check(
    images: Tensor,
    decisions: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    order: Tensor | None,
) -> None:
    if images.dtype not in DTYPES:
        raise TypeError(
            f"images: expected dtype torch.bfloat16 or torch.float16, got {images.dtype}"
        )
    if images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"images: expected shape (B, 3, 32, 32), got {tuple(images.shape)}")
    if len(layers) != len(WIDTHS) or min(layers) < 1:
        raise ValueError(f"layers: expected at least one block in 3 segments, got {list(layers)}")
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    if decisions.dtype != torch.bool:
        raise TypeError(f"decisions: expected dtype torch.bool, got {decisions.dtype}")
    if decisions.ndim not in (2, 3) or decisions.shape[-2:] != (len(images), sum(layers)):
        raise ValueError(
            f"decisions: expected shape (B, K) or (S, B, K) with B = {len(images)} and "
            f"K = {sum(layers)}, got {tuple(decisions.shape)}"
        )
    if weights.dtype != torch.uint8:
        raise TypeError(f"weights: expected dtype torch.uint8, got {weights.dtype}")
    if weights.ndim != 1 or len(weights) != packed_bytes(layers, num_classes):
        raise ValueError(
            f"weights: expected a vector of {packed_bytes(layers, num_classes)} packed bytes, "
            f"got shape {tuple(weights.shape)}"
        )
    if order is not None and order.dtype != torch.int32:
        raise TypeError(f"order: expected dtype torch.int32, got {order.dtype}")
    if order is not None and order.shape != (decisions.shape[:-1].numel(),):
        raise ValueError(
            f"order: expected a vector of {decisions.shape[:-1].numel()}, "
            f"got shape {tuple(order.shape)}"
        )


def _walk_half_fake(
    images: Tensor,
    decisions: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
    order: Tensor | None = None,
) -> Tensor:
    return images.new_empty((*decisions.shape[:-1], num_classes), dtype=torch.float32)


def _walk_half_policy_fake(
    images: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
    policy_weights: Tensor,
    policy_layers: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_blocks = images.shape[0], sum(layers)
    return (
        images.new_empty((batch, num_classes), dtype=torch.float32),
        images.new_empty((batch, num_blocks), dtype=torch.bool),
        images.new_empty((batch, num_blocks), dtype=torch.float32),
    )


LIBRARY.impl("walk_half", walk_half_reference, REFERENCE)
LIBRARY.impl("walk_half_policy", walk_half_policy_reference, REFERENCE)
torch.library.register_fake("blockdrop_fast::walk_half", _walk_half_fake, lib=LIBRARY)
torch.library.register_fake("blockdrop_fast::walk_half_policy", _walk_half_policy_fake, lib=LIBRARY)
