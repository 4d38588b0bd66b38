"""Dense execution: every block for every image; given decisions, masked afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from blockdrop_fast.executors import layers
from blockdrop_fast.folding import FoldedNetwork
from blockdrop_fast.plan import Plan


class DenseExecutor:
    """Computes all blocks for all images. Runs complete networks, such as the policy network."""

    def __init__(self, network: FoldedNetwork):
        self.network = network

    def run(self, images: Tensor, plan: Plan | None = None) -> Tensor:
        """(B, 3, H, W) images -> (B, num_classes) logits; ``plan`` None keeps all blocks."""
        x = layers.stem(self.network, images)
        for k, block in enumerate(self.network.blocks):
            shortcut = layers.shortcut(block, x)
            kept = layers.residual(block, x).add_(shortcut).relu_()
            if plan is None:
                x = kept
            else:
                x = torch.where(plan.decisions[:, k, None, None, None], kept, shortcut)
        return layers.classifier(self.network, x)
