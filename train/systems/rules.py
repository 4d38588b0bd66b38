"""Rules by which an image stops on the way, fitted on held-out images: of exits and of cascades.

A stop is an exit or the network's end; in a cascade, a network. Its rule says which of the images
that come to it stay, by how sure its classifier is (``confidence_features``). Two kinds:

- "threshold": of the largest probability, such that the shares of images at the stops go as powers
  of one ratio (the protocol of MSDNet, Huang et al. 2018).
- "learned": weighted binary classification, from the last stop backwards (Bolukbasi et al. 2017),
  at one price of a lost right answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from blockdrop_fast.networks.exits import NEVER, confidence_features, leaves_by, threshold_rules

ALWAYS = (0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
# Of a stop's share to that of the one before (up to 1.95 MSDNet's, which leave out what is close to
# the complete network), and of how many complete runs a right answer is worth.
RATIOS = (*(step / 20 for step in range(1, 40)), 2.2, 2.5, 3.0, 4.0, 6.0, 10.0, 20.0)
PRICES = (0.0, *(2.0 ** (step / 4) for step in range(-8, 33)))
BISECTIONS = 12

Point = dict[str, float | list[float]]


@dataclass(frozen=True)
class Stops:
    """What the stops say of some images, and what it takes to come to them.

    Attributes:
        logits: (S, N, num_classes), of each stop, the last of which takes all that come to it.
        labels: (N,) int64.
        blocks, flops: (S,) float64, of an image that stays there, what came before included.
    """

    logits: Tensor
    labels: Tensor
    blocks: Tensor
    flops: Tensor

    @property
    def correct(self) -> Tensor:
        """(S, N) bool."""
        return self.logits.argmax(-1) == self.labels

    def stay(self, rules: Tensor) -> Tensor:
        """(S - 1, 6) rules -> (N,) int64: the stop where each image stays."""
        stays = [leaves_by(*pair) for pair in zip(self.logits[:-1], rules, strict=True)]
        return torch.stack([*stays, torch.ones_like(stays[0])]).int().argmax(0)

    def point(self, rules: Tensor) -> Point:
        """What the rules come to: means over the images, and the share that stays at each stop.

        The routing gain is over the same stops shuffled among the images, in expectation.
        """
        at = self.stay(rules)
        correct, count = self.correct.double(), len(self.blocks)
        shares = torch.bincount(at, minlength=count) / len(at)
        accuracy = float(correct.gather(0, at[None]).mean())
        return {
            "accuracy": accuracy,
            "blocks": float(self.blocks[at].mean()),
            "flops": float(self.flops[at].mean()),
            "routing_gain": accuracy - float(shares.double() @ correct.mean(1)),
            "shares": shares.tolist(),
        }


def share_rules(stops: Stops, ratio: float) -> Tensor:
    """(S - 1, 6) thresholds at which stop k, counted from 1, has a share that goes as ratio^k."""
    count, images = stops.logits.shape[:2]
    shares = torch.tensor(ratio).double() ** torch.arange(1, count + 1)
    wanted = (shares / shares.sum() * images).round().long().tolist()
    rules, going = torch.tensor([NEVER] * (count - 1)), torch.ones(images, dtype=torch.bool)
    for stop, quota in enumerate(wanted[:-1]):
        sure = stops.logits[stop].softmax(1).max(1).values
        quota = min(quota, int(going.sum()))
        if quota:
            least = sure[going].sort(descending=True).values[quota - 1].item()
            rules[stop : stop + 1] = threshold_rules([min(least, 1.0)], 1)
        going &= ~leaves_by(stops.logits[stop], rules[stop])
    return rules


def learn_rules(stops: Stops, price: float) -> Tensor:
    """(S - 1, 6) rules that weigh work against right answers, from the last stop backwards.

    Staying costs an image the price where the stop is wrong and the last one is not. Going on costs
    the work up to where later rules let it stay, in complete runs, and the price where that stop is
    wrong and the last one is not.
    """
    work, wrong = stops.flops / stops.flops[-1], (~stops.correct).double()
    lost = price * (wrong - wrong[-1]).clamp(min=0)
    last = len(stops.flops) - 1
    rules, at = torch.tensor([NEVER] * last), torch.full_like(stops.labels, last)
    for stop in reversed(range(last)):
        go_on = work[at] - work[stop] + lost.gather(0, at[None])[0]
        rules[stop] = separate(stops.logits[stop], go_on - lost[stop])
        at = torch.where(leaves_by(stops.logits[stop], rules[stop]), stop, at)
    return rules


def separate(logits: Tensor, gain: Tensor) -> Tensor:
    """The (6,) rule of those who gain by staying: logistic regression weighted by the gain.

    Args:
        logits: (N, num_classes), of a stop.
        gain: (N,) float64, what an image gains by staying, negative where it loses.
    """
    if not (gain > 0).any() or not (gain < 0).any():
        return torch.tensor(ALWAYS if (gain > 0).any() else NEVER)
    features = confidence_features(logits).double()
    mean, scale = features.mean(0), features.std(0).clamp(min=1e-6)
    regression = LogisticRegression(C=100.0, max_iter=2000).fit(
        ((features - mean) / scale).numpy(), (gain > 0).numpy(), gain.abs() / gain.abs().mean()
    )
    weights = torch.from_numpy(regression.coef_[0]) / scale
    bias = torch.from_numpy(regression.intercept_) - weights @ mean
    return torch.cat([weights, bias]).float()


def meet(
    budget: float, stops: Stops, make: Callable[[float], Tensor], values: Iterable[float]
) -> tuple[float, Tensor]:
    """The value, and its rules, whose mean blocks are the most that are within a budget.

    Args:
        budget: mean blocks of an image.
        make: value -> rules, which on the whole let images go on for longer the larger it is.
        values: ascending, between which it is searched for; the first is taken where none fits.
    """
    low, *rest = values
    rules, high = make(low), None
    for value in rest:
        found = make(value)
        if stops.point(found)["blocks"] > budget:
            high = value
            break
        low, rules = value, found
    for _ in range(BISECTIONS if high is not None else 0):
        middle = (low + high) / 2
        found = make(middle)
        if stops.point(found)["blocks"] > budget:
            high = middle
        else:
            low, rules = middle, found
    return low, rules


def budget_of(budget: float | None, blocks: Sequence[int], complete: int) -> float:
    """The budget of a stage's options, or half of the complete network.

    Args:
        budget: as given, mean blocks.
        blocks: of the stops, ascending.
        complete: K of the largest network.

    Raises:
        ValueError: below the first stop's blocks, or above the last one's.
    """
    if budget is None:
        return max(complete / 2, blocks[0])
    if not blocks[0] <= budget <= blocks[-1]:
        raise ValueError(f"budget: expected {blocks[0]} to {blocks[-1]} blocks, got {budget:g}")
    return budget


def fit(held_out: Stops, test: Stops, budget: float, ships: str) -> tuple[Tensor, dict]:
    """Fit rules of both kinds on held-out images.

    Args:
        held_out: to fit on; no network that is asked has been trained on them.
        test: to report on.
        budget: mean blocks of an image, of held-out ones, to meet.
        ships: "learned" or "threshold".

    Returns:
        The rules of that kind at the budget, and a report, JSON-ready: both kinds at the budget,
        and the whole sweep of each.
    """
    kinds = {
        "learned": (partial(learn_rules, held_out), PRICES),
        "threshold": (partial(share_rules, held_out), RATIOS),
    }

    def points(value: float, rules: Tensor) -> dict:
        return {"value": value, "held_out": held_out.point(rules), "test": test.point(rules)}

    at_budget = {kind: meet(budget, held_out, *one) for kind, one in kinds.items()}
    report = {
        "held_out_images": len(held_out.labels),
        "budget": budget,
        "ships": ships,
        "at_budget": {kind: points(*one) for kind, one in at_budget.items()},
        "sweep": {
            kind: [points(value, make(value)) for value in values]
            for kind, (make, values) in kinds.items()
        },
        "stops": {
            "blocks": test.blocks.tolist(),
            "flops": test.flops.tolist(),
            "test_accuracies": test.correct.double().mean(1).tolist(),
        },
    }
    return at_budget[ships][1], report


def summary(report: dict) -> dict[str, float]:
    """Scalars of a report for the logs: both kinds at the budget, on held-out and test images."""
    return {
        f"{kind}_{split}_{name}": found[split][name]
        for kind, found in report["at_budget"].items()
        for split in ("held_out", "test")
        for name in ("accuracy", "blocks", "flops", "routing_gain")
    }
