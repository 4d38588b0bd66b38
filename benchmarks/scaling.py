"""``python benchmarks/scaling.py``: is time proportional to the work that is left?

Times an engine against the batch size at fixed decisions, and against the number of kept blocks
at a fixed batch size, fits a straight line to each, and draws both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib

from blockdrop_fast.machine import machine_info

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

from blockdrop_fast import heuristics
from blockdrop_fast.files import atomic_write, write_json
from blockdrop_fast.measure import timing
from blockdrop_fast.measure.tolerance import CHECKED_IMAGES, make_reference
from blockdrop_fast.measure.workload import make_workload


@dataclass(frozen=True)
class Arguments:
    """What to measure, and where to write it."""

    network: str = "resnet110"
    strategy: str = "walk"
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    batch: int = 64
    """Batch size while the number of kept blocks varies."""
    points: int = 10
    """Numbers of kept blocks, evenly from none to all."""
    rounds: int = 7
    out: Path = Path("scaling")
    """Writes OUT.json and OUT.png."""


def measure(arguments: Arguments) -> dict:
    """Median seconds by batch size and by kept blocks, policy network excluded, interleaved.

    Before timing, the logits of every case of 64 images or more are checked.
    """
    workload = make_workload(arguments.network, max(arguments.batches))
    engine = workload.engine(arguments.strategy)
    images, decisions = workload.images, workload.decisions
    segments = workload.model.backbone.config.layers
    total = sum(segments)
    kept = sorted({round(total * i / (arguments.points - 1)) for i in range(arguments.points)})
    by_kept = {
        keep: heuristics.random_k(keep, segments, arguments.batch, per_image=True) for keep in kept
    }
    cases = {("batch", size): (images[:size], decisions[:size]) for size in arguments.batches}
    cases |= {("kept", keep): (images[: arguments.batch], by_kept[keep]) for keep in kept}
    for case, (inputs, keep) in cases.items():
        if len(inputs) < CHECKED_IMAGES:
            continue  # The tolerance is meant for 64 images on, and smaller batches are slices.
        reference = make_reference(workload.model.backbone, inputs, keep, inputs.dtype)
        reference.check(f"{arguments.strategy}, {case}", engine.run(inputs, keep))
    samples = timing.interleave(
        {case: lambda _, one=one: engine.run(*one) for case, one in cases.items()},
        rounds=arguments.rounds,
    )
    medians = {case: timing.median(values) for case, values in samples.items()}
    return {
        "network": arguments.network,
        "strategy": arguments.strategy,
        "machine": machine_info(),
        "mean_kept": float(decisions.sum(1).double().mean()),
        "batch": [[size, medians["batch", size]] for size in arguments.batches],
        "kept_batch": arguments.batch,
        "kept": [[keep, medians["kept", keep]] for keep in kept],
        "fits": {
            "batch": fit([(size, medians["batch", size]) for size in arguments.batches]),
            "kept": fit([(keep, medians["kept", keep]) for keep in kept]),
        },
    }


def fit(points: list[tuple[float, float]]) -> dict[str, float]:
    """Least-squares line seconds = fixed + slope x, and R^2."""
    x, y = (np.array(values, dtype=float) for values in zip(*points, strict=True))
    slope, fixed = np.polyfit(x, y, 1)
    residual = y - (fixed + slope * x)
    r_squared = 1 - float((residual**2).sum() / ((y - y.mean()) ** 2).sum())
    return {"fixed": float(fixed), "slope": float(slope), "r_squared": r_squared}


def draw(result: dict, path: Path) -> None:
    """Points and their lines, side by side."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    panels = (
        ("batch", "images in the batch", f"{result['mean_kept']:.1f} blocks kept on average"),
        ("kept", "kept blocks of each image", f"batch {result['kept_batch']}"),
    )
    for axis, (name, label, title) in zip(axes, panels, strict=True):
        x, y = zip(*result[name], strict=True)
        line = result["fits"][name]
        axis.plot(x, [1e3 * value for value in y], "o", color="C0")
        ends = [0, max(x)]
        axis.plot(
            ends,
            [1e3 * (line["fixed"] + line["slope"] * value) for value in ends],
            color="C1",
            label=f"{1e3 * line['fixed']:.2f} ms + {1e6 * line['slope']:.0f} µs each, "
            f"R² = {line['r_squared']:.4f}",
        )
        axis.set_xlim(0)
        axis.set_ylim(0)
        axis.set_xlabel(label)
        axis.set_ylabel("milliseconds")
        axis.set_title(f"{result['network']}, {result['strategy']}: {title}")
        axis.legend(frameon=False, loc="upper left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def main(arguments: Arguments) -> None:
    """Measure, print the fits, write both files."""
    with torch.inference_mode():
        result = measure(arguments)
    for name, line in result["fits"].items():
        print(
            f"{name}: {1e3 * line['fixed']:.3f} ms + {1e6 * line['slope']:.1f} µs each, "
            f"R² {line['r_squared']:.5f}"
        )
    write_json(arguments.out.with_suffix(".json"), result)
    draw(result, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python benchmarks/scaling.py"))
