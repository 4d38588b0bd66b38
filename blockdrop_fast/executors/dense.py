"""Dense execution: every block for every image; given decisions, masked afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from blockdrop_fast.executors import Executor
from blockdrop_fast.executors.layers import Layers
from blockdrop_fast.networks.folding import FoldedNetwork


class DenseExecutor(Executor):
    """Computes all blocks for all images. Runs complete networks, such as the policy network."""

    strategy = "dense"

    def __init__(self, network: FoldedNetwork):
        self.logits_dtype = network.fc_weight.dtype
        self._layers = Layers(network)

    def run(self, images: Tensor, decisions: Tensor) -> Tensor:
        """(B, 3, H, W) images, (B, K) bool decisions -> (B, num_classes) logits."""
        x = self._layers.stem(images)
        for k, block in enumerate(self._layers.blocks):
            shortcut = block.shortcut(x)
            keep = decisions[:, k, None, None, None]
            x = torch.where(keep, block.kept(x, shortcut), shortcut)
        return self._layers.classifier(x)

    def run_complete(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, num_classes) logits, all blocks kept: nothing to mask."""
        x = self._layers.stem(images)
        for block in self._layers.blocks:
            x = block.kept(x, block.shortcut(x))
        return self._layers.classifier(x)

    def run_sets(self, images: Tensor, decisions: Tensor) -> Tensor:
        """(B, 3, H, W) images, (S, B, K) bool -> (S, B, num_classes) logits; nothing is shared."""
        return torch.stack([self.run(images, one) for one in decisions])
