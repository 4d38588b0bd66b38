"""The command ``blockdrop visualize``: which blocks a policy uses, and for which images.

The figure follows the paper's qualitative section (4.4): keep rates of the blocks, spread of the
block usage, and the images that take the fewest and the most blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor
from tyro.conf import Positional

from blockdrop_fast.commands.evaluate import prepare
from blockdrop_fast.data.batches import batches_of
from blockdrop_fast.data.image_sets import ImageFolder, ImageSet, Normalization
from blockdrop_fast.engine import Engine
from blockdrop_fast.files import atomic_write
from blockdrop_fast.networks.blockdrop import BlockDrop

EXAMPLES = 8
COLORS = ("#4269d0", "#efb118", "#3ca951", "#ff725c", "#a463f2", "#6cc5b0")
NEUTRAL = "#5f6b7a"
SMALL_IMAGE = 64  # pixels; smaller ones are drawn with their pixels visible


@dataclass(frozen=True)
class Results:
    """What a model did with the N images of a split, in their order.

    Attributes:
        decisions: (N, K) bool.
        labels: (N,) int64.
        correct: (N,) bool, whether the prediction is the label.
    """

    decisions: Tensor
    labels: Tensor
    correct: Tensor

    @property
    def usage(self) -> Tensor:
        """(N,) int64: the kept blocks of each image."""
        return self.decisions.sum(1)


def command(
    checkpoint: Positional[Path],
    out: Path,
    data: Path | None = None,
    strategy: Literal["auto", "walk", "gather", "dense"] = "auto",
    batch_size: int = 256,
    limit: int | None = None,
    device: str = "auto",
) -> None:
    """Draw which blocks a BlockDrop model uses for the test images of a data set.

    Args:
        checkpoint: BlockDrop model.
        out: the figure's file: .png, .pdf or .svg.
        data: data set folder; default: BLOCKDROP_DATA, else the embedded handwritten digits.
        strategy: how the engine executes.
        batch_size: images a batch.
        limit: use only so many test images, drawn at random.
        device: cpu, cuda, …; auto takes a GPU where there is one.
    """
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"out: expected a name that ends in .png, .pdf or .svg, got {str(out)!r}")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"out: the folder {str(out.parent)!r} does not exist")
    engine, dataset, normalization = prepare(checkpoint, data, strategy, limit, device)
    split = dataset.test
    if not isinstance(engine.model, BlockDrop):
        raise ValueError(
            f"checkpoint: {checkpoint} holds a bare backbone, which uses all blocks for all "
            "images; expected a BlockDrop model"
        )
    results = collect(engine, split, normalization, batch_size)
    figure = draw(results, split, engine.config.layers)
    with atomic_write(out) as path:
        figure.savefig(path, format=out.suffix[1:], dpi=150)
    print(f"{split.name}: {_summary(results)}")
    print(out)


def collect(
    engine: Engine,
    split: ImageSet | ImageFolder,
    normalization: Normalization,
    batch_size: int,
) -> Results:
    """Run a split through an engine at its policy's decisions."""
    decisions, labels, correct = [], [], []
    for images, batch_labels in batches_of(
        split, batch_size, normalization=normalization, device=engine.device
    ):
        output = engine(images)
        decisions.append(output.decisions.cpu())
        labels.append(batch_labels.cpu())
        correct.append((output.logits.argmax(1) == batch_labels).cpu())
    return Results(torch.cat(decisions), torch.cat(labels), torch.cat(correct))


def choose_examples(results: Results, count: int) -> tuple[list[int], list[int]]:
    """Correctly classified images with the fewest and with the most blocks.

    Splits often are sorted by class, so among images of one usage a fixed random order decides.

    Returns:
        At most ``count`` indices each, by ascending and by descending block usage; no image is
        in both.
    """
    order = torch.randperm(len(results.correct), generator=torch.Generator().manual_seed(0))
    order = order[results.correct[order]]
    order = order[results.usage[order].argsort(stable=True)].tolist()
    count = min(count, len(order) // 2)
    return order[:count], order[::-1][:count]


def draw(results: Results, split: ImageSet | ImageFolder, layers: Sequence[int]) -> Figure:
    """The figure.

    Args:
        results: of the split's images.
        split: whose images and class names are shown.
        layers: blocks of each segment; their sum is K.
    """
    # A Figure of its own, without pyplot: no display is needed, and no state is shared.
    figure = Figure(figsize=(11, 10.6), layout="constrained")
    figure.suptitle(f"{split.name}: {_summary(results)}", fontsize=13, fontweight="bold")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(2.6, 2.8, 4.6), hspace=0.02)
    _draw_keep_rates(top.subplots(), results, layers)
    left, right = middle.subplots(1, 2)
    _draw_usage(left, results)
    _draw_accuracy(right, results)
    _draw_examples(bottom, results, split)
    return figure


