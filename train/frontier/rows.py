"""What was found of each system, and the table of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

import blockdrop_fast as bdf
from blockdrop_fast.measure import timing
from blockdrop_fast.measure.evaluation import Evaluation
from train.frontier.systems import Loaded, System, rivals_of
from train.frontier.times import BATCHES, CHUNK


@dataclass(frozen=True)
class Row:
    """What was found of a system.

    Attributes:
        system, evaluation: which, and what it does on the test split.
        routed: whether a policy decides.
        cascade: whether its blocks are networks.
        strategy: how its engine executes; "reference" where none does.
        samples: see ``time_systems``; empty if it was not timed.
        ahead_at_flops, ahead_at_blocks: accuracy over that of the rival's systems, interpolated
            linearly at the same mean FLOPs, or kept blocks, of an image. None beyond their range.
    """

    system: System
    evaluation: Evaluation
    routed: bool
    cascade: bool
    strategy: str
    samples: dict[int, list[list[float]]] = field(default_factory=dict)
    ahead_at_flops: float | None = None
    ahead_at_blocks: float | None = None

    @property
    def standard_error(self) -> float:
        """Of the accuracy: binomial."""
        accuracy = self.evaluation.accuracy
        return (accuracy * (1 - accuracy) / self.evaluation.images) ** 0.5

    @property
    def milliseconds(self) -> dict[int, float]:
        """Of a batch, by its size: mean over the chunks of images of their median."""
        return {
            batch: 1e3 * statistics.mean(map(timing.median, chunks)) / (CHUNK // batch)
            for batch, chunks in self.samples.items()
        }

    def to_dict(self) -> dict:
        """JSON-ready values."""
        derived = {"standard_error": self.standard_error, "milliseconds": self.milliseconds}
        values = asdict(self)
        return values.pop("system") | derived | values


def rows_of(
    loaded: Sequence[Loaded],
    evaluations: Sequence[Evaluation],
    samples: Sequence[dict[int, list[list[float]]]],
) -> list[Row]:
    """A row a system, in the order of ``in_order``, compared with its rival."""
    rows = [
        Row(
            one.system,
            evaluation,
            one.keep is None,
            isinstance(one.model, bdf.Cascade),
            "reference" if one.engine is None else one.engine.strategy,
            times,
        )
        for one, evaluation, times in zip(loaded, evaluations, samples, strict=True)
    ]
    return in_order(compare(rows, loaded))


def compare(rows: Sequence[Row], loaded: Sequence[Loaded]) -> list[Row]:
    """The same rows, how far each is ahead of its rival filled in."""
    row_of = {row.system.name: row for row in rows}
    compared = []
    for row, one in zip(rows, loaded, strict=True):
        rivals = [row_of[other.system.name].evaluation for other in rivals_of(one, loaded)]
        own = row.evaluation
        at_flops, at_blocks = (
            ahead(
                (getattr(own, cost), own.accuracy),
                [(getattr(rival, cost), rival.accuracy) for rival in rivals],
            )
            for cost in ("flops", "block_usage")
        )
        if isinstance(one.model, bdf.Cascade):
            at_blocks = None  # those are networks
        compared.append(replace(row, ahead_at_flops=at_flops, ahead_at_blocks=at_blocks))
    return compared


def ahead(point: tuple[float, float], rivals: Iterable[tuple[float, float]]) -> float | None:
    """How far a (cost, accuracy) is above the line through others; None beyond its ends.

    Of rivals at the same cost the best counts.
    """
    cost, accuracy = point
    line = dict(sorted(rivals))  # the last one of a cost is its best
    if not line or not min(line) <= cost <= max(line):
        return None
    return accuracy - float(np.interp(cost, list(line), list(line.values())))


def in_order(rows: Sequence[Row]) -> list[Row]:
    """By group, in the order in which groups are first met, and within by FLOPs."""
    groups = list(dict.fromkeys(row.system.group for row in rows))
    return sorted(rows, key=lambda row: (groups.index(row.system.group), row.evaluation.flops))


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line a system."""
    lines = [
        ["group", "system", "epochs", "accuracy, %", "blocks", "MFLOPs", "policies"]
        + ["routing gain", *(f"ms, batch {batch}" for batch in BATCHES)]
        + ["ahead of rival at equal FLOPs", "at equal blocks"]
    ]
    for row in rows:
        system, found, times = row.system, row.evaluation, row.milliseconds
        none = "not executed" if row.strategy == "reference" else ""
        gain, flops_ahead, blocks_ahead = (
            "" if value is None else f"{100 * value:+.2f}"
            for value in (
                found.routing_gain if row.routed else None,
                row.ahead_at_flops,
                row.ahead_at_blocks,
            )
        )
        lines.append(
            [
                system.group,
                system.name,
                "" if system.epochs is None else str(system.epochs),
                f"{100 * found.accuracy:.2f} ± {100 * row.standard_error:.2f}",
                f"{found.block_usage:.2f} ± {found.block_usage_std:.2f} of {found.num_blocks}"
                + (" networks" if row.cascade else ""),
                f"{found.flops / 1e6:.2f} ± {found.flops_std / 1e6:.2f}",
                f"{found.effective_policies:.1f}",
                f"{gain} ± {100 * found.routing_gain_std:.2f}" if gain else "",
                *(f"{times[batch]:.3f}" if batch in times else none for batch in BATCHES),
                flops_ahead,
                blocks_ahead,
            ]
        )
    return markdown(lines)


def made_by(rows: Sequence[Row]) -> list[str]:
    """Markdown: a list of seeds and commands of the systems that tell theirs, if any do."""
    lines = [
        f"- {row.system.name}: "
        + ", ".join(
            part
            for part in (
                "" if row.system.seed is None else f"seed {row.system.seed}",
                row.system.command and f"`{row.system.command}`",
            )
            if part
        )
        for row in rows
        if row.system.command or row.system.seed is not None
    ]
    return ["\n".join(lines)] if lines else []


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table of cells, whose first line is its head."""
    head, *rest = lines
    lines = [head, ["---"] * len(head), *rest]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = [
        [f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
