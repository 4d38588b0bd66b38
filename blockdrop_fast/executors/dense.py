"""Dense execution: every block for every image; given decisions, masked afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from blockdrop_fast.executors import layers
from blockdrop_fast.folding import FoldedNetwork


class DenseExecutor:
    """Computes all blocks for all images. Runs complete networks, such as the policy network."""

    def __init__(self, network: FoldedNetwork):
        self.network = network

    def run(self, images: Tensor, decisions: Tensor | None = None) -> Tensor:
        """Execute all blocks, and mask.

        Args:
            images: (B, 3, H, W).
            decisions: (B, K) bool; None keeps all blocks, and there is nothing to mask.

        Returns:
            (B, num_classes) logits.
        """
        x = layers.stem(self.network, images)
        for k, block in enumerate(self.network.blocks):
            shortcut = layers.shortcut(block, x)
            kept = layers.residual(block, x).add_(shortcut).relu_()
            if decisions is None:
                x = kept
            else:
                x = torch.where(decisions[:, k, None, None, None], kept, shortcut)
        return layers.classifier(self.network, x)

    def run_sets(self, images: Tensor, decisions: Tensor) -> Tensor:
        """(B, 3, H, W) images, (S, B, K) bool -> (S, B, num_classes) logits; nothing is shared."""
        return torch.stack([self.run(images, one) for one in decisions])
