"""The walk: a whole CIFAR network image by image, each along its own path.

Kernels: ``csrc/cpu/walk.cpp``, and what it is made of beside it.

Packed weights are one float32 vector, so that a kernel finds everything by counting:

* the stem, then both convolutions of each block: the bias (C_out), then the weights
  (C_out / p, 3, 3, C_in, p) in panels of p = min(C_out, 32) output channels side by side, then, if
  C_in equals C_out, the same weights in Winograd's form (C_out / p, 4, 4, C_in, p);
* the classifier: the bias, then the weights (64, classes), with classes rounded up to a
  multiple of 16 and filled with zeros;
* the ``signature`` of ``num_classes``, ``subsample`` and ``layers``: other networks have weights as
  long as these, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdrop_fast._extension import extension_status
from blockdrop_fast.ops.walk_network import (
    WIDTHS,
    check_decisions,
    check_length,
    check_network,
    check_signature,
    conv_shapes,
    define_walk,
    run_network,
    run_policy,
    signature,
)

PANEL_CHANNELS = 32
CLASS_MULTIPLE = 16
SIZE_MULTIPLE = 4
# G of F(2x2, 3x3) in Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 4.1.
_WINOGRAD_WEIGHTS = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))


def walk(
    images: Tensor,
    decisions: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
) -> Tensor:
    """Run a CIFAR ResNet, each image through the blocks that its decisions keep.

    An image's logits are the same, bit for bit, whatever batch it is in and however many threads
    run; with several decision sets, blocks before the sets differ are computed once.

    Args:
        images: (B, 3, H, W) float32, of any strides; H and W multiples of 4; B may be 0.
        decisions: (B, K) bool, or (S, B, K) for S sets of decisions of the same images.
        weights: float32 vector of packed weights, see the module's docstring.
        layers: the residual blocks of the three segments of 16, 32 and 64 channels; K is their sum.
        num_classes: number of classes.
        subsample: shape-changing shortcuts take every second pixel and put zero channels on both
            sides; otherwise they average-pool and put zero channels behind.

    Returns:
        (B, num_classes) or (S, B, num_classes) logits.

    Raises:
        TypeError: images or weights are not float32, decisions not bool.
        ValueError: shapes that do not fit each other, or the layout above.
    """
    return torch.ops.blockdrop_fast.walk(images, decisions, weights, layers, num_classes, subsample)


def walk_policy(
    images: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
    policy_weights: Tensor,
    policy_layers: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the policy network, and the backbone at its thresholded decisions.

    Args:
        images, weights, layers, num_classes, subsample: as for ``walk``.
        policy_weights: packed like ``weights``; a network of K classes, average-pooling shortcuts.
        policy_layers: the residual blocks of the policy network's segments.

    Returns:
        logits: (B, num_classes).
        decisions: (B, K) bool, True where the policy logit is >= 0.
        policy_logits: (B, K).

    Raises:
        TypeError, ValueError: as for ``walk``.
    """
    return torch.ops.blockdrop_fast.walk_policy(
        images, weights, layers, num_classes, subsample, policy_weights, policy_layers
    )


def walk_isa() -> str:
    """The instruction set that the walk runs with here.

    Returns:
        "avx512", "avx2", "portable", or "reference" without compiled kernels. The environment
        variable BLOCKDROP_CPU_ISA chooses another than the best one, at any time.

    Raises:
        ValueError: BLOCKDROP_CPU_ISA names none of these.
        RuntimeError: it names one that this processor or build does not support.
    """
    return torch.ops.blockdrop_fast.walk_isa() if extension_status().loaded else "reference"


def pack_conv(weight: Tensor, bias: Tensor) -> Tensor:
    """(C_out, C_in, 3, 3) weight and (C_out,) bias -> vector for the kernels."""
    c_out, c_in = weight.shape[:2]
    forms = [weight]
    if c_in == c_out:
        transform = torch.tensor(_WINOGRAD_WEIGHTS, dtype=torch.float64)
        forms.append((transform @ weight.double() @ transform.t()).to(weight.dtype))
    panels = (form.unflatten(0, (-1, min(c_out, PANEL_CHANNELS))) for form in forms)
    # (panels, channel, in, ky, kx) -> (panels, ky, kx, in, channel)
    return torch.cat([bias, *(one.permute(0, 3, 4, 2, 1).flatten() for one in panels)])


