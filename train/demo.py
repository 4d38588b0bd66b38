"""A small BlockDrop end to end on handwritten digits, and its clock.

    python -m train demo

On two CPU cores about three minutes from a fresh clone, environment and build included.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib

from blockdrop_fast.machine import machine_info

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import blockdrop_fast as bdf
from blockdrop_fast.files import atomic_write, write_json
from blockdrop_fast.measure.contenders import measure
from blockdrop_fast.measure.evaluation import Evaluation
from blockdrop_fast.measure.workload import load_workload
from train.config import Common, Demo, Expert, Joint, Pretrain, Recipe
from train.images import prepare
from train.recipe import check_data, evaluate_stages, format_verdict, stages_of
from train.stages import run_stages

# To choose the sets of the static line on.
STATIC_IMAGES = 300
FULL, FULL_ENGINE = "full, PyTorch", "full, this engine"
AUTHORS, OURS = "BlockDrop, masked", "BlockDrop, skipped"
# Row of the table -> contender of measure.contenders (for the engine's strategy, which is
# the walk wherever the extension was built), and what the row says of it.
CONTENDERS = {
    FULL: ("eager", "complete ResNet-32, batch norm folded, channels-last"),
    FULL_ENGINE: ("{strategy}-all", "complete ResNet-32 in this package's engine ({strategy})"),
    AUTHORS: ("authors", "the authors' way: compute, multiply by zero"),
    OURS: ("{strategy}", "the same engine ({strategy}): dropped blocks are not run"),
}


@dataclass(frozen=True)
class Line:
    """One line of the demo's table: an execution, its quality and its cost at each batch size."""

    name: str
    what: str
    accuracy: float
    blocks: float
    flops: float
    milliseconds: dict[int, float]
    speedup: dict[int, float]


def demo(config: Demo) -> None:
    """The recipe ``quick``, small; then accuracy, blocks, FLOPs and measured latency.

    Stages that are complete in ``config.out`` are not run again; one that was interrupted
    continues where it was.
    """
    started = time.monotonic()
    _, dataset = prepare(config)
    recipe = _recipe(config)
    stages = stages_of(recipe, _presets())
    check_data(stages, dataset)
    run_stages(stages)
    trained = time.monotonic() - started
    results = evaluate_stages(recipe, stages, dataset)
    evaluations = {FULL: results["full network"], OURS: results["BlockDrop"]}
    evaluations |= {FULL_ENGINE: evaluations[FULL], AUTHORS: evaluations[OURS]}
    lines, machine = _measure(config, stages["refit"].checkpoint, evaluations)
    print("\n" + format_lines(lines, dataset.name, results))
    figure = config.out / "demo.png"
    draw(lines, evaluations[OURS], dataset.name, figure)
    content = {
        "machine": machine,
        "lines": [asdict(line) for line in lines],
        "evaluation": evaluations[OURS].to_dict(),
    }
    write_json(config.out / "demo.json", content)
    print(
        f"\ntrained in {trained:.0f} s, all in {time.monotonic() - started:.0f} s on "
        f"{machine['cpu']}, {machine['threads']} threads; figure: {figure}"
    )


def _presets() -> dict[str, Common]:
    """The stages of the recipe, small."""
    same = {"batch_size": 64, "evaluate_every": 1000, "checkpoint_every": 5}
    line = {"static_images": STATIC_IMAGES}
    held_out = {"held_out": 250}
    return {
        "pretrain": Pretrain(epochs=12, lr=0.1, **same),
        "droppable": Pretrain(
            droppable=True, epochs=12, lr=0.1, chain_images=STATIC_IMAGES, chain_every=4, **same
        ),
        "expert": Expert(epochs=20, line_images=STATIC_IMAGES, **held_out, **line, **same),
        "joint": Joint(epochs=10, **held_out, **line, **same),
        "refit": Expert(epochs=5, **held_out, **line, **same),
        "control": Joint(epochs=10, **held_out, **line, **same),
    }


def _recipe(config: Demo) -> Recipe:
    names = [field.name for field in fields(Common) if field.name not in ("out", "resume")]
    return Recipe(
        **{name: getattr(config, name) for name in names},
        out=config.out,
        recipe="quick",
        epochs=config.epochs,
        budget=config.budget,
        static_images=STATIC_IMAGES,
    )


