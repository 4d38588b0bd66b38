"""The walk of ImageNet networks: a whole network image by image, each along its own path.

Kernels: ``csrc/cpu/walk_imagenet.cpp`` and beside it ``walk_imagenet_kernels.h``.

The network has batch norm folded into its convolutions: a stem (7x7 of stride 2 to 64 channels, and
3x3 max pooling of stride 2), segments of basic or bottleneck blocks, and a classifier of the last
segment's mean. The first block of every segment but the first halves height and width, rounding up;
where it does or where channels change, its shortcut is a 1x1 convolution.

Packed weights are one float32 vector, in the order in which they are read: the stem; of each block
all convolutions but the last, the shortcut, the last one; the classifier. Each is the bias, then
the weights, with channels in and out filled up with zeros to multiples of 32:

* the stem: (C_out / 32, 7, 7, 3, 32);
* 3x3 convolutions of stride 1 in Winograd's form: (C_out / 32, 4, 4, C_in, 32);
* others in blocks of up to 512 output and 256 input channels, that a kernel can keep in its cache:
  for each 512 output channels, for each tap, for each 256 input channels
  (C_out of the block / 32, C_in of the block, 32).

The last value is the network's ``signature``: other networks have weights as long as these, too.

Winograd's form is faster, and takes 16 values for 9. It is used in the first ``winograd`` segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdrop_fast.ops._library import define
from blockdrop_fast.ops.walk_network import (
    check_decisions,
    check_length,
    check_signature,
    signature,
)

STEM_CHANNELS = 64
PANEL = 32
BLOCK_IN = 256
BLOCK_OUT = 512
# G of F(2x2, 3x3) in Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 4.1.
_WINOGRAD_WEIGHTS = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_FROM_WINOGRAD = ((1, 0, 0, 0), (0, 1, -1, 0), (0, 0, 0, 1))  # times G: the identity
_NETWORK = (
    "Tensor {0}weights, bool {0}bottleneck, int[] {0}layers, int[] {0}channels, int[] {0}widths, "
    "{1}int {0}winograd"
)


def walk_imagenet(
    images: Tensor,
    decisions: Tensor,
    weights: Tensor,
    bottleneck: bool,
    layers: Sequence[int],
    channels: Sequence[int],
    widths: Sequence[int],
    num_classes: int,
    winograd: int,
) -> Tensor:
    """Run an ImageNet ResNet, each image through the blocks that its decisions keep.

    An image's logits are the same, bit for bit, whatever batch it is in and however many threads
    run; with several decision sets, blocks before the sets differ are computed once.

    Args:
        images: (B, 3, H, W) float32, of any size and strides; B may be 0.
        decisions: (B, K) bool, or (S, B, K) for S sets of decisions of the same images.
        weights: float32 vector of packed weights, see the module's docstring.
        bottleneck: whether blocks are 1x1, 3x3, 1x1 convolutions; else two 3x3.
        layers: the residual blocks of each segment; K is their sum.
        channels: channels that each segment's blocks give.
        widths: channels inside each of the K blocks, that its convolutions but the last give.
        num_classes: number of classes.
        winograd: in so many first segments 3x3 convolutions of stride 1 are in Winograd's form.

    Returns:
        (B, num_classes) or (S, B, num_classes) logits.

    Raises:
        TypeError: images or weights are not float32, decisions not bool.
        ValueError: shapes that do not fit each other, or the layout above.
    """
    return torch.ops.blockdrop_fast.walk_imagenet(
        images, decisions, weights, bottleneck, layers, channels, widths, num_classes, winograd
    )


def walk_imagenet_policy(
    images: Tensor,
    weights: Tensor,
    bottleneck: bool,
    layers: Sequence[int],
    channels: Sequence[int],
    widths: Sequence[int],
    num_classes: int,
    winograd: int,
    policy_weights: Tensor,
    policy_bottleneck: bool,
    policy_layers: Sequence[int],
    policy_channels: Sequence[int],
    policy_widths: Sequence[int],
    policy_winograd: int,
    pool: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the policy network, and the backbone at its thresholded decisions.

    Args:
        images: as for ``walk_imagenet``.
        weights ... winograd: the backbone, as for ``walk_imagenet``.
        policy_weights ... policy_winograd: the policy network likewise; it has K classes.
        pool: images are average-pooled by this factor for the policy network.

    Returns:
        logits: (B, num_classes).
        decisions: (B, K) bool, True where the policy logit is >= 0.
        policy_logits: (B, K).

    Raises:
        TypeError, ValueError: as for ``walk_imagenet``, and for images smaller than ``pool``.
    """
    return torch.ops.blockdrop_fast.walk_imagenet_policy(
        images, weights, bottleneck, layers, channels, widths, num_classes, winograd,
        policy_weights, policy_bottleneck, policy_layers, policy_channels, policy_widths,
        policy_winograd, pool,
    )  # fmt: skip


