"""Charts of which blocks, or networks, a policy uses, each on axes of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from blockdrop_fast.commands.outcomes import Results

COLORS = ("#4269d0", "#efb118", "#3ca951", "#ff725c", "#a463f2", "#6cc5b0")
NEUTRAL = "#5f6b7a"


def draw_keep_rates(
    axes: Axes, results: Results, layers: Sequence[int], narrow: bool = False
) -> None:
    """Bars: the share of images that keep each block, coloured by segment.

    Args:
        narrow: there is no room for the legend beside the title.
    """
    rates = results.decisions.double().mean(0).numpy()
    first = 0
    for segment, blocks in enumerate(layers):
        last = first + blocks
        mean = float(rates[first:last].sum())
        axes.bar(
            range(first + 1, last + 1),
            rates[first:last],
            color=COLORS[segment % len(COLORS)],
            label=f"{mean:.1f} of {blocks}"
            if narrow
            else f"segment {segment + 1}: {mean:.1f} of {blocks} blocks",
        )
        first = last
    axes.set(
        xlabel=results.unit, ylabel="images that keep it", ylim=(0, 1), xlim=(0.4, first + 0.6)
    )
    axes.set_title(f"Keep rate of each {results.unit}", loc="left")
    # Where no bar can be behind it.
    axes.legend(
        loc="lower left" if narrow else "lower right",
        bbox_to_anchor=(0, 1.1) if narrow else (1, 1),
        ncols=len(layers),
        frameon=False,
        borderaxespad=0,
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    tidy(axes)


def draw_usage(axes: Axes, results: Results) -> None:
    """Histogram of the block usage."""
    counts = results.usage.bincount().numpy()
    (used,) = counts.nonzero()
    axes.bar(used, counts[used] / counts.sum(), color=NEUTRAL)
    mean = float(results.usage.double().mean())
    axes.axvline(mean, color=COLORS[3], linestyle="--", label=f"mean {mean:.1f}")
    axes.set(xlabel=f"kept {results.unit}s", ylabel="images")
    axes.set_title(f"{results.unit.capitalize()} usage", loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    tidy(axes)


def draw_accuracy(axes: Axes, results: Results) -> None:
    """Accuracy of the images of each block usage, with 95 % intervals."""
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
    axes.set(xlabel=f"kept {results.unit}s", ylabel="right predictions", ylim=(None, 1.02))
    axes.set_title(f"Accuracy by {results.unit} usage", loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    tidy(axes)


def tidy(axes: Axes) -> None:
    """A light grid, and whole numbers of blocks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def draw_confidence(axes: Axes, results: Results, confidence: Tensor) -> None:
    """Block usage against how sure the complete network is: means of ten equal parts of the images.

    Args:
        confidence: (N,), the complete network's largest probability.
    """
    parts = confidence.argsort(stable=True).tensor_split(10)
    parts = [part for part in parts if len(part)]
    usage = results.usage.double()
    x = [float(confidence[part].double().mean()) for part in parts]
    y = [float(usage[part].mean()) for part in parts]
    spread = [float(usage[part].std(correction=0)) for part in parts]
    axes.errorbar(x, y, spread, fmt="o-", color=NEUTRAL, ecolor="0.8", markersize=4)
    axes.set(xlabel="complete network's confidence", ylabel=f"kept {results.unit}s")
    axes.set_title("Usage by confidence", loc="left")
    tidy(axes)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(5))


def draw_latency(axes: Axes, milliseconds: Mapping[str, float], batch: int) -> None:
    """Bars: the time of a batch of each contender, by name."""
    values = list(milliseconds.values())
    places = range(len(values))
    axes.barh(places, values, height=0.4, color=[COLORS[0]] + [NEUTRAL] * (len(values) - 1))
    for place, (name, value) in enumerate(milliseconds.items()):
        axes.text(0, place - 0.25, f" {name}: {value:.3g} ms")
    axes.set(xlabel="milliseconds", yticks=[], ylim=(len(values) - 0.5, -0.7))
    axes.set_title(f"Batch of {batch}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
