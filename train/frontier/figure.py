"""Figures of systems: a point a system, a line a group, names where there is room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

from blockdrop_fast.files import atomic_write
from train.frontier.rows import Row

MARKERS = "osD^vP*X<>"
COLORS = [*plt.get_cmap("tab10").colors, *plt.get_cmap("Dark2").colors]
DPI = 150
# Where a name may be: in 16 directions from its point, the nearest places first; and how bad it is
# to cover a line there, a point, or another name.
ANGLES = np.arange(16) * (2 * np.pi / 16)
DIRECTIONS = np.tile(np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1), (6, 1))
DISTANCES = np.repeat([12, 25, 45, 70, 100, 140], 16)[:, None]  # in pixels
LINE, POINT, NAME = 1, 10, 100


class Panel(NamedTuple):
    """What is to the right in a part of a figure.

    Attributes:
        label: of the axis.
        cost: of a row.
        spread: of the cost, drawn to both sides; None: nothing is drawn.
    """

    label: str
    cost: Callable[[Row], float]
    spread: Callable[[Row], float] | None = None


def draw_flops(rows: Sequence[Row], title: str, path: Path) -> None:
    """Accuracy against FLOPs, with their standard deviation over images (the paper's Fig. 3).

    Args:
        rows: of a group side by side.
        title: of the figure.
        path: of the PNG.
    """
    panel = Panel(
        "MFLOPs an image ± standard deviation over images, policy included",
        lambda row: row.evaluation.flops / 1e6,
        lambda row: row.evaluation.flops_std / 1e6,
    )
    _draw(rows, title, path, [panel])


def draw_times(rows: Sequence[Row], title: str, path: Path) -> None:
    """Accuracy against measured time at each batch size, of the systems that were timed.

    Args: as of ``draw_flops``.
    """
    rows = [row for row in rows if row.samples]
    panels = [
        Panel(
            f"milliseconds an image at batch {batch}, policy included",
            lambda row, batch=batch: row.milliseconds[batch] / batch,
        )
        for batch in sorted(rows[0].samples)
    ]
    _draw(rows, title, path, panels)


def _draw(rows: Sequence[Row], title: str, path: Path, panels: Sequence[Panel]) -> None:
    groups = [list(own) for _, own in groupby(rows, lambda row: row.system.group)]
    figure, (axes,) = plt.subplots(
        1, len(panels), figsize=(9 * len(panels), 8), dpi=DPI, squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes, panels, strict=True):
        for number, group in enumerate(groups):
            own = sorted(group, key=panel.cost)
            axis.errorbar(
                [panel.cost(row) for row in own],
                [100 * row.evaluation.accuracy for row in own],
                [100 * row.standard_error for row in own],
                panel.spread and [panel.spread(row) for row in own],
                color=COLORS[number % len(COLORS)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=5,
                linewidth=1,
                elinewidth=0.5,
                label=group[0].system.group,
            )
        axis.margins(0.1)
        axis.set_xlim(left=max(0, axis.get_xlim()[0]))
        axis.set(xlabel=panel.label, ylabel="accuracy, % (± standard error)")
        axis.grid(color="0.93")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(title)
    figure.draw_without_rendering()  # axes are where they will be
    for axis, panel in zip(axes, panels, strict=True):
        label_points(
            axis, [[row.system.name for row in sorted(group, key=panel.cost)] for group in groups]
        )
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


def label_points(axis: Axes, names: Sequence[Sequence[str]]) -> np.ndarray:
    """Write a name near each point, where it covers as little as possible.

    Args:
        axis: laid out, with a line for each group, by ``errorbar``.
        names: of each line's points.

    Returns:
        (names, 4): left, lower, right and upper ends of each, in pixels.
    """
    renderer = axis.figure.canvas.get_renderer()
    lines = [container.lines[0] for container in axis.containers]
    pixels = [axis.transData.transform(line.get_xydata()) for line in lines]
    taken = np.concatenate([_boxes(points, 6) for points in pixels])
    weights = np.full(len(taken), POINT)
    for points in pixels:
        for start, end in pairwise(points):
            stroke = _boxes(np.linspace(start, end, 20), 1)
            taken = np.concatenate([taken, stroke])
            weights = np.append(weights, [LINE] * len(stroke))
    count = len(taken)
    for line, points, texts in zip(lines, pixels, names, strict=True):
        color = line.get_color()
        for place, point, text in zip(line.get_xydata(), points, texts, strict=True):
            label = axis.annotate(
                text, place, (0, 0), textcoords="offset pixels", color=color, fontsize=7,
                ha="center", va="center", path_effects=[withStroke(linewidth=2, foreground="w")],
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": color},
            )  # fmt: skip
            label.update_positions(renderer)
            half = Text.get_window_extent(label, renderer).size / 2
            # The name's edge, not its middle, is at that distance.
            offsets = DIRECTIONS * (DISTANCES + half * np.abs(DIRECTIONS))
            boxes = _boxes(point + offsets, half)
            covers = (boxes[:, None, :2] < taken[:, 2:]) & (taken[:, :2] < boxes[:, None, 2:])
            outside = (boxes[:, 0] < axis.bbox.x0) | (boxes[:, 2] > axis.bbox.x1)
            best = (covers.all(-1) @ weights + NAME * outside).argmin()
            label.xyann = tuple(offsets[best])
            taken, weights = np.vstack([taken, boxes[best]]), np.append(weights, NAME)
    return taken[count:]


def _boxes(middles: np.ndarray, half: np.ndarray | float) -> np.ndarray:
    """(N, 2) -> (N, 4), with so much on each side."""
    return np.hstack([middles - half, middles + half])
