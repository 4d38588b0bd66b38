"""Which CUDA graph runs a batch, by how many of its images keep each block.

Graphs of one batch size differ in what they take as known of each block, its *way*. Ways are bits
of knowledge: one serves if its bits are among those of the batch. A *pattern* holds a byte a block
in one integer, so whether a graph serves a batch is one ``&``, and so is what batches share.
"""

from __future__ import annotations

import math
from collections import Counter
from enum import IntEnum
from itertools import accumulate
from operator import and_


class Way(IntEnum):
    """How a block is run."""

    SOME = 0b000  # gathered inside the convolutions, which read the count on the device
    NONE = 0b001  # no image keeps it: a shape-changing shortcut runs, nothing else
    MASKED = 0b010  # nearly all keep it: computed for all, thrown away where it is dropped
    ALL = 0b110  # all keep it: the vendor's convolutions


UNIVERSAL = 0  # pattern of the graph that serves every batch: all blocks are ``SOME``
MOST_GRAPHS = 4  # beside it
# Predictions (triton_kernels/NOTES.md): a call without a graph, its capture and the instantiation,
# some 200 launches each; what gathering in vain costs in a block: three launches, and for each row
# what the vendor's convolutions are faster.
RECORDING_US = 10_000
BLOCK_US, ROW_US = 6, 1 / 6
LONGEST = 8  # times what repays a recording: batches are forgotten that no other graph would serve


def ways_by_count(batch: int, dense_from: float) -> bytes:
    """The way of a block for each count of active images, 0 to ``batch``.

    Args:
        batch: images, at least 1.
        dense_from: share of active images from which a block runs on all of them; above 1: never.
    """
    all_from = max(1, math.ceil(min(dense_from, 1.0) * batch))
    some, masked = [Way.SOME] * (all_from - 1), [Way.MASKED] * (batch - all_from)
    return bytes([Way.NONE, *some, *masked, Way.ALL])


class GraphChoice:
    """Chooses a graph for each batch, and which graphs there are.

    Each time that blocks have gathered in vain for as long as a recording takes, the batches seen
    are looked through for the graph that would have saved most. If that is a recording's time, the
    graph takes its place beside the others, or that of the least used one. Else there is twice the
    time until the next look.

    Args:
        num_blocks: K.
        rows: of the batches.

    Attributes:
        graphs: the patterns to choose from, those with the fewest ``SOME``, then ``MASKED`` first.
        repaid: so many blocks, summed over calls, gathering in vain cost what a recording does.
    """

    def __init__(self, num_blocks: int, rows: int):
        self._num_blocks = num_blocks
        self.graphs: tuple[int, ...] = (UNIVERSAL,)
        self.repaid = max(1, round(RECORDING_US / (BLOCK_US + ROW_US * rows)))
        self._forget(self.repaid)

    def choose(self, ways: int) -> int:
        """The pattern of the graph for a batch whose own pattern is ``ways``."""
        chosen = self._serving(ways)
        self._seen[ways] += 1
        self._used[chosen] += 1
        self._lost += self._known(ways) - self._known(chosen)
        if self._lost >= self._due:
            self._look()
        return chosen

    def _forget(self, due: int) -> None:
        self._seen: Counter[int] = Counter()
        self._used: Counter[int] = Counter()
        self._lost, self._due = 0, due

    def _serving(self, ways: int) -> int:
        return next(graph for graph in self.graphs if graph & ways == graph)

    def _known(self, pattern: int) -> int:
        """Blocks that do not gather."""
        return self._num_blocks - pattern.to_bytes(self._num_blocks, "little").count(Way.SOME)

    def _look(self) -> None:
        seen = [
            (ways, count, self._known(self._serving(ways)))
            for ways, count in self._seen.most_common()
        ]
        # The most frequent patterns, and what the first 2, 4, 8, ... and all have in common.
        common = [*accumulate((ways for ways, _, _ in seen), and_)]
        several = [common[(1 << power) - 1] for power in range(len(seen).bit_length())]
        candidates = [*(ways for ways, _, _ in seen[:MOST_GRAPHS]), *several, common[-1]]

        def saves(graph: int) -> int:
            known = self._known(graph)
            served = ((count, known - now) for ways, count, now in seen if graph & ways == graph)
            return sum(count * max(0, blocks) for count, blocks in served)

        best = max(candidates, key=saves)
        if saves(best) >= self.repaid:
            most_used = sorted(self.graphs[:-1], key=self._used.__getitem__)[1 - MOST_GRAPHS :]
            graphs = sorted([best, *most_used], key=lambda one: (self._known(one), one.bit_count()))
            self.graphs = (*graphs[::-1], UNIVERSAL)
            self._forget(self.repaid)
        elif self._due == LONGEST * self.repaid:
            self._forget(self._due)
        else:
            self._due = min(2 * self._due, LONGEST * self.repaid)