def pack_classifier(weight: Tensor, bias: Tensor) -> Tensor:
    """(num_classes, 64) weight and (num_classes,) bias -> vector for the kernels."""
    extra = -len(bias) % CLASS_MULTIPLE
    return torch.cat([F.pad(bias, (0, extra)), F.pad(weight.t(), (0, extra)).flatten()])


def walk_reference(
    images: Tensor,
    decisions: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
) -> Tensor:
    """What ``walk`` computes, in PyTorch operations; of any floating-point dtype, on any device."""
    _check_walk(images, decisions, weights, layers, num_classes)
    parameters = list(unpack(weights, layers, num_classes, subsample))
    return run_network(images, decisions, parameters, layers, subsample)


def walk_policy_reference(images: Tensor, *networks) -> tuple[Tensor, Tensor, Tensor]:
    """What ``walk_policy`` computes, in PyTorch operations."""
    _check_policy(images, *networks)
    _, layers, _, _, policy_weights, policy_layers = networks
    check_signature("policy_weights", policy_weights, signature(sum(layers), False, *policy_layers))
    return run_policy(walk_reference, images, *networks)


def packed_size(convs: Iterable[tuple[int, int]], num_classes: int) -> int:
    """Of convolutions of (C_in, C_out), and a classifier."""
    values = sum(c_out * (1 + (9 + (16 if c_in == c_out else 0)) * c_in) for c_in, c_out in convs)
    return values + (1 + WIDTHS[-1]) * (num_classes + -num_classes % CLASS_MULTIPLE)


def unpack(
    weights: Tensor, layers: Sequence[int], num_classes: int, subsample: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """A network's (weight, bias) of each convolution in order, and of the classifier.

    Raises:
        ValueError: the weights are another network's.
    """
    check_signature("weights", weights, signature(num_classes, subsample, *layers))
    return unpack_layers(weights[:-1], conv_shapes(layers), num_classes)


def unpack_layers(
    weights: Tensor, convs: Iterable[tuple[int, int]], num_classes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(weight, bias) of convolutions of (C_in, C_out), and of a classifier."""
    offset = 0
    for c_in, c_out in convs:
        panel = min(c_out, PANEL_CHANNELS)
        bias = weights[offset : offset + c_out]
        offset += c_out
        packed = weights[offset : offset + 9 * c_in * c_out].view(-1, 3, 3, c_in, panel)
        offset += 9 * c_in * c_out
        if c_in == c_out:
            offset += 16 * c_in * c_out  # Winograd's form says the same again
        yield packed.permute(0, 4, 3, 1, 2).flatten(0, 1), bias
    packed = weights[offset:].view(1 + WIDTHS[-1], -1)[:, :num_classes]
    yield packed[1:].t(), packed[0]


def check(
    images: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    name: str = "weights",
) -> None:
    """Raise TypeError or ValueError unless ``walk`` takes these; ``name`` is the weights'."""
    if images.dtype != weights.dtype:
        raise TypeError(f"images: expected dtype {weights.dtype} as {name}, got {images.dtype}")
    if not images.is_floating_point():
        raise TypeError(f"images: expected a floating-point dtype, got {images.dtype}")
    check_network(images, layers, num_classes)
    if any(size == 0 or size % SIZE_MULTIPLE for size in images.shape[2:]):
        raise ValueError(
            "images: height and width must be positive multiples of 4, got "
            f"{images.shape[2]}x{images.shape[3]}"
        )
    length = packed_size(conv_shapes(layers), num_classes) + 1
    check_length(name, weights, length, "packed values")


def _check_walk(images: Tensor, decisions: Tensor, weights: Tensor, layers, num_classes, *_):
    check(images, weights, layers, num_classes)
    check_decisions(decisions, images.shape[0], sum(layers))


def _check_policy(
    images: Tensor, weights, layers, num_classes, _subsample, policy_weights, policy_layers
):
    check(images, weights, layers, num_classes)
    check(images, policy_weights, policy_layers, sum(layers), "policy_weights")


define_walk("walk", (walk_reference, walk_policy_reference), (_check_walk, _check_policy))
