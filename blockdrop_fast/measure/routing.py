"""Do decisions depend on the image, and does that pay? Pure functions of decisions and outcomes."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def shuffled_decisions(decisions: Tensor, shuffles: int, seed: int = 0) -> Tensor:
    """The same decisions, dealt out to other images.

    Args:
        decisions: (N, K).
        shuffles: R, how often.
        seed: of the permutations.

    Returns:
        (R, N, K), each a permutation of the N rows.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(decisions), generator=generator) for _ in range(shuffles)]
    return torch.stack([decisions[order.to(decisions.device)] for order in orders])


def routing_gain(correct: Tensor, shuffled: Tensor) -> tuple[float, float]:
    """What it is worth that each image has its own decisions and not another one's.

    Args:
        correct: (N,) bool, at the images' own decisions.
        shuffled: (R, N) bool, at shuffled ones.

    Returns:
        Accuracy minus the shuffles' mean accuracy, -1…1, and their standard deviation.
    """
    accuracies = shuffled.double().mean(1)
    gain = correct.double().mean() - accuracies.mean()
    return float(gain), float(accuracies.std(correction=0))


def effective_policies(decisions: Tensor) -> float:
    """exp(entropy) of the distribution of the (N, K) decisions: n where n are equally frequent."""
    _, counts = decisions.unique(dim=0, return_counts=True)
    shares = counts.double() / counts.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def margins(logits: Tensor) -> Tensor:
    """(N, C) logits -> (N,), how far the first class is ahead of the second."""
    first, second = logits.topk(2, 1).values.unbind(1)
    return first - second


def rank_correlation(x: Tensor, y: Tensor) -> float | None:
    """Spearman's correlation of two (N,) tensors, -1…1; equal values share their mean rank.

    None where either is constant.
    """
    x, y = _ranks(x), _ranks(y)
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if scale > 0 else None


def _ranks(values: Tensor) -> Tensor:
    _, index, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[index]


def concave_envelope(values: Tensor) -> Tensor:
    """The lowest concave curve that is nowhere below ``values`` (K+1,) at 0…K.

    Of accuracies at 0…K blocks: what is reached at each mean usage by tossing a coin, for each
    image, between sets of blocks, without a look at the image.
    """
    best = values.double().clone()
    hull: list[int] = []
    for k in range(len(best)):
        # A corner on or below the line from the one before it to the newest is none.
        while len(hull) > 1 and (best[hull[-1]] - best[hull[-2]]) * (k - hull[-2]) <= (
            best[k] - best[hull[-2]]
        ) * (hull[-1] - hull[-2]):
            hull.pop()
        hull.append(k)
    for left, right in pairwise(hull):
        best[left : right + 1] = torch.linspace(
            float(best[left]), float(best[right]), right - left + 1, dtype=torch.float64
        )
    return best


def at_usage(values: Tensor, usage: float) -> float:
    """``values`` (K+1,) at 0…K, linearly interpolated at a mean usage between them."""
    below = min(int(usage), len(values) - 2)
    share = usage - below
    return float((1 - share) * values[below] + share * values[below + 1])