# ------------------------------------------------------------------ packing


@dataclass(frozen=True)
class ConvShape:
    """A convolution of the network; of the classifier a 1x1 convolution of one pixel.

    Attributes:
        form: how it is packed: "stem", "winograd" or "blocks".
    """

    in_channels: int
    out_channels: int
    kernel: int
    stride: int = 1
    form: str = "blocks"

    def full_shape(self) -> tuple[int, int, int, int]:
        """Of packed weights: channels out and in filled up, height and width."""
        c_in = self.in_channels if self.form == "stem" else _round_up(self.in_channels)
        size = 4 if self.form == "winograd" else self.kernel
        return _round_up(self.out_channels), c_in, size, size

    def packed_size(self) -> int:
        """Packed values, with the bias."""
        c_out, c_in, height, width = self.full_shape()
        return c_out * (1 + c_in * height * width)


@dataclass(frozen=True)
class BlockShape:
    """A residual block: its convolutions, the last one behind the shortcut (None: identity)."""

    first: tuple[ConvShape, ...]
    shortcut: ConvShape | None
    last: ConvShape

    def convs(self) -> Iterator[ConvShape]:
        """In the order of packed weights."""
        yield from self.first
        if self.shortcut is not None:
            yield self.shortcut
        yield self.last


def stem_shape() -> ConvShape:
    """The stem's convolution."""
    return ConvShape(3, STEM_CHANNELS, 7, 2, "stem")


class Description(NamedTuple):
    """A network as the arguments of ``walk_imagenet`` describe it."""

    bottleneck: bool
    layers: Sequence[int]
    channels: Sequence[int]
    widths: Sequence[int]
    num_classes: int
    winograd: int

    def blocks(self) -> Iterator[BlockShape]:
        """The K residual blocks."""
        c_in, width_of = STEM_CHANNELS, iter(self.widths)
        for segment, (count, c_out) in enumerate(zip(self.layers, self.channels, strict=True)):
            form = "winograd" if segment < self.winograd else "blocks"
            for index in range(count):
                width = next(width_of)
                stride = 2 if segment > 0 and index == 0 else 1
                form_of_first = form if stride == 1 else "blocks"
                projects = stride == 2 or c_in != c_out
                shortcut = ConvShape(c_in, c_out, 1, stride) if projects else None
                if self.bottleneck:
                    middle = ConvShape(width, width, 3, stride, form_of_first)
                    first = (ConvShape(c_in, width, 1), middle)
                    yield BlockShape(first, shortcut, ConvShape(width, c_out, 1))
                else:
                    first = (ConvShape(c_in, width, 3, stride, form_of_first),)
                    yield BlockShape(first, shortcut, ConvShape(width, c_out, 3, 1, form))
                c_in = c_out

    def convs(self) -> Iterator[ConvShape]:
        """All convolutions in the order of packed weights."""
        yield stem_shape()
        for block in self.blocks():
            yield from block.convs()
        yield ConvShape(self.channels[-1], self.num_classes, 1)

    def signature(self) -> int:
        """A hash that float32 holds."""
        winograd = min(self.winograd, len(self.layers))
        lists = (*self.layers, *self.channels, *self.widths)
        return signature(self.bottleneck, self.num_classes, winograd, *lists)


