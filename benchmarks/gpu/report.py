"""Reads what was measured on a GPU: tables of all cells, and which figures are as required."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from blockdrop_fast.executors import crossover
from blockdrop_fast.measure import calibration
from blockdrop_fast.measure.contenders import LEGEND, Row, format_rows

WITH_CLUSTERS = "cifar published 1 to 1024 with clusters"
WITHOUT_CLUSTERS = "cifar published 1 to 1024 without clusters"
# The rounds that may hold a cell's figure, the best one first.
ROUNDS = (" compiled tuned", " compiled", "")


@dataclass(frozen=True)
class Requirement:
    """A figure and what it has to be.

    Attributes:
        strategy: "walk" or "gather": whose it is.
        text: what it is of.
        target, goal: how good it has to be, and ought to be.
        unit: behind the figures.
        at_most: smaller is better.
        value: measured, or None.
        remark: why not, or what it does not include.
    """

    strategy: str
    text: str
    target: float
    goal: float | None
    unit: str
    at_most: bool
    value: float | None
    remark: str

    def __str__(self) -> str:
        text = f"{self.strategy}, {self.text}"
        bound = f"{'at most' if self.at_most else 'at least'} {self.target:g}"
        if self.goal is not None:
            bound += f", goal {self.goal:g}"
        if self.value is None:
            return f"not measured  {text}: {bound}{self.unit} ({self.remark})"
        good = self.value <= self.target if self.at_most else self.value >= self.target
        remark = f"; {self.remark}" if self.remark else ""
        verdict = "met" if good else "missed"
        return f"{verdict:<12}  {text}: {self.value:.3g}{self.unit} ({bound}{remark})"


def requirements(results: Mapping[str, dict]) -> list[Requirement]:
    """What the walk and gather have to show on a GPU, with what was measured of it."""
    found = []

    def add(
        strategy: str,
        text: str,
        read: Callable[[], tuple[float | None, str]],
        target: float,
        goal: float | None = None,
        unit: str = "",
        at_most: bool = False,
    ) -> None:
        found.append(Requirement(strategy, text, target, goal, unit, at_most, *read()))

    def of_row(
        cell: str, contender: str, read: Callable[[dict, list[dict]], float | None]
    ) -> Callable[[], tuple[float | None, str]]:
        """A figure of a contender's row, and of the other rows of its round."""

        def value() -> tuple[float | None, str]:
            for form in ROUNDS:
                rows = results.get(cell + form, {}).get("rows", [])
                for row in rows:
                    if row["contender"] == contender:
                        timed = any(one["contender"] == "compile" for one in rows)
                        figure = read(row, rows)
                        if figure is None:
                            return None, "not timed"
                        return figure, "" if timed else "torch.compile not in this round"
            return None, _why_not(results, [cell + form for form in reversed(ROUNDS)], contender)

        return value

    def of_cell(
        cell: str, part: str, read: Callable[[dict], float]
    ) -> Callable[[], tuple[float | None, str]]:
        def value() -> tuple[float | None, str]:
            result = results.get(cell, {})
            if part in result:
                return read(result), ""
            return None, _why_not(results, [cell], part)

        return value

    def speedup(row: dict, _: list[dict]) -> float:
        return row["speedup"]

    walk, gather = "walk-decides", "gather-decides"
    fastest = "over the fastest complete network"
    for size in (256, 1024):
        cell, what = f"cifar published {size}", f"ResNet-110, batch {size}"
        add("walk", f"{what}, {fastest}", of_row(cell, walk, speedup), 4, 6, "x")
        share = of_row(cell, walk, lambda row, _: row["share_of_own_bound"])
        add("walk", f"{what}, share of the FLOP bound over its own complete network", share, 0.85)
        rate = of_row(cell, walk, lambda row, _: row["images_per_second"])
        add("walk", f"{what}, images/s", rate, 7e5, 1.5e6)
    one_image = "ResNet-110, one image"
    micro = of_row("cifar published 1", walk, lambda row, _: 1e6 * row["seconds"])
    add("walk", f"{one_image}, device time", micro, 80, 40, " µs", True)
    add("walk", f"{one_image}, {fastest}", of_row("cifar published 1", walk, speedup), 1, 1.5, "x")
    for size in (1, 8, 16):
        add("walk", f"ResNet-110, batch {size}, time by clusters over the time without",
            lambda size=size: _clusters(results, size), 1, at_most=True)  # fmt: skip
    for size in (1, 8, 64, 256, 1024):
        add("walk", f"ResNet-110, all kept, batch {size}, time over the fastest complete network's",
            of_row(f"cifar published {size}", "walk-all", lambda row, _: 1 / row["speedup"]),
            1.03, at_most=True)  # fmt: skip
    for size in (64, 256):
        add("gather", f"ResNet-101, ten policies, batch {size}, {fastest}",
            of_row(f"imagenet published {size}", gather, speedup), 1.15, 1.2, "x")  # fmt: skip
    add("gather", f"ResNet-101, random decisions of density 0.5, batch 64, {fastest}",
        of_row("imagenet random 64", "gather", speedup), 1.5, unit="x")  # fmt: skip
    add("gather", f"ResNet-101, ten policies, one image, host time, {fastest}",
        of_row("imagenet published 1", gather, _host_speedup), 1.1, unit="x")  # fmt: skip
    for size in (1, 8, 64, 256):
        add("gather",
            f"ResNet-101, all kept, batch {size}, time over the fastest complete network's",
            of_row(f"imagenet published {size}", "gather-all", lambda row, _: 1 / row["speedup"]),
            1.03, at_most=True)  # fmt: skip
    for strategy, network, family in (
        ("walk", "ResNet-110", "cifar"),
        ("gather", "ResNet-101", "imagenet"),
    ):
        add(strategy, f"{network}, worst cell of the crossover map, time of auto over dense",
            of_cell(f"{family} crossover", "cells", _worst_cell),
            1 + calibration.ALLOWED_LOSS, at_most=True)  # fmt: skip
    memory = "ResNet-101, batch 64, peak reserved memory over the complete network's"
    add("gather", memory, lambda: _memory(results.get("imagenet memory", {})), 1.3, at_most=True)
    for strategy, cell, contender, may_wait in (
        ("walk", "cifar waits", walk, False),
        ("gather", "imagenet waits", gather, True),
        ("gather", "imagenet waits", "gather-universal", False),
    ):
        if not may_wait:
            add(strategy, f"{contender}, waits for the device in a call",
                of_cell(cell, contender, lambda one, c=contender: float(one[c]["waits"])),
                0, at_most=True)  # fmt: skip
        add(strategy, f"{contender}, waits that torch knows of in a call",
            of_cell(cell, contender, lambda one, c=contender: float(one[c]["hidden"])),
            0, at_most=True)  # fmt: skip
    return found


