"""Dense execution: every block for every image; given decisions, masked afterwards."""

from __future__ import annotations

from functools import partial
from itertools import islice

import torch
from torch import Tensor

from blockdrop_fast.executors import Executor, gates
from blockdrop_fast.executors.layers import Layers
from blockdrop_fast.executors.slices import Slices
from blockdrop_fast.networks.folding import FoldedNetwork


class DenseExecutor(Executor):
    """Computes all blocks for all images. Runs complete networks, such as the policy network."""

    strategy = "dense"

    def __init__(self, network: FoldedNetwork):
        self.logits_dtype = network.fc_weight.dtype
        self._layers = Layers(network)
        self._slices = Slices(network)

    def run(self, images: Tensor, decisions: Tensor) -> Tensor:
        """(B, 3, H, W) images, (B, K) bool decisions -> (B, num_classes) logits."""

        def run(images: Tensor, decisions: Tensor) -> Tensor:
            return self._run_blocks(self._layers.stem(images), 0, decisions)

        return self._slices.run(run, images, decisions)

    def run_from(self, images: Tensor, features: Tensor, after: int, decisions: Tensor) -> Tensor:
        def run(_: Tensor, features: Tensor, decisions: Tensor) -> Tensor:
            return self._run_blocks(features, after, decisions)

        return self._slices.run(run, images, features, decisions)

    def _run_blocks(self, x: Tensor, after: int, decisions: Tensor) -> Tensor:
        for k, block in islice(enumerate(self._layers.blocks), after, None):
            shortcut = block.shortcut(x)
            keep = decisions[:, k, None, None, None]
            x = torch.where(keep, block.kept(x, shortcut), shortcut)
        return self._layers.classifier(x)

    def run_complete(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, num_classes) logits, all blocks kept: nothing to mask."""
        return self._slices.run(self._run_complete, images)

    def _run_complete(self, images: Tensor) -> Tensor:
        x = self._layers.stem(images)
        for block in self._layers.blocks:
            x = block.kept(x, block.shortcut(x))
        return self._layers.classifier(x)

    def run_weighted(self, images: Tensor, decisions: Tensor, weights: Tensor) -> Tensor:
        run = partial(gates.run_weighted, self._layers, dense_from=0.0)
        return self._slices.run(run, images, decisions, weights)

    def run_sets(self, images: Tensor, decisions: Tensor) -> Tensor:
        """(B, 3, H, W) images, (S, B, K) bool -> (S, B, num_classes) logits; nothing is shared."""
        return torch.stack([self.run(images, one) for one in decisions])
