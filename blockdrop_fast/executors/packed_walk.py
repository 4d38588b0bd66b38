"""What the executors of the walk share: packed networks, and a policy network that decides."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdrop_fast.executors import Executor
from blockdrop_fast.networks.folding import FoldedConv, FoldedNetwork
from blockdrop_fast.ops.walk_network import WIDTHS, conv_shapes


class PackedWalk(Executor):
    """Packs a CIFAR network for an operator that walks, and takes a policy network beside it.

    Args:
        network: folded; three segments of basic blocks of 16, 32 and 64 channels, the CIFAR stem,
            shortcuts without parameters; of a dtype and on a device that the operator serves.
            Blocks that are narrower inside are padded with zeros, and take no less time.

    Raises:
        TypeError: weights of another dtype.
        ValueError: another architecture or device; the message says which part does not fit.
    """

    strategy = "walk"
    logits_dtype = torch.float32
    # The operator's own: (weight, bias) -> packed.
    _pack_conv: Callable[[Tensor, Tensor], Tensor]
    _pack_classifier: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, network: FoldedNetwork):
        self._check_network(network)
        config = network.config
        self._network = (
            self.pack(network),
            config.layers,
            config.num_classes,
            config.shortcut == "subsample",
        )
        self._num_blocks = config.num_blocks
        self._policy: tuple[Tensor, tuple[int, ...]] | None = None

    def set_policy(self, policy: FoldedNetwork, pool: int) -> bool:
        """Take ``policy`` if the operator can run it, see ``Executor``.

        It can without pooling, a network as the constructor takes them, with average-pooling
        shortcuts.
        """
        self._policy = None
        config = policy.config
        fits = config.shortcut == "average_pool" and config.num_classes == self._num_blocks
        if pool != 1 or not fits:
            return False
        try:
            self._check_network(policy)
        except (TypeError, ValueError):
            return False
        self._policy = (self.pack(policy), config.layers)
        return True

    def run_policy(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Decide and execute, see ``Executor``."""
        return super().run_policy(images) if self._policy is None else self._run_policy(images)

    @abstractmethod
    def _run_policy(self, images: Tensor) -> tuple[Tensor, Tensor]: ...

    @staticmethod
    @abstractmethod
    def _check_weight(weight: Tensor) -> None:
        """Raise TypeError or ValueError unless the operator serves its dtype and device."""

    def _check_network(self, network: FoldedNetwork) -> None:
        config = network.config
        expectations = (
            ("block", config.block, "basic"),
            ("stem", config.stem, "cifar"),
            ("widths", config.widths, WIDTHS),
        )
        for field, value, expected in expectations:
            if value != expected:
                raise ValueError(
                    f"network: the walk supports {field} {expected!r} only, got {value!r}"
                )
        widths = [width for width, n in zip(WIDTHS, config.layers, strict=True) for _ in range(n)]
        if any(have > most for have, most in zip(config.inner_widths, widths, strict=True)):
            raise ValueError(
                f"network: the walk supports up to {WIDTHS} channels inside blocks only, got "
                f"{config.inner_widths}"
            )
        if config.shortcut == "projection":
            raise ValueError(
                "network: the walk supports shortcuts 'average_pool' and 'subsample' only, "
                "got 'projection'"
            )
        self._check_weight(network.stem.weight)

    @classmethod
    def pack(cls, network: FoldedNetwork) -> Tensor:
        """The network's weights, packed for the operator."""
        convs = [network.stem, *(conv for block in network.blocks for conv in block.convs)]
        parts = [
            cls._pack_conv(*_padded(conv, *shape))
            for conv, shape in zip(convs, conv_shapes(network.config.layers), strict=True)
        ]
        return torch.cat([*parts, cls._pack_classifier(network.fc_weight, network.fc_bias)])


def _padded(conv: FoldedConv, channels_in: int, channels_out: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution, with channels of zeros up to so many."""
    missing_out = channels_out - conv.weight.shape[0]
    missing_in = channels_in - conv.weight.shape[1]
    if missing_out == missing_in == 0:
        return conv.weight, conv.bias
    weight = F.pad(conv.weight, (0, 0, 0, 0, 0, missing_in, 0, missing_out))
    return weight, F.pad(conv.bias, (0, missing_out))
