"""The page of ``blockdrop report``: findings in, one HTML file out, without links to others."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from blockdrop_fast.commands.charts import (
    COLORS,
    draw_accuracy,
    draw_confidence,
    draw_keep_rates,
    draw_latency,
    draw_usage,
)
from blockdrop_fast.commands.outcomes import Results, choose_examples, images_of
from blockdrop_fast.data.image_sets import ImageFolder, ImageSet
from blockdrop_fast.measure.evaluation import Evaluation

MAX_CLASSES = 12  # that are shown one by one
POLICIES = 3  # of a class
EXAMPLES = 5
THUMBNAIL = 96  # pixels

STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --soft: #5f6b7a; --line: #dfe3e8; --card: #fff;
  --page: #f5f6f8; --off: #e3e7ec; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --soft: #a3adba; --line: #343b47;
  --card: #1d222b; --page: #14171d; --off: #343b47; } .chart { background: #fff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: .5rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .25rem; }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 46rem; }
.soft { color: var(--soft); font-size: .875rem; }
.grid { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .75rem; min-width: 0; }
.figures { display: grid; gap: .75rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
.figures b { display: block; font-size: 1.4rem; line-height: 1.2; }
.chart svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; }
td, th { padding: .15rem .4rem; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
.heat { width: 100%; }
.heat td { padding: 0; min-width: .4rem; height: 1.1rem; }
.heat td:nth-child(-n+3) { width: 1%; }
.heat td:first-child { padding-right: .5rem; }
.strip { display: flex; gap: 1px; margin: .2rem 0; }
.strip i { flex: 1; height: .7rem; background: var(--off); border-radius: 1px; }
.strip i.gap { margin-left: .3rem; }
.images { display: flex; flex-wrap: wrap; gap: .25rem; margin: .25rem 0 .5rem; }
figure { margin: 0; width: 3.5rem; }
figure img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: .25rem;
  display: block; }
figure img.small { image-rendering: pixelated; }
figcaption { font-size: .75rem; color: var(--soft); text-align: center; }
"""


@dataclass(frozen=True)
class Latency:
    """Median milliseconds a batch of one contender."""

    batch: int
    contender: str
    milliseconds: float


@dataclass(frozen=True)
class Findings:
    """All that the page tells.

    Attributes:
        title: the model's name.
        split: the images.
        layers: blocks of each segment; of a cascade, each of its networks by itself.
        results: of the split's images.
        evaluation: of the same.
        complete: (2, N), the complete network's largest probability, and whether it is right.
        latencies: "this model" and complete networks at some batch sizes; may be empty.
        machine: of ``machine_info``.
        strategy: how the engine executes, and why.
    """

    title: str
    split: ImageSet | ImageFolder
    layers: tuple[int, ...]
    results: Results
    evaluation: Evaluation
    complete: Tensor
    latencies: Sequence[Latency]
    machine: Mapping[str, Any]
    strategy: str


def page(found: Findings) -> str:
    """The page's HTML."""
    title = html.escape(found.title)
    sections = [_summary(found), _charts(found), _classes(found), _examples(found), _about(found)]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )


# ------------------------------------------------------------------ parts of the page


def _summary(found: Findings) -> str:
    one, unit = found.evaluation, found.results.unit
    complete = float(found.complete[1].mean())
    figures = {
        "right": f"{100 * one.accuracy:.2f} %",
        f"right with {_everything(found)}": f"{100 * complete:.2f} %",
        f"of {one.num_blocks} {unit}s": f"{one.block_usage:.1f} ± {one.block_usage_std:.1f}",
        "million FLOPs an image": f"{one.flops / 1e6:.1f}",
        f"different policies, {one.effective_policies:.1f} by entropy": str(one.unique_policies),
    }
    if one.routing_gain is not None:
        figures["points lost when decisions are shuffled among the images"] = (
            f"{100 * one.routing_gain:.2f}"
        )
    if one.static_accuracy is not None:
        figures["right with the best set of so many blocks for all images, not retrained"] = (
            f"{100 * one.static_accuracy:.2f} %"
        )
    cards = "".join(
        f'<div class="card"><b>{html.escape(value)}</b><span class="soft">{html.escape(name)}'
        "</span></div>"
        for name, value in figures.items()
    )
    return (
        f'<p class="soft">{html.escape(found.split.name)}, {one.images} images</p>\n'
        f'<div class="figures">{cards}</div>\n<p>{_verdict(one, unit)}</p>'
    )


def _everything(found: Findings) -> str:
    """What the complete network is."""
    return "its last network" if found.results.unit == "network" else "all its blocks"


def _verdict(one: Evaluation, unit: str) -> str:
    if one.unique_policies == 1:
        return f"All images use the same {unit}s: this is a static network."
    if one.routing_gain is None:
        return ""
    noise = max(2 * (one.routing_gain_std or 0.0), 0.002)
    if one.routing_gain < noise:
        return (
            "With the decisions of other images it is as good: what it decides is not about the "
            "image."
        )
    return "With the decisions of other images it is worse: what it decides is about the image."


def _charts(found: Findings) -> str:
    results = found.results
    charts: list[Callable[[Axes], None]] = [
        lambda axes: draw_keep_rates(axes, results, found.layers, narrow=True),
        lambda axes: draw_usage(axes, results),
        lambda axes: draw_accuracy(axes, results),
        lambda axes: draw_confidence(axes, results, found.complete[0]),
    ]
    for batch in dict.fromkeys(one.batch for one in found.latencies):
        times = {one.contender: one.milliseconds for one in found.latencies if one.batch == batch}
        charts.append(lambda axes, times=times, batch=batch: draw_latency(axes, times, batch))
    cards = "".join(f'<div class="card chart">{_svg(draw)}</div>' for draw in charts)
    title = f"{results.unit.capitalize()}s, accuracy, time"
    return f'<h2>{title}</h2>\n<div class="grid">{cards}</div>'


