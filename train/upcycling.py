"""From one set of blocks for all images to one for each group of classes, without a loss.

Blocks that the set does not use become copies of those that it uses, so that each group starts with
what all had, and goes its own way in training (as "sparse upcycling" starts a mixture of experts
from a dense network; Komatsuzaki et al. 2023).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import blockdrop_fast as bdf


def upcycle(
    backbone: bdf.ResNet, keep: Tensor, groups: int, first: int = 0
) -> tuple[bdf.ResNet, Tensor]:
    """Copy the set's blocks of the last segment for all groups but one.

    The first block of a segment changes the shape and is shared, as are all other segments.

    Args:
        backbone: of the set.
        keep: (K,) bool, the set.
        groups: G.
        first: so many first blocks shall be in every set: the set's blocks of the first segment
            move there, which changes nothing, as all blocks of a segment are of one shape.

    Returns:
        A new backbone, and (G, K) bool sets of equal size; at each of them it computes what
        ``backbone`` computes at ``keep``.

    Raises:
        ValueError: the set has too few blocks in the first segment, or leaves too few free in the
            last.
    """
    layers = backbone.config.layers
    result, keep = copy.deepcopy(backbone), keep.clone()
    used = keep[: layers[0]].nonzero().squeeze(1).tolist()
    if first > len(used):
        raise ValueError(
            f"look: expected at most {len(used)}, the set's blocks of the first segment, "
            f"got {first}"
        )
    if first:
        for to, block in enumerate(used):
            _copy(backbone, result, block, to)
        keep[: layers[0]] = torch.arange(layers[0]) < len(used)
    start = len(keep) - layers[-1] + 1
    own = (start + keep[start:].nonzero().squeeze(1)).tolist()
    free = (start + (~keep[start:]).nonzero().squeeze(1)).tolist()
    if len(own) == 0 or len(free) < (groups - 1) * len(own):
        raise ValueError(
            f"groups: the set has {len(own)} blocks of its own and {len(free)} free ones in the "
            f"last segment, too few for {groups} groups"
        )
    sets = [keep]
    for group in range(groups - 1):
        taken = free[group * len(own) : (group + 1) * len(own)]
        other = keep.clone()
        other[own], other[taken] = False, True
        for block, to in zip(own, taken, strict=True):
            _copy(backbone, result, block, to)
        sets.append(other)
    return result, torch.stack(sets)


def _copy(source: bdf.ResNet, target: bdf.ResNet, block: int, to: int) -> None:
    blocks = [block for block, _ in source.blocks()], [block for block, _ in target.blocks()]
    blocks[1][to].load_state_dict(blocks[0][block].state_dict())
