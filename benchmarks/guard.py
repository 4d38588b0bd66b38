"""``python -m benchmarks.guard``: have the headline figures fallen since they were recorded?

One ratio a case, a baseline's time over ours, both interleaved in one run, so that it is about the
code and not about the machine's mood. Run before a release, on a quiet machine; not a test.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks import bench_finetune
from blockdrop_fast.files import write_json
from blockdrop_fast.machine import cpu_model, machine_info
from blockdrop_fast.measure import contenders, timing
from blockdrop_fast.measure.workload import make_workload

RECORD = Path(__file__).parent / "results" / "guard.json"
ALLOWED_FALL = 0.2


def _over(
    baseline: str, contender: str, network: str, batch: int, min_seconds: float
) -> Callable[[], float]:
    """Baseline's time over a contender's; see ``contenders.CONTENDERS``."""

    def ratio() -> float:
        found = contenders.measure(
            make_workload(network, max(batch, 8)),
            batch,
            [baseline, contender],
            rounds=5,
            min_seconds=min_seconds,
        )
        if found.unavailable:
            raise ValueError("; ".join(f"{name}: {why}" for name, why in found.unavailable.items()))
        seconds = {row.contender: row.seconds for row in found.rows}
        return seconds[baseline] / seconds[contender]

    return ratio


def _finetuning_step() -> float:
    """The authors' step of joint finetuning over ours."""
    samples, _ = bench_finetune.measure("resnet32", 64, 5)
    return timing.median(samples["authors"]) / timing.median(samples["ours"])


# Dropping is guarded against the authors' way and against the same engine with all blocks,
# kernels against eager PyTorch.
CASES: dict[str, Callable[[], float]] = {
    **{
        f"{network}, batch {batch}, {contender} over {baseline}": _over(
            baseline, contender, network, batch, seconds
        )
        for network, batches, seconds in (
            ("resnet32", (1, 64), 2.0),
            ("resnet110", (1, 8, 64), 3.0),
            ("resnet101", (1, 8), 6.0),
        )
        for batch in batches
        for baseline, contender in (("eager", "walk-all"), ("eager", "walk"))
    },
    "resnet110, batch 64, gather over eager": _over("eager", "gather", "resnet110", 64, 3.0),
    "resnet32, batch 64, finetuning step over the authors'": _finetuning_step,
}


@dataclass(frozen=True)
class Arguments:
    """What to do with the ratios."""

    record: bool = False
    """Write them down for this model of processor, in place of those that are there."""
    file: Path = RECORD
    """Where they are recorded."""
    only: tuple[str, ...] = ()
    """Cases whose names contain one of these; default: all."""


def fallen(measured: dict[str, float], recorded: dict[str, float]) -> list[str]:
    """A line for each ratio that is more than ``ALLOWED_FALL`` below the recorded one."""
    return [
        f"{case}: {value:.2f}x, {recorded[case]:.2f}x was recorded"
        for case, value in measured.items()
        if case in recorded and value < (1 - ALLOWED_FALL) * recorded[case]
    ]


def run(arguments: Arguments, cases: dict[str, Callable[[], float]] = CASES) -> list[str]:
    """Measure, print, record or compare.

    Returns:
        What has fallen; empty when recording.

    Raises:
        OSError, ValueError: bad input, no such case, or nothing recorded for this processor.
    """
    parts = arguments.only or ("",)
    chosen = [case for case in cases if any(part in case for part in parts)]
    if not chosen:
        raise ValueError(f"only: no case of {', '.join(cases)} contains {parts[0]!r}")
    records = _read(arguments.file)
    here = records.get(cpu_model(), {}).get("ratios", {})
    if not arguments.record and not here:
        raise ValueError(
            f"{arguments.file} has no record of {cpu_model()}; run it with --record at a commit "
            "that is known to be fast"
        )
    measured = {}
    for case in chosen:
        measured[case] = cases[case]()
        before = f", recorded {here[case]:.2f}x" if case in here else ""
        print(f"{case}: {measured[case]:.2f}x{before}", flush=True)
    if not arguments.record:
        return fallen(measured, here)
    records[cpu_model()] = {"machine": machine_info(), "ratios": here | measured}
    write_json(arguments.file, records)
    return []


def _read(path: Path) -> dict[str, dict]:
    """Model of processor -> machine and ratios."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        right = all(isinstance(one["ratios"], dict) for one in content.values())
    except (ValueError, TypeError, KeyError, AttributeError):
        right = False
    if not right:
        raise ValueError(f"file: {path} was not written by this benchmark")
    return content


def main(arguments: Arguments) -> None:
    """``run``; what has fallen, and what it refuses, makes it fail."""
    try:
        lines = run(arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"guard: error: {error}")
    if lines:
        sys.exit(f"slower by more than {ALLOWED_FALL:.0%}:\n" + "\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.guard"))
