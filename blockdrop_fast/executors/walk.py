"""Walk execution: image-major, each image along its own path, as one operator."""

from __future__ import annotations

import torch
from torch import Tensor

from blockdrop_fast.networks.folding import FoldedNetwork
from blockdrop_fast.ops.walk import WIDTHS, pack_classifier, pack_conv, walk, walk_policy


class WalkExecutor:
    """Packs a CIFAR network for the walk and runs it.

    Args:
        network: folded; three segments of basic blocks of 16, 32 and 64 channels, the CIFAR stem,
            shortcuts without parameters; float32 on the CPU.
        policy: such a network too, with average-pooling shortcuts and an output a block of
            ``network``; None if decisions always come from elsewhere.

    Raises:
        TypeError: weights of another dtype than float32.
        ValueError: another architecture or device; the message says which part does not fit.
    """

    def __init__(self, network: FoldedNetwork, policy: FoldedNetwork | None = None):
        _check_supported("network", network)
        config = network.config
        self._network = (
            _pack(network),
            config.layers,
            config.num_classes,
            config.shortcut == "subsample",
        )
        self._num_blocks = config.num_blocks
        self._policy = None
        if policy is not None:
            self.set_policy(policy)

    def set_policy(self, policy: FoldedNetwork) -> None:
        """Take ``policy`` as the network that ``run_policy`` decides by.

        Raises:
            TypeError, ValueError: as of the constructor.
        """
        _check_supported("policy", policy)
        check_policy(policy, self._num_blocks)
        self._policy = (_pack(policy), policy.config.layers)

    def run(self, images: Tensor, decisions: Tensor) -> Tensor:
        """Execute decisions from anywhere.

        Args:
            images: (B, 3, H, W) float32; H and W multiples of 4.
            decisions: (B, K) bool.

        Returns:
            (B, num_classes) logits.
        """
        return walk(images, decisions, *self._network)

    def run_sets(self, images: Tensor, decisions: Tensor) -> Tensor:
        """(B, 3, H, W) images, (S, B, K) bool -> (S, B, num_classes) logits, prefixes shared."""
        return walk(images, decisions, *self._network)

    def run_policy(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decide and execute.

        Returns:
            logits (B, num_classes), decisions (B, K) bool, policy logits (B, K).

        Raises:
            RuntimeError: there is no policy.
        """
        if self._policy is None:
            raise RuntimeError("run_policy: this executor was made without a policy network")
        return walk_policy(images, *self._network, *self._policy)


def check_architecture(name: str, network: FoldedNetwork) -> None:
    """Raise ValueError unless a walk can run the network; ``name`` is the argument's."""
    config = network.config
    expectations = (
        ("block", config.block, "basic"),
        ("stem", config.stem, "cifar"),
        ("widths", config.widths, WIDTHS),
    )
    for field, value, expected in expectations:
        if value != expected:
            raise ValueError(f"{name}: the walk supports {field} {expected!r} only, got {value!r}")
    if config.shortcut == "projection":
        raise ValueError(
            f"{name}: the walk supports shortcuts 'average_pool' and 'subsample' only, "
            "got 'projection'"
        )


def check_policy(policy: FoldedNetwork, num_blocks: int) -> None:
    """Raise ValueError unless a policy network that a walk can run decides on ``num_blocks``."""
    config = policy.config
    if config.shortcut != "average_pool":
        raise ValueError(f"policy: expected shortcut 'average_pool', got {config.shortcut!r}")
    if config.num_classes != num_blocks:
        raise ValueError(
            f"policy: decides on {config.num_classes} blocks, but the network has {num_blocks}"
        )


def _check_supported(name: str, network: FoldedNetwork) -> None:
    check_architecture(name, network)
    weight = network.stem.weight
    if weight.dtype != torch.float32:
        raise TypeError(f"{name}: the walk supports torch.float32 only, got {weight.dtype}")
    if weight.device.type != "cpu":
        raise ValueError(f"{name}: this walk runs on the CPU only, got {weight.device}")


def _pack(network: FoldedNetwork) -> Tensor:
    convs = [network.stem, *(conv for block in network.blocks for conv in block.convs)]
    return torch.cat(
        [
            *(pack_conv(conv.weight, conv.bias) for conv in convs),
            pack_classifier(network.fc_weight, network.fc_bias),
        ]
    )