def _why_not(results: Mapping[str, dict], cells: list[str], contender: str) -> str:
    for cell in cells:
        result = results.get(cell, {})
        for reasons in (result.get("unavailable", {}), result.get("dropped", {})):
            if contender in reasons:
                return reasons[contender]
        if "why" in result:
            return result["why"]
    return "left out"


def _host_speedup(row: dict, rows: list[dict]) -> float | None:
    """Over the fastest baseline of the same round, both by the host's clock."""
    if not row["host_seconds"]:
        return None
    fastest = min(one["host_seconds"] for one in rows if one["kind"] == "baseline")
    return fastest / row["host_seconds"]


def _clusters(results: Mapping[str, dict], size: int) -> tuple[float | None, str]:
    """The walk's time with clusters over that without, from two cells."""
    seconds = []
    for cell in (WITH_CLUSTERS, WITHOUT_CLUSTERS):
        for row in results.get(cell, {}).get("rows", ()):
            if (row["batch"], row["contender"]) == (size, "walk-decides"):
                seconds.append(row["seconds"])
    if len(seconds) == 2:
        return seconds[0] / seconds[1], ""
    return None, _why_not(results, [WITH_CLUSTERS, WITHOUT_CLUSTERS], "walk-decides")


def _worst_cell(result: dict) -> float:
    return max(cell["seconds"]["auto"] / cell["seconds"]["dense"] for cell in result["cells"])


def _memory(result: dict) -> tuple[float | None, str]:
    names = ("gather", "complete, eager")
    for name in names:
        if name not in result:
            return None, _why_not({"": result} if result else {}, [""], name)
    return result[names[0]]["reserved"] / result[names[1]]["reserved"], ""


def describe(content: Mapping) -> str:
    """Tables of all cells, and what has to be shown."""
    lines = [", ".join(f"{key} {value}" for key, value in content["machine"].items()), ""]
    if content["rehearsal"]:
        lines += ["REHEARSAL on a CPU with tiny networks: these figures mean nothing.", ""]
    unchecked = {"walk", "gather"} - set(content["checked"])
    if unchecked and not content["rehearsal"]:
        names = " and ".join(sorted(unchecked))
        lines += [f"UNCHECKED figures of {names}: {content['check']}.", ""]
    for name, result in content["cells"].items():
        lines += [f"== {name}", *_describe_cell(result), ""]
    lines += [LEGEND, ""]
    if content["left_out"]:
        lines += [f"left out, run again to go on: {', '.join(content['left_out'])}", ""]
    for one in requirements(content["cells"]):
        mark = "unchecked: " if one.strategy in unchecked else ""
        lines.append(("rehearsal, no claim: " if content["rehearsal"] else mark) + str(one))
    return "\n".join(lines) + "\n"


def _describe_cell(result: Mapping) -> list[str]:
    lines = [f"dropped: {who} ({why})" for who, why in result.get("dropped", {}).items()]
    if "why" in result:
        return [*lines, result["why"]]
    if "rows" in result:
        rows = [Row(**one) for one in result["rows"]]
        lines.append(format_rows(rows))
        if "incomplete" in result:
            lines.append(f"the time was up: {result['incomplete']}")
        lines += [f"not timed: {who} ({why})" for who, why in result["unavailable"].items()]
        lines += [f"engine {which}: {reason}" for which, reason in result["engines"].items()]
        return lines + [
            f"{row.contender}, batch {row.batch}: {row.block_usage[0]:.1f} ± "
            f"{row.block_usage[1]:.1f} blocks, {row.policies} different decisions"
            for row in rows
            if row.kind == "decides"
        ]
    if "cells" in result:
        cells = [crossover.Cell(**one) for one in result["cells"]]
        table = [calibration.HEAD, *map(calibration.format_cell, cells)]
        return [*lines, *table, calibration.verdict(cells)]
    hidden = ("dropped", "entries")
    return lines + [f"{key}: {value}" for key, value in result.items() if key not in hidden]