def pack_conv(weight: Tensor, bias: Tensor, shape: ConvShape, out: Tensor) -> None:
    """Write a convolution to ``out`` as the kernels read it.

    Args:
        weight: (C_out, C_in, k, k).
        bias: (C_out,).
        shape: of this convolution.
        out: vector of ``shape.packed_size()``.
    """
    if shape.form == "winograd":
        transform = torch.tensor(_WINOGRAD_WEIGHTS, dtype=torch.float64)
        weight = (transform @ weight.double() @ transform.t()).to(weight.dtype)
    full = out.new_zeros(shape.full_shape())
    full[: weight.shape[0], : weight.shape[1]] = weight
    out[: len(bias)] = bias
    out[len(bias) : len(full)] = 0
    for piece, packed in _pieces(full, out[len(full) :], shape.form):
        packed.copy_(piece)


def unpack_conv(packed: Tensor, shape: ConvShape) -> tuple[Tensor, Tensor]:
    """What ``pack_conv`` has packed, in Winograd's form up to rounding: weight and bias."""
    full = packed.new_empty(shape.full_shape())
    for piece, one in _pieces(full, packed[len(full) :], shape.form):
        piece.copy_(one)
    weight = full[: shape.out_channels, : shape.in_channels]
    if shape.form == "winograd":
        back = torch.tensor(_FROM_WINOGRAD, dtype=weight.dtype)
        weight = back @ weight @ back.t()
    return weight, packed[: shape.out_channels]


