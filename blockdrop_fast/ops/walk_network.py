"""What the walks share: the network that they run, what they compute, and their schemas.

The network is a CIFAR ResNet with batch norm folded into its convolutions: a stem of 16 channels,
three segments of basic blocks of 16, 32 and 64 channels, and a classifier of the last segment's
mean. The first block of the second and third segment halves height and width; its shortcut has no
parameters. A walk's own are the packing of the weights and the precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdrop_fast.ops._library import define

WIDTHS = (16, 32, 64)
MOST_BLOCKS = 2**16  # of a segment: more than any network has, few enough to be counted one by one
IMAGE_CHANNELS = 3
SIGNATURES = 16_777_213  # the largest prime below 2^24
NETWORK = "Tensor weights, int[] layers, int num_classes, bool subsample"


def conv_shapes(layers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(C_in, C_out) of the stem and of the blocks' convolutions, in the order of packed weights."""
    yield IMAGE_CHANNELS, WIDTHS[0]
    channels = WIDTHS[0]
    for width, num_blocks in zip(WIDTHS, layers, strict=True):
        for _ in range(num_blocks):
            yield channels, width
            yield width, width
            channels = width


class ReferenceNetwork:
    """The layers that a walk's reference is made of.

    In the parameters' dtype, activations rounded to the images'.

    Args:
        parameters: (weight, bias) of each convolution in order, and of the classifier.
        layers, subsample: as for ``blockdrop_fast.ops.walk``.
        dtype: of the images.

    Attributes:
        layers: as above.
        num_blocks: K.
        exact: the parameters' dtype.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[Tensor, Tensor]],
        layers: Sequence[int],
        subsample: bool,
        dtype: torch.dtype,
    ):
        *self._convs, self._classifier = parameters
        self._subsample, self._dtype = subsample, dtype
        self.layers, self.num_blocks = tuple(layers), sum(layers)
        self.exact = self._classifier[0].dtype
        starts = list(accumulate(self.layers, initial=0))
        self._shape_changing = set(starts[1:-1])

    def stem(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 16, H, W), the input of the first block."""
        return self._convolve(0, images)

    def block(self, block: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a block, counted from 0, gives for its input: kept, and dropped."""
        stride = 2 if block in self._shape_changing else 1
        shortcut = x
        if stride == 2:
            shortcut = shape_changing_shortcut(x.to(self.exact), self._subsample).to(self._dtype)
        hidden = self._convolve(1 + 2 * block, x, stride)
        return self._convolve(2 + 2 * block, hidden, residual=shortcut), shortcut

    def run_block(self, block: int, x: Tensor, keep: Tensor) -> Tensor:
        """A block's output; ``keep`` is (B,) bool."""
        kept, dropped = self.block(block, x)
        return torch.where(keep[:, None, None, None], kept, dropped)

    def pooled(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C), the means over pixels."""
        return x.to(self.exact).mean((2, 3))

    def classify(self, x: Tensor) -> Tensor:
        """(B, 64, H / 4, W / 4) -> (B, num_classes) logits of the parameters' dtype."""
        return F.linear(self.pooled(x), *self._classifier)

    def _convolve(
        self, index: int, x: Tensor, stride: int = 1, residual: Tensor | float = 0.0
    ) -> Tensor:
        sums = F.conv2d(x.to(self.exact), *self._convs[index], stride, padding=1)
        return F.relu(sums + residual).to(self._dtype)


def run_network(
    images: Tensor,
    decisions: Tensor,
    parameters: Sequence[tuple[Tensor, Tensor]],
    layers: Sequence[int],
    subsample: bool,
) -> Tensor:
    """What a walk computes.

    Args:
        images, decisions, layers, subsample: as for ``blockdrop_fast.ops.walk``.
        parameters: as of ``ReferenceNetwork``.

    Returns:
        (B, num_classes) or (S, B, num_classes) logits of the parameters' dtype.
    """
    if decisions.ndim == 3:
        arguments = (parameters, layers, subsample)
        classifier = parameters[-1][0]
        if len(decisions) == 0:
            return classifier.new_empty(0, len(images), len(classifier))
        return torch.stack([run_network(images, one, *arguments) for one in decisions])
    network = ReferenceNetwork(parameters, layers, subsample, images.dtype)
    x = network.stem(images)
    for block in range(network.num_blocks):
        x = network.run_block(block, x, decisions[:, block])
    return network.classify(x)


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


def check_network(images: Tensor, layers: Sequence[int], num_classes: int) -> None:
    """Raise ValueError unless these can be a walk's, of any size."""
    if images.ndim != 4 or images.shape[1] != IMAGE_CHANNELS:
        raise ValueError(f"images: expected shape (B, 3, H, W), got {tuple(images.shape)}")
    if len(layers) != len(WIDTHS) or not 1 <= min(layers) <= max(layers) <= MOST_BLOCKS:
        raise ValueError(f"layers: expected at least one block in 3 segments, got {list(layers)}")
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")


def check_decisions(decisions: Tensor, batch: int, num_blocks: int) -> None:
    """Raise TypeError or ValueError unless these can be a walk's."""
    if decisions.dtype != torch.bool:
        raise TypeError(f"decisions: expected dtype torch.bool, got {decisions.dtype}")
    if decisions.ndim not in (2, 3) or decisions.shape[-2:] != (batch, num_blocks):
        raise ValueError(
            f"decisions: expected shape (B, K) or (S, B, K) with B = {batch} and "
            f"K = {num_blocks}, got {tuple(decisions.shape)}"
        )


def check_length(name: str, vector: Tensor, length: int, of: str = "values") -> None:
    """Raise ValueError unless ``vector`` is one of ``length`` values."""
    if vector.shape != (length,):
        raise ValueError(
            f"{name}: expected a vector of {length} {of}, got shape {tuple(vector.shape)}"
        )


def signature(*description: int) -> int:
    """A hash of the numbers that describe a network, of those that float32 holds.

    The last value of packed weights, as those of other networks may be as long.
    """
    value = 0
    for one in description:
        value = (value * 1_000_003 + one) % SIGNATURES
    return value


def check_signature(name: str, weights: Tensor, expected: int) -> None:
    """Raise ValueError unless packed weights end with this ``signature``."""
    if weights[-1] != weights.new_tensor(expected):
        raise ValueError(f"{name}: packed for another network than the arguments say")


def define_walk(
    name: str,
    references: tuple[Callable, Callable],
    checks: tuple[Callable, Callable],
    options: str = "",
) -> None:
    """Define the operators ``name`` and ``name_policy``.

    Args:
        references, checks: of both, see ``_library.define``.
        options: further arguments of the first.
    """
    define(
        f"{name}(Tensor images, Tensor decisions, {NETWORK}{options}) -> Tensor",
        references[0],
        _walk_fake,
        checks[0],
    )
    define(
        f"{name}_policy(Tensor images, {NETWORK}, Tensor policy_weights, int[] policy_layers)"
        " -> (Tensor logits, Tensor decisions, Tensor policy_logits)",
        references[1],
        _walk_policy_fake,
        checks[1],
    )


def _walk_fake(images: Tensor, decisions: Tensor, _weights, _layers, num_classes, *_) -> Tensor:
    return new_logits(images, (*decisions.shape[:-1], num_classes))


def _walk_policy_fake(
    images: Tensor, _weights, layers, num_classes, *_
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_blocks = images.shape[0], sum(layers)
    decisions = images.new_empty((batch, num_blocks), dtype=torch.bool)
    logits = new_logits(images, (batch, num_classes))
    return logits, decisions, new_logits(images, (batch, num_blocks))


def new_logits(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Of the dtype that a walk of these images gives."""
    return images.new_empty(shape, dtype=torch.promote_types(images.dtype, torch.float32))
