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
    """Copy the set's last blocks for all groups but one, as many as there are free ones for.

    All in the last segment, whose first block changes the shape and is shared, as are all other
    segments. Blocks of a segment are of one shape, so the set's can change places.

    Args:
        backbone: of the set.
        keep: (K,) bool, the set.
        groups: G.
        first: so many first blocks shall be in every set: the set's blocks of the first segment
            move there.

    Returns:
        A new backbone, and (G, K) bool sets of equal size; at each of them it computes what
        ``backbone`` computes at ``keep``.

    Raises:
        ValueError: the set has too few blocks in the first segment, or none in the last, or leaves
            too few free ones there.
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
    start, end = len(keep) - layers[-1] + 1, len(keep)
    own = (start + keep[start:].nonzero().squeeze(1)).tolist()
    apart = min(len(own), (end - start - len(own)) // (groups - 1)) if groups > 1 else 0
    if groups > 1 and apart < 1:
        raise ValueError(
            f"groups: the set has {len(own)} of {end - start} blocks of the last segment, which "
            f"leaves none for each of {groups} groups"
        )
    # Those that all share, then those of each group, in the set's order.
    shared = len(own) - apart
    keep[start:] = torch.arange(end - start) < shared
    for to, block in enumerate(own[:shared], start):
        _copy(backbone, result, block, to)
    sets = keep.repeat(groups, 1)
    for group in range(groups):
        begin = start + shared + group * apart
        sets[group, begin : begin + apart] = True
        for to, block in enumerate(own[shared:], begin):
            _copy(backbone, result, block, to)
    return result, sets


def _copy(source: bdf.ResNet, target: bdf.ResNet, block: int, to: int) -> None:
    blocks = [block for block, _ in source.blocks()], [block for block, _ in target.blocks()]
    blocks[1][to].load_state_dict(blocks[0][block].state_dict())
