"""``blockdrop benchmark --calibrate``: measures the crossover table on the user's own device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blockdrop_fast import heuristics, triton_kernels
from blockdrop_fast.executors import proven
from blockdrop_fast.executors.crossover import NEVER, Cell, Crossover
from blockdrop_fast.executors.dense import DenseExecutor
from blockdrop_fast.executors.gather import GatherExecutor
from blockdrop_fast.executors.gather_graph import GraphGatherExecutor
from blockdrop_fast.measure import timing
from blockdrop_fast.measure.baselines import UnavailableError, captured
from blockdrop_fast.measure.tolerance import make_reference
from blockdrop_fast.measure.workload import Workload
from blockdrop_fast.networks.folding import FoldedNetwork
from blockdrop_fast.networks.resnet import ResNet

KEEP_RATES = (0.25, 0.5, 0.75, 0.875, 1.0)
# `auto` may be slower than dense by so much, in any cell.
ALLOWED_LOSS = 0.03

Run = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """What is calibrated.

    Attributes:
        backbone: in eval mode; its forward defines what is right.
        folded: the same, of the images' dtype and device.
        images: (N, 3, H, W); every batch size divides N.
        walk: (images, decisions) -> logits by the walk, or None where it does not serve.
    """

    backbone: ResNet
    folded: FoldedNetwork
    images: Tensor
    walk: Run | None


def subject_of(workload: Workload) -> Subject:
    """What ``calibrate`` needs of a workload."""
    try:
        walk = workload.engine("walk").run
    except UnavailableError:
        walk = None
    return Subject(workload.model.backbone, workload.folded, workload.images, walk)


def calibrate(
    subject: Subject,
    batches: Sequence[int],
    *,
    keep_rates: Sequence[float] = KEEP_RATES,
    rounds: int,
    min_seconds: float = 0.0,
    say: Callable[[str], None] = print,
) -> list[Cell]:
    """Time the strategies at given random decisions, and what ``auto`` makes of the outcome.

    Args:
        subject: see there.
        batches: batch sizes.
        keep_rates: shares of blocks that each image keeps, drawn for each image.
        rounds, min_seconds: see ``timing.interleave``.
        say: gets a line for each row of the map as it is measured.

    Returns:
        A cell a batch size and keep rate; "auto" is among its strategies.

    Raises:
        WrongLogitsError: a strategy is wrong; it is not timed then.
    """
    config, images = subject.backbone.config, subject.images
    decisions = {
        keep: heuristics.random_k(
            round(keep * config.num_blocks), config.layers, len(images), per_image=True
        ).to(images.device)
        for keep in keep_rates
    }
    references = {
        keep: make_reference(subject.backbone, images, given, images.dtype)
        for keep, given in decisions.items()
    }

    def measure(batch: int, keep: float, runs: dict[str, Run]) -> dict[str, float]:
        timed = timing.time_contenders(
            [timing.Contender(name, run, "blockdrop") for name, run in runs.items()],
            timing.chunks(batch, images, decisions[keep]),
            references[keep],
            references[keep],
            rounds=rounds,
            min_seconds=min_seconds,
        )
        return {name: timing.median(samples) for name, samples in timed.samples.items()}

    cells = []
    gather = make_gather(subject.folded, lambda batch: NEVER)
    say(HEAD)
    for batch in batches:
        row = []
        for keep in keep_rates:
            runs = {"dense": _dense(subject, batch, masked=keep < 1), "gather": gather.run}
            if subject.walk is not None:
                runs["walk"] = subject.walk
            row.append(Cell(batch, keep, measure(batch, keep, runs)))
        table = Crossover(tuple(row), "just measured")
        if table.walk_wins(batch):
            auto = {cell.keep: cell.seconds["walk"] / cell.seconds["dense"] for cell in row}
        elif table.dense_from(batch) > 1:
            auto = {cell.keep: cell.seconds["gather"] / cell.seconds["dense"] for cell in row}
        else:
            # Decisions vary from block to block, so what the rule saves has to be measured.
            ruled = make_gather(subject.folded, table.dense_from)
            auto = {}
            for keep in keep_rates:
                dense = _dense(subject, batch, masked=keep < 1)
                seconds = measure(batch, keep, {"dense": dense, "auto": ruled.run})
                auto[keep] = seconds["auto"] / seconds["dense"]
        for cell in row:
            seconds = cell.seconds | {"auto": auto[cell.keep] * cell.seconds["dense"]}
            cells.append(replace(cell, seconds=seconds))
            say(format_cell(cells[-1]))
    return cells


def make_gather(
    network: FoldedNetwork, dense_from: Callable[[int], float]
) -> GatherExecutor | GraphGatherExecutor:
    """The gather executor that an engine takes for a network here, with another dense rule."""
    weight = network.stem.weight
    if (
        weight.is_cuda
        and weight.dtype in triton_kernels.KERNEL_DTYPES
        and not triton_kernels.why_not(weight.device)
        and proven.load(weight.device).strategies != {"walk"}  # ours did not pass
    ):
        return GraphGatherExecutor(network, dense_from)
    return GatherExecutor(network, dense_from)


def _dense(subject: Subject, batch: int, masked: bool) -> Run:
    """All blocks for all images, as fast as there is: on a GPU one captured graph."""
    executor = DenseExecutor(subject.folded)
    images = subject.images[:batch]
    keep = images.new_ones((batch, subject.backbone.num_blocks), dtype=torch.bool)
    run = executor.run if masked else (lambda images, _: executor.run_complete(images))
    return captured(run, images, keep) if images.is_cuda else run


HEAD = (
    f"{'batch':>5} {'keep':>6}  {'dense ms':>9} {'gather ms':>9} {'walk ms':>9}  "
    f"{'fastest':<7} {'of dense':>8}  {'auto of dense':>13}"
)


def format_cell(cell: Cell) -> str:
    """One row of the map: the strategies' times, the winner, and what ``auto`` would take."""
    strategies = {name: value for name, value in cell.seconds.items() if name != "auto"}
    fastest = min(strategies, key=strategies.__getitem__)
    dense = cell.seconds["dense"]
    times = " ".join(
        f"{1e3 * strategies[name]:>9.3f}" if name in strategies else f"{'–':>9}"
        for name in ("dense", "gather", "walk")
    )
    return (
        f"{cell.batch:>5} {cell.keep:>6.3f}  {times}  {fastest:<7} "
        f"{strategies[fastest] / dense:>8.2f}  {cell.seconds['auto'] / dense:>13.2f}"
    )


def verdict(cells: Sequence[Cell]) -> str:
    """Whether ``auto`` is slower than dense anywhere by more than ``ALLOWED_LOSS``."""
    worst = max(cells, key=lambda cell: cell.seconds["auto"] / cell.seconds["dense"])
    ratio = worst.seconds["auto"] / worst.seconds["dense"]
    answer = "no cell is" if ratio <= 1 + ALLOWED_LOSS else "a cell is"
    return (
        f"{answer} slower than dense by more than {100 * ALLOWED_LOSS:.0f} %: the worst takes "
        f"{ratio:.3f} of its time (batch {worst.batch}, keep rate {worst.keep:.3f})"
    )
