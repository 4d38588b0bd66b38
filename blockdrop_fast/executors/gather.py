"""Gather execution: block-major, each block on its active images only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from blockdrop_fast.executors import Executor, gates
from blockdrop_fast.executors.layers import Layers
from blockdrop_fast.executors.plan import plan, plan_sets
from blockdrop_fast.executors.slices import Slices
from blockdrop_fast.networks.folded_gates import FoldedGates
from blockdrop_fast.networks.folding import FoldedNetwork
from blockdrop_fast.networks.resnet import take_images

# From this share of active rows on, copying them out and back costs more than computing the
# dropped ones. Measured on a CPU for each stage of ResNet-50 and ResNet-20: gathering 7 of 8 rows
# takes 0.84 to 1.21 of the time that all rows take, 6 of 8 takes 0.73 to 0.96.
DENSE_SHARE = 0.875


def default_dense_from(batch: int) -> float:
    """``DENSE_SHARE`` at every batch size: what a gather executor goes by without measurements."""
    return DENSE_SHARE


class GatherExecutor(Executor):
    """Gathers a block's active images, runs the block on them, puts the results back in place.

    A block that no image keeps costs nothing (a shape-changing shortcut still runs); one that
    all images keep runs without gathering, and one that nearly all keep runs on all, masked. On a
    CPU large batches are cut into slices.

    Args:
        network: folded, of any architecture.
        dense_from: rows of activations -> the share of active ones from which a block runs on
            all rows, masked; above 1: never.
    """

    strategy = "gather"

    def __init__(
        self, network: FoldedNetwork, dense_from: Callable[[int], float] = default_dense_from
    ):
        self.logits_dtype = network.fc_weight.dtype
        self._layers = Layers(network)
        self._slices = Slices(network)
        self._dense_from = dense_from
        self._gates: FoldedGates | None = None

    def run(self, images: Tensor, decisions: Tensor) -> Tensor:
        """(B, 3, H, W) images and their (B, K) bool decisions -> (B, num_classes) logits."""
        dense_from = self._dense_from(len(images))

        def run(images: Tensor, decisions: Tensor) -> Tensor:
            return self._run_blocks(self._layers.stem(images), 0, decisions, dense_from)

        return self._slices.run(run, images, decisions)

    def run_from(self, images: Tensor, features: Tensor, after: int, decisions: Tensor) -> Tensor:
        dense_from = self._dense_from(len(images))

        def run(_: Tensor, features: Tensor, decisions: Tensor) -> Tensor:
            return self._run_blocks(features, after, decisions, dense_from)

        return self._slices.run(run, images, features, decisions)

    def _run_blocks(self, x: Tensor, after: int, decisions: Tensor, dense_from: float) -> Tensor:
        planned = plan(decisions)
        for k, block in islice(enumerate(self._layers.blocks), after, None):
            x = block.run(x, decisions[:, k], planned.active(k), dense_from)
        return self._layers.classifier(x)

    def run_weighted(self, images: Tensor, decisions: Tensor, weights: Tensor) -> Tensor:
        run = partial(gates.run_weighted, self._layers, dense_from=self._dense_from(len(images)))
        return self._slices.run(run, images, decisions, weights)

    def set_gates(self, gates: FoldedGates) -> bool:
        self._gates = gates
        return True

    def run_gates(self, images: Tensor) -> tuple[Tensor, ...]:
        dense_from = self._dense_from(len(images))
        run = partial(gates.run_gates, self._layers, self._gates, dense_from=dense_from)
        return self._slices.run(run, images)

    def run_exits(self, images: Tensor, decisions: Tensor) -> Tensor:
        run = partial(gates.run_exits, self._layers, self._gates)
        return self._slices.run(run, images, decisions)

    def run_sets(self, images: Tensor, decisions: Tensor) -> Tensor:
        """(B, 3, H, W) images, (S, B, K) bool -> (S, B, num_classes) logits, prefixes shared."""
        by_image = decisions.transpose(0, 1)  # (B, S, K)
        logits = self._slices.run(self._run_sets, images, by_image, rows=len(decisions))
        return logits.transpose(0, 1)

    def _run_sets(self, images: Tensor, decisions: Tensor) -> Tensor:
        """(B, 3, H, W) images, (B, S, K) bool -> (B, S, num_classes) logits."""
        planned = plan_sets(decisions.transpose(0, 1))
        x = self._layers.stem(images)
        for k, block in enumerate(self._layers.blocks):
            parents = planned.fork_parents[k]
            if parents.numel():
                x = torch.cat([x, take_images(x, parents)])
            keep = planned.plan.decisions[: len(x), k]
            x = block.run(x, keep, planned.plan.active(k), self._dense_from(len(x)))
        return self._layers.classifier(x)[planned.rows.t()]