def _pieces(full: Tensor, packed: Tensor, form: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of a weight (C_out, C_in, k, k), and of the same values in packed memory, in order."""
    panels = full.unflatten(0, (-1, PANEL)).permute(0, 3, 4, 2, 1)  # (panels, k, k, C_in, 32)
    pieces = [panels]
    if form == "blocks":
        pieces = [
            block[:, ky, kx, c_in : c_in + BLOCK_IN]
            for block in panels.split(BLOCK_OUT // PANEL)
            for ky in range(full.shape[2])
            for kx in range(full.shape[3])
            for c_in in range(0, full.shape[1], BLOCK_IN)
        ]
    ends = list(accumulate(piece.numel() for piece in pieces))
    for piece, end in zip(pieces, ends, strict=True):
        yield piece, packed[end - piece.numel() : end].view(piece.shape)


def _round_up(channels: int) -> int:
    return channels + -channels % PANEL


# ------------------------------------------------------------------ reference


def walk_imagenet_reference(images: Tensor, decisions: Tensor, weights: Tensor, *network) -> Tensor:
    """What ``walk_imagenet`` computes, in PyTorch; of any floating-point dtype, on any device."""
    network = Description(*network)
    _check_walk(images, decisions, weights, *network)
    parameters = _unpack("weights", weights, network)
    if decisions.ndim == 2:
        return _run_network(images, decisions, parameters, network)
    logits = [_run_network(images, one, parameters, network) for one in decisions]
    return torch.stack(logits) if logits else images.new_empty(0, len(images), network.num_classes)


def walk_imagenet_policy_reference(images: Tensor, *networks) -> tuple[Tensor, Tensor, Tensor]:
    """What ``walk_imagenet_policy`` computes, in PyTorch operations."""
    _check_policy(images, *networks)
    (weights, network), (policy_weights, policy), pool = _split(networks)
    parameters = _unpack("policy_weights", policy_weights, policy)
    policy_logits = _run_network(F.avg_pool2d(images, pool), None, parameters, policy)
    decisions = policy_logits >= 0
    logits = walk_imagenet_reference(images, decisions, weights, *network)
    return logits, decisions, policy_logits


def _run_network(
    images: Tensor,
    decisions: Tensor | None,
    parameters: Sequence[tuple[Tensor, Tensor]],
    network: Description,
) -> Tensor:
    parameters = iter(parameters)

    def convolve(x: Tensor, shape: ConvShape) -> Tensor:
        return F.conv2d(x, *next(parameters), shape.stride, padding=shape.kernel // 2)

    if len(images) == 0:
        return images.new_empty(0, network.num_classes)
    x = F.max_pool2d(F.relu(convolve(images, stem_shape())), 3, 2, 1)
    for k, block in enumerate(network.blocks()):
        kept = x
        for shape in block.first:
            kept = F.relu(convolve(kept, shape))
        shortcut = x if block.shortcut is None else convolve(x, block.shortcut)
        kept = F.relu(convolve(kept, block.last) + shortcut)
        x = kept
        if decisions is not None:
            x = torch.where(decisions[:, k, None, None, None], kept, shortcut)
    weight, bias = next(parameters)
    return F.linear(x.mean((2, 3)), weight[:, :, 0, 0], bias)


def _unpack(name: str, weights: Tensor, network: Description) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of each convolution in order."""
    check_signature(name, weights, network.signature())
    shapes = list(network.convs())
    parts = weights[:-1].split([shape.packed_size() for shape in shapes])
    return [unpack_conv(one, shape) for one, shape in zip(parts, shapes, strict=True)]


def _split(networks: tuple) -> tuple[tuple[Tensor, Description], tuple[Tensor, Description], int]:
    """Arguments of ``walk_imagenet_policy`` -> weights and description of both, ``pool``."""
    weights, *network, policy_weights = networks[:8]
    *policy, winograd, pool = networks[8:]
    network = Description(*network)
    return (
        (weights, network),
        (policy_weights, Description(*policy, sum(network.layers), winograd)),
        pool,
    )


# ------------------------------------------------------------------ checks


def _check_walk(images: Tensor, decisions: Tensor, weights: Tensor, *network) -> None:
    network = Description(*network)
    _check_images(images, weights)
    _check_network("weights", weights, network)
    check_decisions(decisions, images.shape[0], sum(network.layers))


def _check_policy(images: Tensor, *networks) -> None:
    *both, pool = _split(networks)
    for name, (weights, network) in zip(("weights", "policy_weights"), both, strict=True):
        _check_images(images, weights, name)
        _check_network(name, weights, network)
    if not 1 <= pool <= min(images.shape[2:]):
        raise ValueError(
            f"pool: expected 1 to the images' size, got {pool} for "
            f"{images.shape[2]}x{images.shape[3]}"
        )


def _check_network(name: str, weights: Tensor, network: Description) -> None:
    layers = network.layers
    if not layers:
        raise ValueError("layers: expected at least one segment, got none")
    for argument, values, count, each in (
        ("layers", layers, len(layers), "segments"),
        ("channels", network.channels, len(layers), "segments"),
        ("widths", network.widths, sum(layers), "blocks"),
    ):
        if len(values) != count or min(values) < 1:
            raise ValueError(
                f"{argument}: expected a positive number for each of {count} {each}, "
                f"got {list(values)}"
            )
    if network.num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {network.num_classes}")
    if network.winograd < 0:
        raise ValueError(f"winograd: expected at least 0 segments, got {network.winograd}")
    length = sum(shape.packed_size() for shape in network.convs()) + 1
    check_length(name, weights, length, "packed values")


def _check_images(images: Tensor, weights: Tensor, name: str = "weights") -> None:
    if images.dtype != weights.dtype:
        raise TypeError(f"images: expected dtype {weights.dtype} as {name}, got {images.dtype}")
    if not images.is_floating_point():
        raise TypeError(f"images: expected a floating-point dtype, got {images.dtype}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected shape (B, 3, H, W), got {tuple(images.shape)}")
    if min(images.shape[2:]) < 1:
        raise ValueError(
            f"images: height and width must be positive, got {images.shape[2]}x{images.shape[3]}"
        )


# ------------------------------------------------------------------ schemas


def _walk_imagenet_fake(images: Tensor, decisions: Tensor, *network) -> Tensor:
    return images.new_empty((*decisions.shape[:-1], network[5]))


def _walk_imagenet_policy_fake(images: Tensor, *networks) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_blocks = images.shape[0], sum(networks[2])
    decisions = images.new_empty((batch, num_blocks), dtype=torch.bool)
    logits = images.new_empty((batch, networks[5]))
    return logits, decisions, images.new_empty((batch, num_blocks))


_BACKBONE, _POLICY = _NETWORK.format("", "int num_classes, "), _NETWORK.format("policy_", "")
define(
    f"walk_imagenet(Tensor images, Tensor decisions, {_BACKBONE}) -> Tensor",
    walk_imagenet_reference,
    _walk_imagenet_fake,
    _check_walk,
)
define(
    f"walk_imagenet_policy(Tensor images, {_BACKBONE}, {_POLICY}, int pool)"
    " -> (Tensor logits, Tensor decisions, Tensor policy_logits)",
    walk_imagenet_policy_reference,
    _walk_imagenet_policy_fake,
    _check_policy,
)
