"""What the walks share: the network that they run, what they compute, and their schemas.

The network is a CIFAR ResNet with batch norm folded into its convolutions: a stem of 16 channels,
three segments of basic blocks of 16, 32 and 64 channels, and a classifier of the last segment's
mean. The first block of the second and third segment halves height and width; its shortcut has no
parameters. A walk's own are the packing of the weights and the precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdrop_fast.ops._library import LIBRARY, REFERENCE

WIDTHS = (16, 32, 64)
IMAGE_CHANNELS = 3
_NETWORK = "Tensor weights, int[] layers, int num_classes, bool subsample"


def conv_shapes(layers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(C_in, C_out) of the stem and of the blocks' convolutions, in the order of packed weights."""
    yield IMAGE_CHANNELS, WIDTHS[0]
    channels = WIDTHS[0]
    for width, num_blocks in zip(WIDTHS, layers, strict=True):
        for _ in range(num_blocks):
            yield channels, width
            yield width, width
            channels = width


def run_network(
    images: Tensor,
    decisions: Tensor,
    parameters: Sequence[tuple[Tensor, Tensor]],
    layers: Sequence[int],
    subsample: bool,
) -> Tensor:
    """What a walk computes: in the parameters' dtype, activations rounded to the images'.

    Args:
        images, decisions, layers, subsample: as for ``blockdrop_fast.ops.walk``.
        parameters: (weight, bias) of each convolution in order, and of the classifier.

    Returns:
        (B, num_classes) or (S, B, num_classes) logits of the parameters' dtype.
    """
    classifier = parameters[-1]
    if decisions.ndim == 3:
        arguments = (parameters, layers, subsample)
        if len(decisions) == 0:
            return classifier[0].new_empty(0, len(images), len(classifier[0]))
        return torch.stack([run_network(images, one, *arguments) for one in decisions])
    dtype, exact = images.dtype, classifier[0].dtype
    convs = iter(parameters[:-1])

    def convolve(x: Tensor, stride: int = 1, residual: Tensor | float = 0.0) -> Tensor:
        sums = F.conv2d(x.to(exact), *next(convs), stride, padding=1)
        return F.relu(sums + residual).to(dtype)

    x = convolve(images)
    block = 0
    for segment, num_blocks in enumerate(layers):
        for index in range(num_blocks):
            stride = 2 if segment > 0 and index == 0 else 1
            shortcut = x
            if stride == 2:
                shortcut = shape_changing_shortcut(x.to(exact), subsample).to(dtype)
            kept = convolve(convolve(x, stride), residual=shortcut)
            x = torch.where(decisions[:, block, None, None, None], kept, shortcut)
            block += 1
    return F.linear(x.to(exact).mean((2, 3)), *classifier)


def shape_changing_shortcut(x: Tensor, subsample: bool) -> Tensor:
    """(B, C, H, W) -> (B, 2 C, H / 2, W / 2), of either kind; see ``blockdrop_fast.ops.walk``."""
    extra = x.shape[1]
    if subsample:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra // 2, extra // 2))
    return F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, extra))


def run_policy(
    walk: Callable[..., Tensor],
    images: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
    policy_weights: Tensor,
    policy_layers: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """The policy network by ``walk``, then the backbone where its logits are not negative."""
    keep_all = images.new_ones((len(images), sum(policy_layers)), dtype=torch.bool)
    policy_logits = walk(images, keep_all, policy_weights, policy_layers, sum(layers), False)
    decisions = policy_logits >= 0
    logits = walk(images, decisions, weights, layers, num_classes, subsample)
    return logits, decisions, policy_logits


def check_network(
    images: Tensor, decisions: Tensor, layers: Sequence[int], num_classes: int
) -> None:
    """Raise TypeError or ValueError unless these can be a walk's, of any size and precision."""
    if images.ndim != 4 or images.shape[1] != IMAGE_CHANNELS:
        raise ValueError(f"images: expected shape (B, 3, H, W), got {tuple(images.shape)}")
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


def check_length(name: str, vector: Tensor, length: int, of: str = "values") -> None:
    """Raise ValueError unless ``vector`` is one of ``length`` values."""
    if vector.shape != (length,):
        raise ValueError(
            f"{name}: expected a vector of {length} {of}, got shape {tuple(vector.shape)}"
        )


def define_walk(
    name: str, reference: Callable, policy_reference: Callable, options: str = ""
) -> None:
    """Define the operators ``name`` and ``name_policy``, with references and shape functions."""
    schemas = (
        f"{name}(Tensor images, Tensor decisions, {_NETWORK}{options}) -> Tensor",
        f"{name}_policy(Tensor images, {_NETWORK}, Tensor policy_weights, int[] policy_layers)"
        " -> (Tensor logits, Tensor decisions, Tensor policy_logits)",
    )
    for schema in schemas:
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for operator, kernel, fake in (
        (name, reference, _walk_fake),
        (f"{name}_policy", policy_reference, _walk_policy_fake),
    ):
        LIBRARY.impl(operator, kernel, REFERENCE)
        torch.library.register_fake(f"blockdrop_fast::{operator}", fake, lib=LIBRARY)


def _walk_fake(images: Tensor, decisions: Tensor, _weights, _layers, num_classes, *_) -> Tensor:
    return _new_logits(images, (*decisions.shape[:-1], num_classes))


def _walk_policy_fake(
    images: Tensor, _weights, layers, num_classes, *_
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_blocks = images.shape[0], sum(layers)
    decisions = images.new_empty((batch, num_blocks), dtype=torch.bool)
    logits = _new_logits(images, (batch, num_classes))
    return logits, decisions, _new_logits(images, (batch, num_blocks))


def _new_logits(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    return images.new_empty(shape, dtype=torch.promote_types(images.dtype, torch.float32))
