"""``python -m benchmarks.frontier``: accuracy against cost, of many systems on one data set.

Does a policy that looks at the image beat one set of blocks for all images, and smaller networks?
Evaluates each system on the test split, times all of them in one round-robin, and writes a table
and figures. ``benchmarks/README.md`` says how systems are described.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from blockdrop_fast.files import write_json, write_text
from blockdrop_fast.machine import machine_info
from blockdrop_fast.measure.tolerance import WrongLogitsError
from train.config import Common
from train.frontier.evaluation import earlier_results, evaluate_systems
from train.frontier.figure import draw_flops, draw_times
from train.frontier.rows import made_by, rows_of, table
from train.frontier.systems import load_systems, read_systems
from train.frontier.times import time_systems, timed_images
from train.images import prepare


@dataclass(frozen=True)
class Arguments:
    """What to compare, on what, and where to write it."""

    systems: Path
    """JSON list of the systems; see benchmarks/README.md."""
    data: Path | None = None
    """Data set folder; default: BLOCKDROP_DATA, else the embedded handwritten digits."""
    out: Path = Path("frontier")
    """Folder of frontier.json, frontier.md and frontier.png. Evaluations that are in that
    frontier.json are not made again."""
    threads: int | None = None
    """CPU threads; default: torch's choice."""
    limit: int | None = None
    """Use only so many test images, drawn at random."""
    times: bool = True
    """Time the systems, too."""
    rounds: int = 5
    """Timed calls of each of the 4 batches of images."""


def run(arguments: Arguments) -> None:
    """Evaluate, time, print the table, write all files.

    Raises:
        OSError, ValueError: bad input.
        WrongLogitsError: a system's logits are wrong.
    """
    systems = read_systems(arguments.systems)
    _, dataset = prepare(Common(arguments.data, threads=arguments.threads, device="cpu"))
    if arguments.limit is not None:
        if not 1 <= arguments.limit <= len(dataset.test):
            raise ValueError(
                f"limit: expected 1 to {len(dataset.test)} images, got {arguments.limit}"
            )
        dataset = replace(dataset, test=dataset.test.subset(arguments.limit))
    if arguments.times:
        timed_images(dataset.test)  # too few are to be refused before hours of evaluations
    loaded = load_systems(systems, dataset)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "frontier.json"
    evaluations = evaluate_systems(loaded, dataset, path)
    machine = machine_info()
    samples = [{} for _ in loaded]
    if arguments.times:
        samples = time_systems(loaded, dataset.test, arguments.rounds)
    rows = rows_of(loaded, evaluations, samples)
    content = {
        "command": shlex.join(["python", "-m", "benchmarks.frontier", *sys.argv[1:]]),
        "machine": machine,
        "data": dataset.name,
        "images": len(dataset.test),
        "systems": [row.to_dict() for row in rows],
        "evaluations": earlier_results(path)["evaluations"],
    }
    write_json(path, content)
    title = f"{dataset.name}, {len(dataset.test)} test images"
    strategies = dict.fromkeys(row.strategy for row in rows)
    about = [
        f"{title}; {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"commit {machine['commit']}, executed by {', '.join(strategies)}",
        f"`{content['command']}`",
    ]
    text = "\n\n".join([*about, table(rows), *made_by(rows)]) + "\n"
    write_text(arguments.out / "frontier.md", text)
    draw_flops(rows, title, arguments.out / "frontier.png")
    if arguments.times:
        draw_times(rows, title, arguments.out / "frontier-times.png")
    print(f"\n{text}\nwritten: {arguments.out}/frontier.json, .md and figures")


def main(arguments: Arguments) -> None:
    """``run``; what it refuses is one line."""
    try:
        run(arguments)
    except (OSError, ValueError, WrongLogitsError) as error:
        sys.exit(f"frontier: error: {error}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.frontier"))
