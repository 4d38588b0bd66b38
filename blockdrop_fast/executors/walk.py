"""Walk execution: image-major, each image along its own path, as one operator."""

from __future__ import annotations

import torch
from torch import Tensor

from blockdrop_fast.executors.gather import GatherExecutor
from blockdrop_fast.executors.packed_walk import PackedWalk
from blockdrop_fast.networks.folding import FoldedNetwork
from blockdrop_fast.ops.walk import pack_classifier, pack_conv, walk, walk_policy


class WalkExecutor(PackedWalk):
    """Runs a CIFAR network of float32 on the CPU by the walk.

    Arguments and errors are those of ``PackedWalk``; images are float32, their height and width
    multiples of 4.
    """

    _pack_conv = staticmethod(pack_conv)
    _pack_classifier = staticmethod(pack_classifier)

    def __init__(self, network: FoldedNetwork):
        super().__init__(network)
        self._block_major = GatherExecutor(network)

    def run(self, images: Tensor, decisions: Tensor) -> Tensor:
        return walk(images, decisions, *self._network)

    run_sets = run

    def run_weighted(self, images: Tensor, decisions: Tensor, weights: Tensor) -> Tensor:
        return self._block_major.run_weighted(images, decisions, weights)

    def _run_policy(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return walk_policy(images, *self._network, *self._policy)[:2]

    @staticmethod
    def _check_weight(weight: Tensor) -> None:
        if weight.dtype != torch.float32:
            raise TypeError(f"network: the walk supports torch.float32 only, got {weight.dtype}")
        if weight.device.type != "cpu":
            raise ValueError(f"network: this walk runs on the CPU only, got {weight.device}")
