"""Walk execution with 16-bit weights and activations: on a GPU one kernel launch a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from blockdrop_fast.executors.dense import DenseExecutor
from blockdrop_fast.executors.gather import GatherExecutor
from blockdrop_fast.executors.packed_walk import PackedWalk
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

# Thread blocks of the kernel that a multiprocessor runs at once: see csrc/cuda/walk_half_launch.cu.
_RESIDENT = 2


class WalkHalfExecutor(PackedWalk):
    """Runs a CIFAR network of bfloat16 or float16 by the 16-bit walk.

    Arguments and errors are those of ``PackedWalk``. Images of other sizes than 32x32 run block by
    block, by gather. Without CUDA kernels, and on CPUs, the operator's slow reference runs. Logits
    are float32 always.
    """

    _pack_conv = staticmethod(pack_conv)
    _pack_classifier = staticmethod(pack_classifier)

    def __init__(self, network: FoldedNetwork):
        super().__init__(network)
        device = network.stem.weight.device
        self._other_sizes = GatherExecutor(network)
        self._resident = None
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self._resident = _RESIDENT * properties.multi_processor_count

    def set_policy(self, policy: FoldedNetwork, pool: int) -> bool:
        decides = super().set_policy(policy, pool)
        self._policy_of_other_sizes = DenseExecutor(policy) if decides else None
        return decides

    def run(self, images: Tensor, decisions: Tensor) -> Tensor:
        if _is_walked(images):
            return walk_half(images, decisions, *self._network, self._order(decisions))
        run = self._other_sizes.run if decisions.ndim == 2 else self._other_sizes.run_sets
        return run(images, decisions).float()

    run_sets = run

    def run_weighted(self, images: Tensor, decisions: Tensor, weights: Tensor) -> Tensor:
        return self._other_sizes.run_weighted(images, decisions, weights).float()

    def _run_policy(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if _is_walked(images):
            return walk_half_policy(images, *self._network, *self._policy)[:2]
        everything = images.new_ones((len(images), sum(self._policy[1])), dtype=torch.bool)
        decisions = self._policy_of_other_sizes.run(images, everything) >= 0
        return self.run(images, decisions), decisions

    def _order(self, decisions: Tensor) -> Tensor | None:
        """The longest paths first, if not all of them begin at once."""
        if self._resident is None or decisions.shape[:-1].numel() <= self._resident:
            return None
        return plan(decisions.flatten(0, -2))[2]

    @staticmethod
    def _check_weight(weight: Tensor) -> None:
        if weight.dtype not in DTYPES:
            raise TypeError(
                "network: the walk on a GPU supports torch.bfloat16 and torch.float16 only, "
                f"got {weight.dtype}"
            )


def _is_walked(images: Tensor) -> bool:
    return images.shape[2:] == (IMAGE_SIZE, IMAGE_SIZE)
