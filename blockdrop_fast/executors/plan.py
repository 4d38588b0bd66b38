"""The plan: everything an executor needs to know of a batch's decisions, computed once.

All K decisions of an image are known before block 1 runs, so one small op serves the whole
network. Several decision sets of the same images are planned together: where an image's sets
agree from block 1 on, they share one *row* of activations, which forks where they part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from blockdrop_fast import ops


@dataclass(frozen=True)
class Plan:
    """What to execute, for R rows of activations (one an image, unless there are forks).

    Attributes:
        decisions: (R, K) bool, True = row keeps block.
        indices: (K, R) int32, the active rows of each block in ascending order, then -1.
        counts: (K,) int32, the number of active rows of each block.
        order: (R,) int32, rows by descending block usage.
    """

    decisions: Tensor
    indices: Tensor
    counts: Tensor
    order: Tensor

    @cached_property
    def host_counts(self) -> list[int]:
        """``counts`` on the host: free on a CPU, the one copy an executor may wait for on a GPU."""
        return self.counts.tolist()

    def active(self, k: int) -> Tensor:
        """(counts[k],) int32: the active rows of block k (0-based)."""
        return self.indices[k, : self.host_counts[k]]


def plan(decisions: Tensor) -> Plan:
    """Plan a batch: (B, K) bool decisions -> ``Plan`` with one row an image."""
    return Plan(decisions, *ops.plan(decisions))


@dataclass(frozen=True)
class SetsPlan:
    """A plan for S decision sets of the same B images, prefixes shared.

    Attributes:
        plan: for R rows, B <= R <= S * B: row b < B is image b under set 0. A row that forks off
            at block k has all its decisions before k cleared, so that it is active only after.
        fork_parents: for each block k, (F_k,) int64: the rows that fork just before it; their
            copies become the next rows.
        rows: (S, B) int64: the row holding set s of image b.
    """

    plan: Plan
    fork_parents: tuple[Tensor, ...]
    rows: Tensor


def plan_sets(decisions: Tensor) -> SetsPlan:
    """Plan S decision sets of the same images: (S, B, K) bool -> ``SetsPlan``.

    A set forks off the earlier set it agrees with for longest; of several such, the first one,
    which always exists at the fork (were it forked later, *its* parent would be earlier and
    agree as long). Runs on the host: training is its user, and forks change tensor shapes.
    """
    sets, batch, num_blocks = decisions.shape
    device = decisions.device
    decisions = decisions.cpu()
    set_rows = [torch.arange(batch)]
    row_decisions, forks, parents = [decisions[0]], [torch.zeros(batch, dtype=torch.int64)], []
    next_row = batch
    for s in range(1, sets):
        agreement = torch.stack(
            [_common_prefix(decisions[s], decisions[earlier]) for earlier in range(s)]
        )
        length, best = agreement.max(dim=0)  # max returns the first of equals on the CPU
        rows = torch.stack(set_rows).gather(0, best[None])[0]
        forking = (length < num_blocks).nonzero().squeeze(1)
        parents.append(rows[forking])
        rows[forking] = torch.arange(next_row, next_row + forking.numel())
        next_row += forking.numel()
        cleared = decisions[s, forking].clone()
        cleared[torch.arange(num_blocks) < length[forking, None]] = False
        row_decisions.append(cleared)
        forks.append(length[forking])
        set_rows.append(rows)
    all_forks = torch.cat(forks)
    all_parents = torch.cat([torch.arange(batch), *parents])
    # Rows come to life in the order of their forks: renumber them so that the live ones are
    # always the first ones.
    born = torch.cat([torch.arange(batch), batch + all_forks[batch:].argsort(stable=True)])
    new_number = torch.empty_like(born)
    new_number[born] = torch.arange(next_row)
    forked = born[batch:]
    fork_at = all_forks[forked]
    parent_rows = new_number[all_parents[forked]].to(device)
    fork_parents = parent_rows.split(torch.bincount(fork_at, minlength=num_blocks).tolist())
    return SetsPlan(
        plan=plan(torch.cat(row_decisions)[born].to(device)),
        fork_parents=fork_parents,
        rows=new_number[torch.stack(set_rows)].to(device),
    )


def _common_prefix(a: Tensor, b: Tensor) -> Tensor:
    """(B, K) and (B, K) bool -> (B,): the number of leading blocks decided alike."""
    return (a == b).int().cumprod(dim=1).sum(dim=1)