def _measure(
    config: Demo, checkpoint: Path, evaluations: dict[str, Evaluation]
) -> tuple[list[Line], dict]:
    """Time the contenders, right logits first, on test images at the policy's decisions."""
    workload = load_workload(checkpoint, max(config.batches), config.data)
    strategy = bdf.compile(bdf.load(checkpoint)).strategy
    contenders = {
        name: contender.format(strategy=strategy) for name, (contender, _) in CONTENDERS.items()
    }
    seconds: dict[str, dict[int, float]] = {name: {} for name in CONTENDERS}
    for batch in config.batches:
        measured = measure(workload, batch, list(contenders.values()), rounds=7, min_seconds=2.0)
        rows = {row.contender: row for row in measured.rows}
        for name, contender in contenders.items():
            seconds[name][batch] = rows[contender].seconds
    lines = [
        Line(
            name=name,
            what=what.format(strategy=strategy),
            accuracy=evaluations[name].accuracy,
            blocks=evaluations[name].block_usage,
            flops=evaluations[name].flops,
            milliseconds={batch: 1e3 * value for batch, value in seconds[name].items()},
            speedup={batch: seconds[FULL][batch] / value for batch, value in seconds[name].items()},
        )
        for name, (_, what) in CONTENDERS.items()
    ]
    return lines, machine_info()


def format_lines(lines: list[Line], dataset: str, results: dict[str, Evaluation]) -> str:
    """The table, and what its model's routing is worth, to print.

    Args:
        results: of ``train.recipe.evaluate_stages``.
    """
    batches = list(lines[0].milliseconds)
    head = f"{dataset + ', test split':<20} {'accuracy':>9} {'blocks':>7} {'FLOPs':>9}"
    head += "".join(f" {f'ms, batch {batch}':>14} {'speed-up':>8}" for batch in batches)
    rows = [head, "-" * len(head)]
    for line in lines:
        row = f"{line.name:<20} {100 * line.accuracy:>7.2f} % {line.blocks:>7.2f}"
        row += f" {line.flops:>9.3g}"
        for batch in batches:
            row += f" {line.milliseconds[batch]:>14.2f} {line.speedup[batch]:>7.2f}x"
        rows.append(row)
    rows.append("")
    rows += [f"{line.name}: {line.what}" for line in lines]
    rows.append("BlockDrop times include the policy network; medians of interleaved calls.")
    rows += ["", *results["BlockDrop"].format().splitlines()[2:], *format_verdict(results)]
    return "\n".join(rows)


def draw(lines: list[Line], evaluation: Evaluation, dataset: str, path: Path) -> None:
    """The figure: milliseconds of each execution, and which blocks the images keep."""
    batches = list(lines[0].milliseconds)
    figure, axes = plt.subplots(1, len(batches) + 1, figsize=(5 * len(batches) + 5, 4.2))
    colours = ["#7a7f87", "#4f7cac", "#c9a227", "#2a7f62"]
    for axis, batch in zip(axes, batches, strict=False):
        values = [line.milliseconds[batch] for line in lines]
        axis.bar(range(len(lines)), values, color=colours, width=0.65)
        for index, line in enumerate(lines):
            axis.text(index, values[index], f"{line.speedup[batch]:.2f}x", ha="center", va="bottom")
        axis.set_xticks(range(len(lines)), [line.name.replace(", ", ",\n") for line in lines])
        axis.set_ylabel("milliseconds a batch")
        axis.set_title(f"batch {batch}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    axis = axes[-1]
    ends, start = [], 0
    for number, blocks in enumerate(evaluation.segment_blocks):
        index = range(start, start + blocks)
        rates = [evaluation.keep_rates[k] for k in index]
        axis.bar([k + 1 for k in index], rates, label=f"segment {number + 1}", width=0.8)
        start += blocks
        ends.append(start)
    axis.set_xlabel("residual block")
    axis.set_ylabel("share of images that keep it")
    axis.set_ylim(0, 1.18)
    axis.legend(ncols=len(ends), loc="upper center", frameon=False, fontsize="small")
    axis.set_title(f"{evaluation.block_usage:.1f} of {evaluation.num_blocks} blocks an image")
    axis.spines[["top", "right"]].set_visible(False)
    ours, full = lines[-1], lines[0]
    figure.suptitle(
        f"{dataset}: accuracy {100 * ours.accuracy:.1f} % with dropped blocks, "
        f"{100 * full.accuracy:.1f} % with all"
    )
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
