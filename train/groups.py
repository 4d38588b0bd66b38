"""Groups of classes that a network mistakes for each other, and the blocks that each has alone."""

from __future__ import annotations

import torch
from torch import Tensor

import blockdrop_fast as bdf


def class_groups(confusion: Tensor, groups: int) -> Tensor:
    """Divide classes so that few mistakes cross from one group to another.

    Again and again the largest group is cut in two, by the sign of the second eigenvector of the
    normalised graph Laplacian of its mistakes (spectral clustering; Shi & Malik 2000).

    Args:
        confusion: (C, C), how often, or how probably, class i is taken for class j.
        groups: 1 to C.

    Returns:
        (C,) int64, 0…groups - 1; group 0 has the first class.

    Raises:
        ValueError: another number of groups.
    """
    classes = len(confusion)
    if not 1 <= groups <= classes:
        raise ValueError(f"groups: expected 1 to {classes}, got {groups}")
    weights = (confusion + confusion.T).double().fill_diagonal_(0)
    result = torch.zeros(classes, dtype=torch.int64)
    for new in range(1, groups):
        members = (result == result.bincount().argmax()).nonzero().squeeze(1)
        result[members[_halve(weights[members][:, members])]] = new
    return result


def _halve(weights: Tensor) -> Tensor:
    """(n, n) symmetric weights of n >= 2 classes -> (n,) bool, the side without the first class."""
    scale = (weights.sum(1) + 1e-12).rsqrt()
    laplacian = torch.eye(len(weights)).double() - scale[:, None] * weights * scale
    second = torch.linalg.eigh(laplacian).eigenvectors[:, 1] * scale
    side = second > second.mean()
    return side != side[0] if side.any() else torch.arange(len(weights)) > 0


def confusion_of(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, C) logits and (N,) labels -> (C, C), row i the mean probabilities of class i's images."""
    classes = logits.shape[1]
    one_hot = torch.nn.functional.one_hot(labels, classes).double()
    counts = one_hot.sum(0).clamp(min=1)
    return one_hot.T @ logits.double().softmax(1) / counts[:, None]


def own_blocks(config: bdf.ResNetConfig, groups: int) -> Tensor:
    """Who has which blocks of the last segment to itself, in turns.

    Features of the first segments serve all classes; those of the last tell classes apart.

    Returns:
        (groups, K) bool: blocks that a group shares with nobody.

    Raises:
        ValueError: the last segment has fewer blocks than groups.
    """
    last = config.layers[-1]
    if groups > last:
        raise ValueError(
            f"groups: expected at most {last}, the blocks of the last segment, got {groups}"
        )
    block = torch.arange(config.num_blocks) - (config.num_blocks - last)
    turns = torch.where(block >= 0, block % groups, -1)
    return (turns == torch.arange(groups)[:, None]) & (groups > 1)
