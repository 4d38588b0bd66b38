"""The command ``blockdrop visualize``: which blocks a policy uses, and for which images.

The figure follows the paper's qualitative section (4.4): keep rates of the blocks, spread of the
block usage, and the images that take the fewest and the most blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure, SubFigure
from tyro.conf import Positional

from blockdrop_fast.commands.charts import draw_accuracy, draw_keep_rates, draw_usage
from blockdrop_fast.commands.evaluate import prepare_policy
from blockdrop_fast.commands.outcomes import Results, choose_examples, collect, images_of
from blockdrop_fast.data.image_sets import ImageFolder, ImageSet
from blockdrop_fast.files import atomic_write, check_new_file

EXAMPLES = 8
SMALL_IMAGE = 64  # pixels; smaller ones are drawn with their pixels visible


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
    check_new_file("out", out, (".png", ".pdf", ".svg"))
    engine, dataset, normalization = prepare_policy(checkpoint, data, strategy, limit, device)
    split = dataset.test
    results = collect(engine, split, normalization, batch_size)
    figure = draw(results, split, engine.config.layers)
    with atomic_write(out) as path:
        figure.savefig(path, format=out.suffix[1:], dpi=150)
    print(f"{split.name}: {_summary(results)}")
    print(out)


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
    draw_keep_rates(top.subplots(), results, layers)
    left, right = middle.subplots(1, 2)
    draw_usage(left, results)
    draw_accuracy(right, results)
    _draw_examples(bottom, results, split)
    return figure


def _summary(results: Results) -> str:
    usage = results.usage.double()
    return (
        f"{100 * float(results.correct.double().mean()):.2f} % right with "
        f"{float(usage.mean()):.1f} ± {float(usage.std(correction=0)):.1f} of "
        f"{results.decisions.shape[1]} blocks"
    )


def _draw_examples(figure: SubFigure, results: Results, split: ImageSet | ImageFolder) -> None:
    fewest, most = choose_examples(results, EXAMPLES)
    if not fewest:
        figure.suptitle("Fewer than two images are classified correctly: none to show")
        return
    images = images_of(split, fewest + most).split(len(fewest))
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
