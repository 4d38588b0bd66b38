"""Contenders, and what is measured of them: ``blockdrop benchmark`` and ``benchmarks/`` share them.

To add a contender, add a line to ``CONTENDERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from blockdrop_fast.executors.gather_graph import Launch
from blockdrop_fast.measure import baselines, timing
from blockdrop_fast.measure.baselines import Call, UnavailableError
from blockdrop_fast.measure.workload import Workload
from blockdrop_fast.networks.flops import flops


def _at_decisions(workload: Workload, _: Tensor, *, strategy: str) -> Call:
    """A complete BlockDrop: the policy network runs, then the backbone at the given decisions.

    Random weights do not decide as a trained policy does, so what the policy network decides is
    thrown away, after it was paid for.
    """
    engine = workload.engine(strategy)

    def call(images: Tensor, decisions: Tensor) -> Tensor:
        engine.probabilities(images)
        return engine.run(images, decisions)

    return call


def _decides(workload: Workload, _: Tensor, *, strategy: str, launch: Launch = "counts") -> Call:
    """A complete BlockDrop in one call, at the decisions of its own policy network."""
    engine = workload.engine(strategy, launch)
    return lambda images, _: engine(images)


def _all_kept(workload: Workload, images: Tensor, *, strategy: str) -> Call:
    """Our engine without a policy network, all blocks kept."""
    engine = workload.engine(strategy)
    keep = torch.ones(len(images), engine.config.num_blocks, dtype=torch.bool, device=images.device)
    return lambda images, _: engine.run(images, keep)


# Name -> kind (see timing.Contender) and builder: (workload, one batch of images) -> call.
CONTENDERS: dict[str, tuple[str, Callable[[Workload, Tensor], Call]]] = {
    "eager": ("baseline", lambda workload, _: baselines.torch_eager(workload.folded)),
    "compile": ("baseline", lambda workload, x: baselines.torch_compiled(workload.folded, x)),
    "cudnn-graph": ("baseline", lambda workload, x: baselines.cudnn_graph(workload.folded, x)),
    "onnxruntime": ("baseline", lambda workload, x: baselines.onnxruntime(workload.folded, x)),
    "openvino": ("baseline", lambda workload, x: baselines.openvino(workload.folded, x)),
    "authors": (
        "blockdrop",
        lambda workload, _: baselines.authors_way(workload.model, workload.dtype),
    ),
    "dense": ("blockdrop", partial(_at_decisions, strategy="dense")),
    "gather": ("blockdrop", partial(_at_decisions, strategy="gather")),
    "walk": ("blockdrop", partial(_at_decisions, strategy="walk")),
    "gather-decides": ("decides", partial(_decides, strategy="gather")),
    "gather-universal": ("decides", partial(_decides, strategy="gather", launch="universal")),
    "walk-decides": ("decides", partial(_decides, strategy="walk")),
    "gather-all": ("all_kept", partial(_all_kept, strategy="gather")),
    "walk-all": ("all_kept", partial(_all_kept, strategy="walk")),
}
SLOW_TO_BUILD = {"compile"}
# On a GPU the policy network shares a launch, or a stream, with the backbone: what it costs shows
# only where an engine decides for itself.
CPU_ONLY = {"onnxruntime", "openvino"}
GPU_ONLY = {"cudnn-graph", "gather-decides", "gather-universal", "walk-decides"}
# The same engine with all blocks kept, for the share of its own bound.
OWN_COMPLETE = {
    "gather": "gather-all",
    "walk": "walk-all",
    "gather-decides": "gather-all",
    "gather-universal": "gather-all",
    "walk-decides": "walk-all",
}


def contender_names(quick: bool, on_gpu: bool = False) -> list[str]:
    """The contenders of a full or a quick run."""
    left_out = (SLOW_TO_BUILD if quick else set()) | (CPU_ONLY if on_gpu else GPU_ONLY)
    return [name for name in CONTENDERS if name not in left_out]


def build(name: str, workload: Workload, images: Tensor) -> Call:
    """A contender's call for batches like ``images``; what is slow to build only once.

    Raises:
        UnavailableError: it cannot run here.
    """
    make = CONTENDERS[name][1]
    if name not in SLOW_TO_BUILD:
        return make(workload, images)
    key = (name, len(images))
    if key not in workload.calls:
        workload.calls[key] = make(workload, images)
    return workload.calls[key]


@dataclass(frozen=True)
class Row:
    """What was measured of one contender at one batch size.

    Attributes:
        network, batch, contender: which; batch in images.
        kind: see ``timing.Contender``.
        seconds: median of a call; on a GPU, of the device.
        host_seconds: on a GPU, median from call to synchronised result; None if not timed.
        images_per_second: batch / seconds.
        flops: of an image, median over the timed batches; the policy network's included.
        speedup: over the fastest complete baseline.
        flop_bound: FLOPs of the complete network / ``flops``.
        share_of_bound: speedup / flop_bound.
        share_of_own_bound: the same, but with the speed-up over this engine with all blocks
            kept; None where that was not timed.
        block_usage: mean and standard deviation over the images; None of a complete network.
        policies: how many different decisions the images have; None of a complete network.
        samples, host_samples: seconds of each call.
    """

    network: str
    batch: int
    contender: str
    kind: str
    seconds: float
    host_seconds: float | None
    images_per_second: float
    flops: float
    speedup: float
    flop_bound: float
    share_of_bound: float
    share_of_own_bound: float | None
    block_usage: tuple[float, float] | None
    policies: int | None
    samples: tuple[float, ...]
    host_samples: tuple[float, ...]


@dataclass(frozen=True)
class Measurement:
    """One network at one batch size: a row a contender, and who could not run and why."""

    rows: tuple[Row, ...]
    unavailable: dict[str, str]


def measure(
    workload: Workload,
    batch: int,
    contenders: Sequence[str],
    *,
    rounds: int,
    min_seconds: float = 0.0,
    host: bool = False,
    attempt: timing.Attempt = nullcontext,
) -> Measurement:
    """Check and time contenders at one batch size, in one round-robin.

    Args:
        workload: N images, N a multiple of the batch size.
        batch: images a call.
        contenders: names out of ``CONTENDERS``, at least one of them an available baseline.
        rounds, min_seconds: see ``timing.interleave``.
        host: on a GPU, also time from call to synchronised result.
        attempt: see ``timing.time_contenders``; contenders are also built in it.

    Raises:
        WrongLogitsError: a contender is wrong; then none is timed.
        ValueError: an unknown contender, no baseline, or a batch size that does not divide N.
    """
    batches = timing.chunks(batch, workload.images, workload.decisions)
    built, unavailable = [], {}
    for name in contenders:
        if name not in CONTENDERS:
            raise ValueError(
                f"contenders: expected names out of {', '.join(CONTENDERS)}, got {name!r}"
            )
        with attempt(name):
            try:
                with torch.no_grad():  # compilers would rather have no inference tensors as weights
                    call = build(name, workload, batches[0][0])
                built.append(timing.Contender(name, call, CONTENDERS[name][0]))
            except UnavailableError as error:
                unavailable[name] = str(error)
    if not any(contender.kind == "baseline" for contender in built):
        raise ValueError("contenders: expected at least one complete baseline that can run here")
    timed = timing.time_contenders(
        built,
        batches,
        workload.all_kept,
        workload.at_decisions,
        workload.check_own,
        rounds=rounds,
        min_seconds=min_seconds,
        host=host and workload.images.is_cuda,
        attempt=attempt,
    )
    built = [contender for contender in built if contender.name in timed.samples]
    if not any(contender.kind == "baseline" for contender in built):
        raise RuntimeError("contenders: every complete baseline has failed")
    return Measurement(tuple(_rows(workload, batch, built, timed)), unavailable)


def _rows(
    workload: Workload, batch: int, contenders: Sequence[timing.Contender], timed: timing.Timed
) -> list[Row]:
    samples = timed.samples
    seconds = {name: timing.median(values) for name, values in samples.items()}
    fastest = min(seconds[one.name] for one in contenders if one.kind == "baseline")
    size = tuple(workload.images.shape[2:])
    complete = float(flops(workload.model.backbone, image_size=size))
    rows = []
    for one in contenders:
        cost, usage, policies = complete, None, None
        executed = timed.decisions[one.name]
        if executed is not None:
            executed = executed.cpu()
            means = flops(workload.model, executed, image_size=size).view(-1, batch).mean(1)
            # Medians of the same rounds on both sides: round i ran batch i modulo their number.
            count = len(samples[one.name])
            cost = timing.median([float(means[i % len(means)]) for i in range(count)])
            kept = executed.sum(1).double()
            usage = (float(kept.mean()), float(kept.std(correction=0)))
            policies = len(executed.unique(dim=0))
        host_samples = tuple(timed.host_samples.get(one.name, ()))
        bound, own = complete / cost, seconds.get(OWN_COMPLETE.get(one.name, ""))
        speedup = fastest / seconds[one.name]
        rows.append(
            Row(
                network=workload.name,
                batch=batch,
                contender=one.name,
                kind=one.kind,
                seconds=seconds[one.name],
                host_seconds=timing.median(host_samples) if host_samples else None,
                images_per_second=batch / seconds[one.name],
                flops=cost,
                speedup=speedup,
                flop_bound=bound,
                share_of_bound=speedup / bound,
                share_of_own_bound=own / seconds[one.name] / bound if own else None,
                block_usage=usage,
                policies=policies,
                samples=tuple(samples[one.name]),
                host_samples=host_samples,
            )
        )
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    """One table, to print; with a column of host times if there are any."""
    host = any(row.host_seconds for row in rows)
    head = (
        f"{'network':<10} {'batch':>5}  {'contender':<15} {'ms/batch':>9} "
        f"{'host ms ' if host else '':>{8 if host else 0}}{'images/s':>9} "
        f"{'speed-up':>8} {'bound':>6} {'of bound':>8} {'of own':>7}"
    )
    lines, group = [head, "-" * len(head)], None
    for row in rows:
        if group not in (None, (row.network, row.batch)):
            lines.append("")
        group = (row.network, row.batch)
        own = "" if row.share_of_own_bound is None else f"{100 * row.share_of_own_bound:.0f} %"
        waited = f"{1e3 * row.host_seconds:.3f} " if row.host_seconds else ""
        # Batches of a GPU take microseconds.
        digits = 2 if row.seconds >= 1e-3 else 3
        lines.append(
            f"{row.network:<10} {row.batch:>5}  {row.contender:<15} "
            f"{1e3 * row.seconds:>9.{digits}f} {waited:>{8 if host else 0}}"
            f"{row.images_per_second:>9.1f} {row.speedup:>8.2f} {row.flop_bound:>6.2f} "
            f"{100 * row.share_of_bound:>6.0f} % {own:>7}"
        )
    return "\n".join(lines)


LEGEND = (
    "ms/batch: median of interleaved calls, policy network included. speed-up: over the fastest\n"
    "complete ResNet of another engine. bound: the speed-up if time were FLOPs. of own: the\n"
    "speed-up over the same engine with all blocks kept, as share of the bound."
)
