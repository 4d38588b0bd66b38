"""Decisions that look at no image: the paper's baselines FirstK, RandomK and DistributeK.

Source: BlockDrop paper, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def first_k(
    keep: int,
    segments: Sequence[int],
    batch: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Keep the first blocks of the network.

    Args:
        keep: number of kept blocks of each image, 0 to K = sum(segments).
        segments: number of blocks in each segment, such as (5, 5, 5).
        batch: number of images B, 0 or more.
        device: of the result, None means the CPU.

    Returns:
        (B, K) bool decisions, True = keep.

    Raises:
        TypeError: an argument is not of the named type.
        ValueError: an argument is out of range.
    """
    num_blocks = _check(keep, segments, batch)
    row = torch.arange(num_blocks, device=_device(device)) < keep
    return row.repeat(batch, 1)


def random_k(
    keep: int,
    segments: Sequence[int],
    batch: int,
    *,
    seed: int = 0,
    per_image: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Keep blocks drawn at random, each set of that size being equally likely.

    Args:
        keep: number of kept blocks of each image, 0 to K = sum(segments).
        segments: number of blocks in each segment, such as (5, 5, 5).
        batch: number of images B, 0 or more.
        seed: of the draw, 0 or more; the same seed gives the same decisions on every device.
        per_image: draw a set for each image, otherwise one set serves all images.
        device: of the result, None means the CPU.

    Returns:
        (B, K) bool decisions, True = keep.

    Raises:
        TypeError: an argument is not of the named type.
        ValueError: an argument is out of range.
    """
    num_blocks = _check(keep, segments, batch)
    _check_count("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    # Double precision, so that two blocks of an image practically never draw the same number.
    draws = torch.rand(
        batch if per_image else 1, num_blocks, generator=generator, dtype=torch.float64
    )
    kept_blocks = draws.argsort(dim=1)[:, :keep]
    decisions = torch.zeros(draws.shape, dtype=torch.bool).scatter_(1, kept_blocks, True)
    return (decisions if per_image else decisions.repeat(batch, 1)).to(_device(device))


def distribute_k(
    keep: int,
    segments: Sequence[int],
    batch: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Keep the first blocks of each segment, as evenly over the segments as their sizes allow.

    A remainder goes to the earlier segments. What a segment is too short to take is distributed
    over the others by the same rule.

    Args:
        keep: number of kept blocks of each image, 0 to K = sum(segments).
        segments: number of blocks in each segment, such as (5, 5, 5).
        batch: number of images B, 0 or more.
        device: of the result, None means the CPU.

    Returns:
        (B, K) bool decisions, True = keep.

    Raises:
        TypeError: an argument is not of the named type.
        ValueError: an argument is out of range.
    """
    _check(keep, segments, batch)
    kept = [0] * len(segments)
    left = keep
    while left:
        # One round: a block for each segment that has one left, the earlier segments first.
        for segment, blocks in enumerate(segments):
            if left and kept[segment] < blocks:
                kept[segment] += 1
                left -= 1
    row = torch.cat(
        [torch.arange(blocks) < count for blocks, count in zip(segments, kept, strict=True)]
    )
    return row.to(_device(device)).repeat(batch, 1)


def _device(device: torch.device | str | None) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected one of torch's, got {device!r}") from None


def _check(keep: int, segments: Sequence[int], batch: int) -> int:
    """Check the arguments that all heuristics share, and return the number of blocks."""
    if not isinstance(segments, (tuple, list)):
        raise TypeError(
            f"segments: expected a tuple of blocks per segment, got {type(segments).__name__}"
        )
    if not segments:
        raise ValueError("segments: expected at least one segment, got none")
    for blocks in segments:
        _check_count("segments", blocks)
        if blocks == 0:
            raise ValueError(f"segments: expected at least one block each, got {segments}")
    _check_count("batch", batch)
    _check_count("keep", keep)
    num_blocks = sum(segments)
    if keep > num_blocks:
        raise ValueError(f"keep: expected 0 to {num_blocks} blocks, got {keep}")
    return num_blocks


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 0:
        raise ValueError(f"{name}: expected 0 or more, got {value}")
