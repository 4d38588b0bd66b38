"""The command ``blockdrop report``: one page on what a model does, to look at in a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tyro.conf import Positional

from blockdrop_fast.commands.evaluate import prepare_policy, static_accuracies
from blockdrop_fast.commands.outcomes import Results, unit_of
from blockdrop_fast.commands.report_page import Findings, Latency, page
from blockdrop_fast.data.batches import Batches, batches_of
from blockdrop_fast.data.image_sets import ImageFolder, ImageSet, Normalization
from blockdrop_fast.engine import Engine, compile
from blockdrop_fast.executors.cascade import CascadeEngine
from blockdrop_fast.files import check_new_file, write_text
from blockdrop_fast.machine import machine_info
from blockdrop_fast.measure import timing
from blockdrop_fast.measure.evaluation import evaluate_each
from blockdrop_fast.measure.tolerance import CHECKED_IMAGES, make_output_reference, make_reference

ROUTING_IMAGES = 10_000
TIMED_IMAGES = 256
ROUNDS = 9


def command(
    checkpoint: Positional[Path],
    out: Path,
    data: Path | None = None,
    strategy: Literal["auto", "walk", "gather", "dense"] = "auto",
    batch_size: int = 250,
    limit: int | None = None,
    device: str = "auto",
    batches: tuple[int, ...] = (1, 64),
) -> None:
    """Write a page on which blocks a model uses for which images, and what that saves.

    The page is one file without links to others: accuracy and cost, what routing is worth, latency
    on this machine, block usage, policies and images of each class.

    Args:
        checkpoint: BlockDrop model or cascade, or a shipped one's name.
        out: the page's file, .html.
        data: data set folder; default: BLOCKDROP_DATA, else the embedded handwritten digits.
        strategy: how the engine executes.
        batch_size: images a batch.
        limit: use only so many test images, drawn at random.
        device: cpu, cuda, …; auto takes a GPU where there is one.
        batches: batch sizes to time; none: no times.
    """
    check_new_file("out", out, (".html",))
    engine, dataset, normalization = prepare_policy(
        checkpoint, data, strategy, limit, device, cascades=True
    )
    split = dataset.test
    if any(not 1 <= batch <= len(split) for batch in batches):
        raise ValueError(f"batches: expected 1 to {len(split)} images each, got {batches}")

    def images(some: ImageSet | ImageFolder) -> Batches:
        return batches_of(some, batch_size, normalization=normalization, device=engine.device)

    accuracies = static_accuracies(checkpoint, engine, dataset, images, only_kept=True)
    complete = compile(engine.backbone, dtype=engine.dtype)
    labels, tops = [], []

    def with_complete() -> Iterator[tuple[Tensor, Tensor]]:
        """The split, each batch run through the complete network while it is there."""
        for some, batch_labels in images(split):
            top = complete(some).logits.float().softmax(1).max(1)
            right = top.indices.cpu() == batch_labels.cpu()
            labels.append(batch_labels.cpu())
            tops.append(torch.stack([top.values.cpu(), right.float()]))
            yield some, batch_labels

    evaluation, decisions, correct = evaluate_each(
        engine, with_complete(), routing_images=ROUTING_IMAGES, static_accuracies=accuracies
    )
    found = Findings(
        title=checkpoint.stem if checkpoint.suffix else str(checkpoint),
        split=split,
        layers=(1,) * len(engine.engines)
        if isinstance(engine, CascadeEngine)
        else engine.config.layers,
        results=Results(decisions, torch.cat(labels), correct, unit_of(engine)),
        evaluation=evaluation,
        complete=torch.cat(tops, 1),
        latencies=_time(engine, complete, split, normalization, batches) if batches else (),
        machine=machine_info(engine.device),
        strategy=f"{engine.strategy}: {engine.strategy_reason}",
    )
    write_text(out, page(found))
    print(f"{split.name}: {found.evaluation.format()}")
    print(out)


def _time(
    engine: Engine | CascadeEngine,
    complete: Engine,
    split: ImageSet | ImageFolder,
    normalization: Normalization,
    batches: tuple[int, ...],
) -> tuple[Latency, ...]:
    """Right logits first, then round-robin. Splits are sorted by class, so images are drawn."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    drawn = split.take(order[:TIMED_IMAGES].sort().values)
    images, _ = next(
        batches_of(drawn, len(drawn), normalization=normalization, device=engine.device)
    )
    images = images.to(engine.dtype).contiguous()
    some, model = images[:CHECKED_IMAGES], engine.model.eval()
    output = engine(some)
    reference = make_output_reference(model, some, output, engine.dtype)
    reference.check("this model", output.logits)
    reference = make_reference(engine.backbone, some, None, engine.dtype)
    reference.check("complete, same engine", complete(some).logits)
    runs: dict[str, Callable[[Tensor], object]] = {
        "this model": engine,
        "complete, same engine": complete,
        "complete, PyTorch": engine.backbone,
    }
    found = []
    for batch in batches:
        parts = images.split(batch)
        parts = parts[: max(1, len(images) // batch)]  # whole ones
        calls = {
            name: lambda index, run=run, parts=parts: run(parts[index % len(parts)])
            for name, run in runs.items()
        }
        with torch.inference_mode():
            samples = timing.interleave(
                calls, rounds=max(ROUNDS, len(parts) if batch == 1 else 0), device=engine.device
            )
        found += [
            Latency(batch, name, 1e3 * timing.median(values)) for name, values in samples.items()
        ]
    return tuple(found)
