"""Walk execution with 16-bit weights and activations: on a GPU one kernel launch a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from blockdrop_fast.executors.dense import DenseExecutor
from blockdrop_fast.executors.gather import GatherExecutor
from blockdrop_fast.executors.walk import check_architecture, check_policy
from blockdrop_fast.networks.folding import FoldedNetwork
from blockdrop_fast.ops.plan import plan
from blockdrop_fast.ops.walk_half import (
    DTYPES,
    IMAGE_SIZE,
    pack_classifier,
    pack_conv,
    walk_half,
    walk_half_policy,
)

# Thread blocks of the kernel that a multiprocessor runs at once: see csrc/cuda/walk.cu.
_RESIDENT = 2


class WalkHalfExecutor:
    """Packs a CIFAR network for the 16-bit walk and runs it.

    Images of other sizes than 32x32 run block by block, by gather. Without CUDA kernels, and on
    CPUs, the operator's slow reference runs. Logits are float32 always.

    Args:
        network: folded; three segments of basic blocks of 16, 32 and 64 channels, the CIFAR stem,
            shortcuts without parameters; bfloat16 or float16.
        policy: such a network too, with average-pooling shortcuts and an output a block of
            ``network``; None if decisions always come from elsewhere.

    Raises:
        TypeError: weights of another dtype.
        ValueError: another architecture; the message says which part does not fit.
    """

    def __init__(self, network: FoldedNetwork, policy: FoldedNetwork | None = None):
        _check_supported("network", network)
        config, device = network.config, network.stem.weight.device
        self._network = (
            _pack(network),
            config.layers,
            config.num_classes,
            config.shortcut == "subsample",
        )
        self._num_blocks = config.num_blocks
        self._other_sizes = GatherExecutor(network)
        self._resident = None
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self._resident = _RESIDENT * properties.multi_processor_count
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
        self._policy_of_other_sizes = DenseExecutor(policy)

    def run(self, images: Tensor, decisions: Tensor) -> Tensor:
        """Execute decisions from anywhere.

        Args:
            images: (B, 3, H, W) of the network's dtype.
            decisions: (B, K) bool, or (S, B, K) for S sets of decisions of the same images.

        Returns:
            (B, num_classes) or (S, B, num_classes) float32 logits.
        """
        if _is_walked(images):
            return walk_half(images, decisions, *self._network, self._order(decisions))
        run = self._other_sizes.run if decisions.ndim == 2 else self._other_sizes.run_sets
        return run(images, decisions).float()

    run_sets = run

    def run_policy(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decide and execute.

        Returns:
            logits (B, num_classes) float32, decisions (B, K) bool, policy logits (B, K) float32.

        Raises:
            RuntimeError: there is no policy.
        """
        if self._policy is None:
            raise RuntimeError("run_policy: this executor was made without a policy network")
        if _is_walked(images):
            return walk_half_policy(images, *self._network, *self._policy)
        everything = images.new_ones((len(images), sum(self._policy[1])), dtype=torch.bool)
        policy_logits = self._policy_of_other_sizes.run(images, everything).float()
        decisions = policy_logits >= 0
        return self.run(images, decisions), decisions, policy_logits

    def _order(self, decisions: Tensor) -> Tensor | None:
        """The longest paths first, if not all of them begin at once."""
        if self._resident is None or decisions.shape[:-1].numel() <= self._resident:
            return None
        return plan(decisions.flatten(0, -2))[2]


def _is_walked(images: Tensor) -> bool:
    return images.shape[2:] == (IMAGE_SIZE, IMAGE_SIZE)


def _check_supported(name: str, network: FoldedNetwork) -> None:
    check_architecture(name, network)
    dtype = network.stem.weight.dtype
    if dtype not in DTYPES:
        raise TypeError(
            f"{name}: the walk on a GPU supports torch.bfloat16 and torch.float16 only, got {dtype}"
        )


def _pack(network: FoldedNetwork) -> Tensor:
    convs = [network.stem, *(conv for block in network.blocks for conv in block.convs)]
    return torch.cat(
        [
            *(pack_conv(conv.weight, conv.bias) for conv in convs),
            pack_classifier(network.fc_weight, network.fc_bias),
        ]
    )
