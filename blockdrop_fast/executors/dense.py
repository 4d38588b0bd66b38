"""Dense execution: every block for every image; given decisions, masked afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from blockdrop_fast.executors.layers import Layers
from blockdrop_fast.networks.folding import FoldedNetwork


class DenseExecutor:
    """Computes all blocks for all images. Runs complete networks, such as the policy network."""

    def __init__(self, network: FoldedNetwork):
        self._layers = Layers(network)

    def run(self, images: Tensor, decisions: Tensor | None = None) -> Tensor:
        """Execute all blocks, and mask.

        Args:
            images: (B, 3, H, W).
            decisions: (B, K) bool; None keeps all blocks, and there is nothing to mask.

        Returns:
            (B, num_classes) logits.
        """
        x = self._layers.stem(images)
        for k, block in enumerate(self._layers.blocks):
            shortcut = block.shortcut(x)
            kept = block.kept(x, shortcut)
            if decisions is None:
                x = kept
            else:
                x = torch.where(decisions[:, k, None, None, None], kept, shortcut)
        return self._layers.classifier(x)

    def run_sets(self, images: Tensor, decisions: Tensor) -> Tensor:
        """(B, 3, H, W) images, (S, B, K) bool -> (S, B, num_classes) logits; nothing is shared."""
        return torch.stack([self.run(images, one) for one in decisions])
