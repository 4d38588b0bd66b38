"""``python -m benchmarks.pruning``: what fewer filters are worth on the clock.

Counted and measured speed-ups of a pruned BlockDrop model (of ``python -m train pfec``) over the
complete network that it was pruned from, both in the same engine, all engines interleaved: by fewer
filters, by dropped blocks, by both. FLOPs are only saved where an engine makes use of the widths.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from blockdrop_fast.files import write_text
from blockdrop_fast.machine import machine_info
from blockdrop_fast.measure import contenders, timing
from blockdrop_fast.measure.baselines import UnavailableError
from blockdrop_fast.measure.tolerance import WrongLogitsError
from blockdrop_fast.measure.workload import Workload, load_workload
from blockdrop_fast.networks.flops import flops
from train.frontier.rows import markdown

COMPLETE = ("eager", "onnxruntime", "openvino", "gather-all", "walk-all")
DROPPING = ("gather", "walk")
ENGINES = ("eager", "onnxruntime", "openvino", "gather", "walk")
IMAGES = 64


@dataclass(frozen=True)
class Arguments:
    """What to time, and where to write it."""

    pruned: Path
    """BlockDrop checkpoint with a pruned backbone."""
    whole: Path
    """The one that it was made from, or its name."""
    data: Path | None = None
    """Data set folder; default: BLOCKDROP_DATA, else the embedded handwritten digits."""
    out: Path = Path("pruning")
    """Beginning of the files' names; .json and .md are added."""
    batches: tuple[int, ...] = (1, 64)
    rounds: int = 20
    min_seconds: float = 10.0
    """Of each batch size."""


def measure(
    workloads: dict[str, Workload], batch: int, rounds: int, min_seconds: float
) -> tuple[dict[tuple[str, str], float], dict[str, str]]:
    """Check all logits, then time everything round-robin.

    Args:
        workloads: "whole" and "pruned", each with its own decisions on the same images.
        batch: images a call.
        rounds, min_seconds: see ``timing.interleave``.

    Returns:
        Median seconds by (workload, contender); and who cannot run here, and why.

    Raises:
        WrongLogitsError: a contender is wrong; none is timed then.
    """
    calls: dict[str, Callable[[int], object]] = {}
    missing: dict[str, str] = {}
    for which, workload in workloads.items():
        batches = timing.chunks(batch, workload.images, workload.decisions)
        for name in COMPLETE + DROPPING:
            kind = contenders.CONTENDERS[name][0]
            try:
                run = contenders.build(name, workload, batches[0][0])
            except UnavailableError as error:
                missing[name] = str(error)
                continue
            one = timing.Contender(name, run, kind)
            timing.check_contender(one, batches, workload.all_kept, workload.at_decisions)
            calls[f"{which} {name}"] = lambda index, run=run, batches=batches: run(
                *batches[index % len(batches)]
            )
    with torch.inference_mode():
        samples = timing.interleave(calls, rounds=rounds, min_seconds=min_seconds)
    seconds = {tuple(key.split()): timing.median(values) for key, values in samples.items()}
    return seconds, missing


def counted(workloads: dict[str, Workload]) -> dict[str, float]:
    """FLOPs of the complete networks and at the decisions, policy included, of an image."""
    return {
        f"{which} {what}": float(flops(model, decisions).mean())
        for which, workload in workloads.items()
        for what, model, decisions in (
            ("complete", workload.model.backbone, None),
            ("dropping", workload.model, workload.decisions),
        )
    }


def table(seconds: dict[int, dict[tuple[str, str], float]], costs: dict[str, float]) -> str:
    """Markdown: speed-ups over the complete network before pruning, in the same engine."""
    head = ["", "counted", *(f"{name}, batch {batch}" for batch in seconds for name in ENGINES)]
    lines = [head]
    for label, which, what in (
        ("fewer filters", "pruned", "complete"),
        ("dropped blocks", "whole", "dropping"),
        ("both", "pruned", "dropping"),
    ):
        line = [label, f"{costs['whole complete'] / costs[f'{which} {what}']:.2f}x"]
        for found in seconds.values():
            for engine in ENGINES:
                own = engine in DROPPING
                before = found.get(("whole", f"{engine}-all" if own else engine))
                name = engine if not own or what == "dropping" else f"{engine}-all"
                after = found.get((which, name)) if own or what == "complete" else None
                line.append(f"{before / after:.2f}x" if before and after else "")
        lines.append(line)
    return markdown(lines)


def run(arguments: Arguments) -> None:
    """Time, print the table, write both files.

    Raises:
        OSError, ValueError: bad input.
        WrongLogitsError: logits are wrong.
    """
    workloads = {
        "whole": load_workload(arguments.whole, IMAGES, arguments.data),
        "pruned": load_workload(arguments.pruned, IMAGES, arguments.data),
    }
    if workloads["pruned"].model.backbone.config.block_widths is None:
        raise ValueError(f"pruned: {arguments.pruned} has all its filters")
    costs, seconds, missing = counted(workloads), {}, {}
    for batch in arguments.batches:
        seconds[batch], missing = measure(workloads, batch, arguments.rounds, arguments.min_seconds)
    for name, why in missing.items():
        print(f"{name}: not timed, {why}")
    machine = machine_info()
    content = {
        "command": shlex.join(["python", "-m", "benchmarks.pruning", *sys.argv[1:]]),
        "machine": machine,
        "flops": costs,
        "milliseconds": {
            batch: {" ".join(key): 1e3 * value for key, value in found.items()}
            for batch, found in seconds.items()
        },
    }
    text = "\n\n".join(
        [
            f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
            f"commit {machine['commit']}",
            f"`{content['command']}`",
            table(seconds, costs),
        ]
    )
    for suffix, written in ((".json", json.dumps(content, indent=1)), (".md", text)):
        write_text(Path(f"{arguments.out}{suffix}"), written + "\n")
    print(text)


def main(arguments: Arguments) -> None:
    """``run``; what it refuses is one line."""
    try:
        run(arguments)
    except (OSError, ValueError, WrongLogitsError) as error:
        sys.exit(f"pruning: error: {error}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.pruning"))
