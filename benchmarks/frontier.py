"""``python -m benchmarks.frontier``: accuracy against cost, of many systems on one data set.

Does a policy that looks at the image beat one set of blocks for all images, and smaller networks?
Evaluates each system on the test split, times all of them in one round-robin, and writes a table
and a figure. ``benchmarks/README.md`` says how systems are described.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from benchmarks.frontier_figure import draw
from benchmarks.frontier_systems import Loaded, System, load_systems, read_systems, rivals_of
from blockdrop_fast.data.batches import batches_of
from blockdrop_fast.data.image_sets import Dataset, ImageFolder, ImageSet
from blockdrop_fast.files import atomic_write
from blockdrop_fast.machine import machine_info
from blockdrop_fast.measure import timing
from blockdrop_fast.measure.evaluation import Evaluation, evaluate
from blockdrop_fast.measure.static_line import fingerprint
from blockdrop_fast.measure.tolerance import (
    WrongLogitsError,
    make_output_reference,
    make_reference,
)
from blockdrop_fast.networks.cascade import Cascade
from blockdrop_fast.networks.checkpoints import locate
from train.config import Common
from train.loop import EVALUATION_BATCH, normalization_of, plain_batches, prepare

BATCHES = (64, 1)
# Images of a timed call: one batch, or all of them one by one. Calls go through several such
# chunks, so that no time is that of lucky images.
CHUNK = max(BATCHES)
CHUNKS = 4


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


# ------------------------------------------------------------------ accuracy


def evaluate_systems(loaded: Sequence[Loaded], dataset: Dataset, path: Path) -> list[Evaluation]:
    """Evaluate on the test split what was not evaluated before.

    Args:
        loaded: the systems.
        dataset: of whose test split.
        path: of the results: where evaluations of the same checkpoint, decisions and images are
            taken from, and new ones kept, each as soon as it is made.

    Raises:
        ValueError: the file is of another kind.
    """
    content = _earlier(path)
    # Images and labels; of no network.
    images = fingerprint(nn.Identity(), batches_of(dataset.test, EVALUATION_BATCH))
    found = []
    for number, one in enumerate(loaded, 1):
        key = _key(one, images)
        if key not in content["evaluations"]:
            print(f"{number}/{len(loaded)}: {one.system.name}", flush=True)
            batches = plain_batches(one.engine.model, dataset.test, EVALUATION_BATCH, 2)
            if one.keep is None:
                evaluation = evaluate(one.engine, batches, budget=one.system.budget)
            else:
                evaluation = evaluate(
                    one.engine, batches, lambda x, keep=one.keep: keep[: len(x)], shuffles=0
                )
            about = {"commit": machine_info()["commit"]}
            content["evaluations"][key] = evaluation.to_dict() | about
            _write(path, json.dumps(content, indent=1))
        values = content["evaluations"][key]
        found.append(Evaluation(**{name: values[name] for name in _measured()}))
    return found


def _measured() -> list[str]:
    return [one.name for one in fields(Evaluation)]


def _key(one: Loaded, images: str) -> str:
    """Hash of what an evaluation depends on, and of the names of what it holds."""
    content = locate(one.system.checkpoint).read_bytes()
    decides = [one.system.budget] if one.keep is None else one.keep[0].int().tolist()
    about = [hashlib.sha256(content).hexdigest(), images, one.keep is None, decides, _measured()]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _earlier(path: Path) -> dict:
    if not path.exists():
        return {"evaluations": {}}
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("evaluations"), dict):
        raise ValueError(f"out: {path} was not written by this benchmark")
    return content


# ------------------------------------------------------------------ time


def timed_images(test: ImageSet | ImageFolder) -> ImageSet | ImageFolder:
    """Some of a split's images, in random order: splits often are sorted by class.

    Raises:
        ValueError: fewer than a batch.
    """
    count = min(CHUNKS, len(test) // CHUNK) * CHUNK
    if count == 0:
        raise ValueError(
            f"limit: expected at least {CHUNK} test images to time, got {len(test)} (--no-times "
            "evaluates only)"
        )
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    return test.take(order[:count])


def time_systems(
    loaded: Sequence[Loaded], test: ImageSet | ImageFolder, rounds: int
) -> list[dict[int, list[list[float]]]]:
    """Check the logits of all systems, then time them round-robin at each batch size.

    Args:
        loaded: the systems.
        test: the split to draw images from.
        rounds: timed calls of each chunk of images.

    Returns:
        For each system, by batch size: for each chunk of images, the seconds of its calls. A call
        is one batch, or at batch 1 all images of the chunk one after the other.

    Raises:
        WrongLogitsError: a system is wrong; none is timed then.
        ValueError: too few images, or less than one round.
    """
    drawn = timed_images(test)
    chunks = {}
    for one in loaded:
        normalization = normalization_of(one.engine.model)
        if normalization not in chunks:
            images, _ = next(batches_of(drawn, len(drawn), normalization=normalization))
            chunks[normalization] = images.contiguous().split(CHUNK)
        check(one, chunks[normalization][0])
    timed = [{} for _ in loaded]
    for batch in BATCHES:
        calls = {}
        for one in loaded:
            parts = [chunk.split(batch) for chunk in chunks[normalization_of(one.engine.model)]]

            def call(index: int, one: Loaded = one, parts: list = parts) -> None:
                for images in parts[index % len(parts)]:
                    one.run(images)

            calls[one.system.name] = call
        count = len(drawn) // CHUNK
        with torch.inference_mode():
            samples = timing.interleave(calls, rounds=rounds * count)
        for one, values in zip(loaded, timed, strict=True):
            own = samples[one.system.name]
            values[batch] = [own[first::count] for first in range(count)]
    return timed


def check(one: Loaded, images: Tensor) -> None:
    """Raise unless a system's logits are right, at the decisions that came with them.

    Raises:
        WrongLogitsError: naming system and batch size.
    """
    reference, decided = None, None
    for batch in BATCHES:
        outputs = [one.run(part) for part in images.split(batch)]
        output = type(outputs[0])(*map(torch.cat, zip(*outputs, strict=True)))
        if decided is None or not torch.equal(output.decisions, decided):
            decided = output.decisions
            reference = (
                make_output_reference(one.engine.model, images, output, images.dtype)
                if one.keep is None
                else make_reference(one.engine.backbone, images, decided, images.dtype)
            )
        reference.check(f"{one.system.name}, batch {batch}", output.logits)


# ------------------------------------------------------------------ results


@dataclass(frozen=True)
class Row:
    """What was found of a system.

    Attributes:
        system, evaluation: which, and what it does on the test split.
        routed: whether a policy decides.
        cascade: whether its blocks are networks.
        strategy: how its engine executes.
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
        if isinstance(one.engine.model, Cascade):
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
                f"{found.flops / 1e6:.2f}",
                f"{found.effective_policies:.1f}",
                f"{gain} ± {100 * found.routing_gain_std:.2f}" if gain else "",
                *(f"{times[batch]:.3f}" if batch in times else "" for batch in BATCHES),
                flops_ahead,
                blocks_ahead,
            ]
        )
    lines.insert(1, ["---"] * len(lines[0]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = [
        [f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


# ------------------------------------------------------------------ the command


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
    rows = [
        Row(
            one.system,
            evaluation,
            one.keep is None,
            isinstance(one.engine.model, Cascade),
            one.engine.strategy,
            times,
        )
        for one, evaluation, times in zip(loaded, evaluations, samples, strict=True)
    ]
    rows = in_order(compare(rows, loaded))
    content = {
        "command": shlex.join(["python", "-m", "benchmarks.frontier", *sys.argv[1:]]),
        "machine": machine,
        "data": dataset.name,
        "images": len(dataset.test),
        "systems": [row.to_dict() for row in rows],
        "evaluations": _earlier(path)["evaluations"],
    }
    _write(path, json.dumps(content, indent=1))
    title = f"{dataset.name}, {len(dataset.test)} test images"
    about = [
        f"{title}; {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"commit {machine['commit']}, executed by {', '.join({row.strategy for row in rows})}",
        f"`{content['command']}`",
    ]
    text = "\n\n".join([*about, table(rows)]) + "\n"
    _write(arguments.out / "frontier.md", text)
    draw(rows, title, arguments.out / "frontier.png")
    print(f"\n{text}\nwritten: {arguments.out}/frontier.json, frontier.md and frontier.png")


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def main(arguments: Arguments) -> None:
    """``run``; what it refuses is one line."""
    try:
        run(arguments)
    except (OSError, ValueError, WrongLogitsError) as error:
        sys.exit(f"frontier: error: {error}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.frontier"))
