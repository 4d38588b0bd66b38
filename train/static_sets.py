"""One set of blocks for all images, by the paper's heuristics or the best one there is."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.data.image_sets import ImageFolder, ImageSet
from blockdrop_fast.measure.static_line import cached_static_line
from train import distributed
from train.images import EVALUATION_BATCH, plain_batches

LINE_IMAGES = 1000
# By which a set is chosen; and the one that draws a set for each image.
RULES = ("greedy", "first_k", "random_k", "distribute_k")
PER_IMAGE = "random_k_per_image"


def static_set(
    rule: str,
    keep: int,
    engine: bdf.Engine,
    checkpoint: str | Path,
    train: ImageSet | ImageFolder,
    seed: int,
) -> Tensor:
    """(K,) bool, a set of so many blocks.

    Args:
        rule: one of ``RULES``; "greedy" drops the blocks one by one that training images need
            least (``measure.static_line``).
        keep: its blocks.
        engine: of the network.
        checkpoint: of the network, beside which the greedy line is kept.
        train: training images for it.
        seed: of what is drawn.

    Raises:
        ValueError: another number of blocks than there can be.
    """
    layers = engine.config.layers
    if rule == "random_k":
        return bdf.heuristics.random_k(keep, layers, 1, seed=seed)[0]
    if rule != "greedy":
        return getattr(bdf.heuristics, rule)(keep, layers, 1)[0]
    bdf.heuristics.first_k(keep, layers, 1)  # checks
    some = train.subset(min(LINE_IMAGES, len(train)), seed)
    batches = plain_batches(engine.backbone, some, EVALUATION_BATCH, 2)
    line = cached_static_line(
        checkpoint, distributed.shared(engine), list(batches), keep=distributed.is_first()
    )
    return line.sets[keep]
