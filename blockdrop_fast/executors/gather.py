"""Gather execution: block-major, each block on its active images only."""

from __future__ import annotations

import torch
from torch import Tensor

from blockdrop_fast.executors import layers
from blockdrop_fast.folding import FoldedBlock, FoldedNetwork
from blockdrop_fast.models import take_images
from blockdrop_fast.plan import Plan, plan, plan_sets


class GatherExecutor:
    """Gathers a block's active images, runs the block on them, puts the results back in place.

    A block that no image keeps costs nothing (a shape-changing shortcut still runs); one that
    all images keep runs without gathering.
    """

    def __init__(self, network: FoldedNetwork):
        self.network = network

    def run(self, images: Tensor, decisions: Tensor) -> Tensor:
        """(B, 3, H, W) images and their (B, K) bool decisions -> (B, num_classes) logits."""
        planned = plan(decisions)
        x = layers.stem(self.network, images)
        for k, block in enumerate(self.network.blocks):
            x = _run_block(block, x, planned, k)
        return layers.classifier(self.network, x)

    def run_sets(self, images: Tensor, decisions: Tensor) -> Tensor:
        """(B, 3, H, W) images, (S, B, K) bool -> (S, B, num_classes) logits, prefixes shared."""
        planned = plan_sets(decisions)
        x = layers.stem(self.network, images)
        for k, block in enumerate(self.network.blocks):
            parents = planned.fork_parents[k]
            if parents.numel():
                x = torch.cat([x, take_images(x, parents)])
            x = _run_block(block, x, planned.plan, k)
        return layers.classifier(self.network, x)[planned.rows]


def _run_block(block: FoldedBlock, x: Tensor, plan: Plan, k: int) -> Tensor:
    """Block k on the active rows of x; x belongs to the caller no more (updated in place)."""
    count = plan.host_counts[k]
    shortcut = layers.shortcut(block, x)
    if count == 0:
        return shortcut
    if count == x.shape[0]:
        return layers.residual(block, x).add_(shortcut).relu_()
    active = plan.active(k)
    kept = layers.residual(block, take_images(x, active))
    kept.add_(take_images(shortcut, active)).relu_()
    # The indices are unique, so a plain in-place store puts the rows back.
    shortcut.permute(0, 2, 3, 1).index_copy_(0, active.long(), kept.permute(0, 2, 3, 1))
    return shortcut