def _svg(draw: Callable[[Axes], None]) -> str:
    """A chart small enough that its letters can be read on a phone."""
    with rc_context({"svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.4, 2.9), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        # Without a date, so that the same findings give the same page.
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _shown_classes(found: Findings) -> list[int]:
    present = found.results.labels.unique().tolist()
    return present[:MAX_CLASSES]


def _classes(found: Findings) -> str:
    """Keep rate per block and class."""
    rows = []
    for label in _shown_classes(found):
        mine = found.results.labels == label
        rates = found.results.decisions[mine].double().mean(0).tolist()
        cells = "".join(
            f'<td title="{found.results.unit} {k}: {100 * rate:.0f} %" style="background:rgba('
            f'{_rgb(_segment(found.layers, k - 1))},{rate:.2f})"></td>'
            for k, rate in enumerate(rates, 1)
        )
        usage = float(found.results.usage[mine].double().mean())
        right = float(found.results.correct[mine].double().mean())
        rows.append(
            f"<tr><td>{_class_name(found, label)}</td><td>{usage:.1f}&nbsp;</td>"
            f"<td>{100 * right:.1f} %&nbsp;</td>{cells}</tr>"
        )
    unit = found.results.unit
    segments = " Colours are segments." if unit == "block" else ""
    return (
        f"<h2>Which {unit}s a class uses</h2>\n"
        f'<p class="soft">Kept {unit}s, right predictions, then a cell a {unit}: the stronger its '
        f"colour, the more images of the class keep it.{segments}</p>\n"
        f'<div class="card scroll"><table class="heat">{"".join(rows)}</table></div>'
    )


def _examples(found: Findings) -> str:
    """Dominant policies of a class, and its easiest and hardest images (paper, Fig. 4 and 5)."""
    cards, unit = [], found.results.unit
    for label in _shown_classes(found):
        parts = [f"<h3>{_class_name(found, label)}</h3>"]
        mine = (found.results.labels == label).nonzero().squeeze(1)
        policies, which, counts = found.results.decisions[mine].unique(
            dim=0, return_inverse=True, return_counts=True
        )
        for index in counts.argsort(descending=True, stable=True)[:POLICIES].tolist():
            share, own = 100 * counts[index] / len(mine), mine[which == index]
            parts.append(
                f'<div class="soft">{share:.0f} % use these {int(policies[index].sum())}</div>'
                + _strip(policies[index], found.layers)
                + _pictures(found, own[:EXAMPLES].tolist())
            )
        easiest, hardest = choose_examples(found.results, EXAMPLES, label)
        for name, chosen in ((f"Fewest {unit}s", easiest), (f"Most {unit}s", hardest)):
            parts.append(f'<div class="soft">{name}, and right</div>' + _pictures(found, chosen))
        cards.append(f'<div class="card">{"".join(parts)}</div>')
    left_out = len(found.results.labels.unique()) - len(cards)
    more = f'<p class="soft">{left_out} more classes are not shown.</p>' if left_out > 0 else ""
    return (
        "<h2>Policies of a class, and images that take them</h2>\n"
        f'<div class="grid">{"".join(cards)}</div>\n{more}'
    )


def _strip(decisions: Tensor, layers: Sequence[int]) -> str:
    """One policy: a cell a block, coloured where it is kept."""
    cells, starts = [], {sum(layers[:n]) for n in range(1, len(layers))}
    for k, keep in enumerate(decisions.tolist()):
        gap = ' class="gap"' if k in starts else ""
        color = f' style="background:rgb({_rgb(_segment(layers, k))})"' if keep else ""
        cells.append(f"<i{gap}{color}></i>")
    return f'<div class="strip">{"".join(cells)}</div>'


def _pictures(found: Findings, indices: list[int]) -> str:
    if not indices:
        return '<div class="soft">none</div>'
    figures = []
    for index, image in zip(indices, images_of(found.split, indices), strict=True):
        used, right = int(found.results.usage[index]), bool(found.results.correct[index])
        small = ' class="small"' if max(image.shape[1:]) <= THUMBNAIL else ""
        figures.append(
            f'<figure><img{small} alt="image {index}" src="{_data_uri(image)}">'
            f"<figcaption>{used}{'' if right else ' ✗'}</figcaption></figure>"
        )
    return f'<div class="images">{"".join(figures)}</div>'


def _data_uri(image: Tensor) -> str:
    """(3, H, W) float, 0…1 -> the image as a URI; large ones shrunk."""
    pixels = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    if max(picture.size) > THUMBNAIL:
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        picture.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    else:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _about(found: Findings) -> str:
    machine = found.machine
    device = machine.get("gpu") or machine["cpu"]
    lines = [
        f"Engine: {found.strategy}.",
        f"{device}, {machine['threads']} threads, torch {machine['torch']}, commit "
        f"{machine['commit']}.",
    ]
    if found.latencies:
        lines.append(
            "Times: medians of interleaved calls on this machine, policy included, after a check "
            "of the logits."
        )
    text = " ".join(map(html.escape, lines))
    return f'<p class="soft">{text}</p>'


def _class_name(found: Findings, label: int) -> str:
    return html.escape(found.split.classes[label])


def _segment(layers: Sequence[int], block: int) -> int:
    """The segment of a block, both counted from 0."""
    return next(n for n in range(len(layers)) if block < sum(layers[: n + 1]))


def _rgb(segment: int) -> str:
    color = COLORS[segment % len(COLORS)]
    return ",".join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))