def _summary(results: Results) -> str:
    usage = results.usage.double()
    return (
        f"{100 * float(results.correct.double().mean()):.2f} % right with "
        f"{float(usage.mean()):.1f} ± {float(usage.std(correction=0)):.1f} of "
        f"{results.decisions.shape[1]} blocks"
    )


def _draw_keep_rates(axes: Axes, results: Results, layers: Sequence[int]) -> None:
    rates = results.decisions.double().mean(0).numpy()
    first = 0
    for segment, blocks in enumerate(layers):
        last = first + blocks
        mean = float(rates[first:last].sum())
        axes.bar(
            range(first + 1, last + 1),
            rates[first:last],
            color=COLORS[segment % len(COLORS)],
            label=f"segment {segment + 1}: {mean:.1f} of {blocks} blocks",
        )
        first = last
    axes.set(xlabel="block", ylabel="images that keep it", ylim=(0, 1), xlim=(0.4, first + 0.6))
    axes.set_title("Keep rate of each block", loc="left")
    # Beside the title, where no bar can be behind it.
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=len(layers), frameon=False, borderaxespad=0
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _tidy(axes)


def _draw_usage(axes: Axes, results: Results) -> None:
    counts = results.usage.bincount().numpy()
    (used,) = counts.nonzero()
    axes.bar(used, counts[used] / counts.sum(), color=NEUTRAL)
    mean = float(results.usage.double().mean())
    axes.axvline(mean, color=COLORS[3], linestyle="--", label=f"mean {mean:.1f}")
    axes.set(xlabel="kept blocks", ylabel="images")
    axes.set_title("Block usage", loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _tidy(axes)


def _draw_accuracy(axes: Axes, results: Results) -> None:
    images = results.usage.bincount().double().numpy()
    right = results.usage[results.correct].bincount(minlength=len(images)).double().numpy()
    (used,) = images.nonzero()
    images, accuracy = images[used], right[used] / images[used]
    # Wilson's interval, which stays in 0…1 and says something of a single image, too.
    z = 1.96
    center = (accuracy + z**2 / (2 * images)) / (1 + z**2 / images)
    half = (accuracy * (1 - accuracy) / images + z**2 / (4 * images**2)) ** 0.5
    half = z * half / (1 + z**2 / images)
    axes.vlines(used, center - half, center + half, color=NEUTRAL, alpha=0.6)
    axes.scatter(used, accuracy, s=15 + 150 * images / images.max(), color=NEUTRAL, zorder=3)
    overall = float(results.correct.double().mean())
    axes.axhline(
        overall, color=COLORS[3], linestyle="--", label=f"all images {100 * overall:.1f} %"
    )
    axes.set(xlabel="kept blocks", ylabel="right predictions", ylim=(None, 1.02))
    axes.set_title("Accuracy by block usage", loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _tidy(axes)


def _draw_examples(figure: SubFigure, results: Results, split: ImageSet | ImageFolder) -> None:
    fewest, most = choose_examples(results, EXAMPLES)
    if not fewest:
        figure.suptitle("Fewer than two images are classified correctly: none to show")
        return
    images = _images(split, fewest + most).split(len(fewest))
    rows = figure.subfigures(2, 1)
    for row, name, chosen, pixels in zip(
        rows, ("fewest", "most"), (fewest, most), images, strict=True
    ):
        row.suptitle(
            f"Classified correctly with the {name} blocks", x=0.01, ha="left", fontsize="large"
        )
        for axes, index, image in zip(
            row.subplots(1, EXAMPLES, squeeze=False)[0], chosen, pixels, strict=False
        ):
            small = max(image.shape[1:]) <= SMALL_IMAGE
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest" if small else None)
            label = split.classes[int(results.labels[index])]
            used = int(results.usage[index])
            axes.set_title("1 block" if used == 1 else f"{used} blocks", fontsize=10)
            axes.set_xlabel(label if len(label) <= 16 else f"{label[:15]}…", fontsize=10)
        for axes in row.axes:
            axes.set(xticks=[], yticks=[])
            axes.set_frame_on(False)


def _images(split: ImageSet | ImageFolder, indices: list[int]) -> Tensor:
    """(N, 3, H, W) float, 0…1: some of a split's images, as the model sees them."""
    if isinstance(split, ImageSet):
        chosen = replace(split, images=split.images[indices], labels=split.labels[indices])
    else:
        paths = tuple(split.paths[index] for index in indices)
        chosen = replace(split, paths=paths, labels=split.labels[indices])
    images, _ = next(batches_of(chosen, len(indices), device="cpu", workers=0))
    return images


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
