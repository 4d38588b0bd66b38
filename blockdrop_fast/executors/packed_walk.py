"""What the executors of the walk share: packed networks, and a policy network that decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from blockdrop_fast.networks.folding import FoldedNetwork
from blockdrop_fast.ops.walk_network import WIDTHS


class PackedWalk(ABC):
    """Packs a CIFAR network for an operator that walks, and takes a policy network beside it.

    Args:
        network: folded; three segments of basic blocks of 16, 32 and 64 channels, the CIFAR stem,
            shortcuts without parameters; of a dtype and on a device that the operator serves.

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
        """Take ``policy`` as the network that ``run_policy`` decides by, if the operator can.

        Args:
            policy: folded, with an output a block.
            pool: images are average-pooled by this factor first.

        Returns:
            Whether it can: without pooling, a network as the constructor takes them, with
            average-pooling shortcuts.
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

    @abstractmethod
    def run(self, images: Tensor, decisions: Tensor) -> Tensor:
        """(B, 3, H, W) images and their (B, K) bool decisions -> (B, num_classes) logits."""

    @abstractmethod
    def run_sets(self, images: Tensor, decisions: Tensor) -> Tensor:
        """(B, 3, H, W) images, (S, B, K) bool -> (S, B, num_classes) logits, prefixes shared."""

    def run_policy(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Decide and execute: (B, 3, H, W) images -> (B, num_classes) logits, (B, K) decisions.

        Raises:
            RuntimeError: ``set_policy`` has not taken a policy network.
        """
        if self._policy is None:
            raise RuntimeError("run_policy: this executor is without a policy network")
        return self._run_policy(images)

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
        parts = [cls._pack_conv(conv.weight, conv.bias) for conv in convs]
        return torch.cat([*parts, cls._pack_classifier(network.fc_weight, network.fc_bias)])
