"""``python -m train.curves RUN [RUN …] --out FILE.png``: accuracy and block usage over epochs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro

from blockdrop_fast.files import atomic_write
from train.run_files import METRICS_FILE

# Panel title -> metric -> label.
PANELS = {
    "accuracy": {
        "test_accuracy": "test, thresholded decisions",
        "train_accuracy": "train, sampled decisions",
        "test_accuracy_all_blocks": "test, all blocks",
    },
    "kept blocks": {
        "test_sparsity": "test, thresholded decisions",
        "train_sparsity": "train, sampled decisions",
    },
    "reward (with the penalty of its stage)": {
        "train_thresholded_reward": "train, thresholded decisions",
        "train_reward": "train, sampled decisions",
    },
}


@dataclass(frozen=True)
class Arguments:
    """Draw the curves of training runs, one after the other."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, in the order of training."""
    out: Path = Path("curves.png")
    """PNG file to write."""


def draw(arguments: Arguments) -> None:
    """Draw ``metrics.json`` of each run; a dotted line separates the runs.

    Raises:
        FileNotFoundError: a folder without metrics.
    """
    histories = [json.loads((run / METRICS_FILE).read_text()) for run in arguments.runs]
    figure, axes = plt.subplots(1, len(PANELS), figsize=(5 * len(PANELS), 3.8))
    for axis, (title, metrics) in zip(axes, PANELS.items(), strict=True):
        for index, (metric, label) in enumerate(metrics.items()):
            first, drawn = 0, False
            for history in histories:
                points = [(first + row["epoch"], row[metric]) for row in history if metric in row]
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        color=f"C{index}",
                        marker=".",
                        label=None if drawn else label,
                    )
                    drawn = True
                first += len(history)
        ends, first = [], 0
        for history in histories[:-1]:
            first += len(history)
            ends.append(first + 0.5)
        for end in ends:
            axis.axvline(end, color="grey", linestyle=":", linewidth=1)
        axis.set_title(title)
        axis.set_xlabel("epoch, all stages")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize="small")
    figure.tight_layout()
    with atomic_write(arguments.out) as path:
        figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


if __name__ == "__main__":
    draw(tyro.cli(Arguments, prog="python -m train.curves"))
