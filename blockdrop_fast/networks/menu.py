"""A menu of block sets for a policy network to choose from, at any budget.

The policy network predicts, for every set of the menu, the probability that the backbone is right
when it runs that set. An image gets the set with the best probability after its blocks are paid
for, and the price of a block decides how many are used: one policy network serves every budget.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

import torch
from torch import Tensor, nn

from blockdrop_fast.decisions import check_values

# ``Menu.calibrate`` tries prices between two others until their usages are so close in blocks, or
# the prices are in probability: images that change their set at the same price do so together.
USAGE_STEP = 0.05
PRICE_STEP = 1e-7


class Menu(nn.Module):
    """Sets of blocks, and the price of a block for each budget.

    Args:
        sets: (M, K) bool, 1 = keep, all different.

    Attributes:
        sets: as above, a buffer.
        prices: of one block in probability of being right, ascending; empty before ``calibrate``.
            Below 0 an image gets more blocks than it is surest with.
        usages: the mean kept blocks at each price, descending.
        budget: the mean kept blocks that are chosen where no budget is asked for; None: there is
            no such. These three are numbers on the host: a choice on a GPU does not wait.

    Raises:
        TypeError: no dense tensor with values.
        ValueError: no such sets.
    """

    def __init__(self, sets: Tensor):
        super().__init__()
        check_values("sets", sets)
        if sets.ndim != 2 or sets.dtype != torch.bool or not sets.numel():
            raise ValueError(
                f"sets: expected shape (M, K) bool, got {tuple(sets.shape)} {sets.dtype}"
            )
        if len(sets.unique(dim=0)) < len(sets):
            raise ValueError("sets: expected different ones, got one of them twice")
        self.register_buffer("sets", sets.clone())
        self.prices: tuple[float, ...] = ()
        self.usages: tuple[float, ...] = ()
        self.budget: float | None = None

    @property
    def num_blocks(self) -> int:
        """K."""
        return self.sets.shape[1]

    def at_price(self, logits: Tensor, price: float | Tensor) -> Tensor:
        """(B, M) logits of being right with each set -> (B,) int64, the sets worth their price.

        Args:
            price: of a block; (B, 1) where each image has its own.
        """
        return (logits.float().sigmoid() - price * self.sets.sum(1)).argmax(1)

    def choose(self, logits: Tensor, budget: float | None = None) -> Tensor:
        """Choose a set for each image.

        Args:
            logits: (B, M) of being right with each set.
            budget: mean kept blocks over images like those of ``calibrate``; None: the menu's own.

        Returns:
            (B, K) bool decisions.

        Raises:
            ValueError: a budget outside of what the menu can reach, none asked for where the menu
                has none of its own, or prices that were never calibrated.
        """
        return self.sets[self.at_price(logits, self.price(budget))]

    def price(self, budget: float | None = None) -> float:
        """The price of a block at a budget; arguments and errors as of ``choose``."""
        if not self.usages:
            raise ValueError("budget: the menu was not calibrated, so no usage is known")
        wanted = self.budget if budget is None else budget
        lowest, highest = self.usages[-1], self.usages[0]
        if wanted is None or not lowest <= wanted <= highest:
            raise ValueError(
                f"budget: expected from {lowest:.3g} to {highest:.3g} blocks, got {wanted}"
            )
        if len(self.usages) == 1:
            return self.prices[0]
        # Usages descend: between the last that is at least what is wanted, and the next.
        above = min(
            bisect_right(self.usages, -wanted, key=lambda usage: -usage), len(self.usages) - 1
        )
        (before, after), (more, less) = (
            values[above - 1 : above + 1] for values in (self.prices, self.usages)
        )
        return before + (more - wanted) / (more - less) * (after - before)

    @torch.no_grad()
    def calibrate(self, logits: Tensor, budget: float | None = None) -> None:
        """Find the price of each budget.

        Args:
            logits: (N, M), of images that the policy network was not trained on.
            budget: becomes the menu's own; None: leaves it.

        Raises:
            ValueError: a budget outside of what the menu reaches on these images.
        """
        cost = self.sets.sum(1).double()

        def tried(price: float) -> tuple[float, float]:
            return price, float(cost[self.at_price(logits, price)].mean())

        def between(low: tuple[float, float], high: tuple[float, float]) -> list:
            if low[1] - high[1] <= USAGE_STEP or high[0] - low[0] <= PRICE_STEP:
                return []
            middle = tried((low[0] + high[0]) / 2)
            return [*between(low, middle), middle, *between(middle, high)]

        # For nothing, an image gets what it is surest of; for a probability of 1 the smallest set,
        # and where a block earns as much the largest, so that every usage between can be met.
        ends = tried(-1.0), tried(1.0)
        table = [ends[0], *between(*ends), ends[1]]
        # Of equal usages the first price: from one usage to the next the curve is a line.
        steps = [b for a, b in pairwise(table) if b[1] < a[1]]
        self.prices, self.usages = zip(table[0], *steps, strict=True)
        if budget is not None:
            self.price(budget)
            self.budget = float(budget)
