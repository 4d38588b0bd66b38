"""The command ``blockdrop benchmark``: milliseconds against the complete ResNet, in one table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from blockdrop_fast.engine import compile
from blockdrop_fast.executors import crossover
from blockdrop_fast.files import check_new_file, check_new_folder, write_json
from blockdrop_fast.heuristics import random_k
from blockdrop_fast.machine import machine_info
from blockdrop_fast.measure import calibration
from blockdrop_fast.measure.contenders import (
    CONTENDERS,
    LEGEND,
    contender_names,
    format_rows,
    measure,
)
from blockdrop_fast.measure.published import PUBLISHED
from blockdrop_fast.measure.tolerance import CHECKED_IMAGES
from blockdrop_fast.measure.workload import (
    Workload,
    fit_policy,
    load_workload,
    make_workload,
)
from blockdrop_fast.networks.architectures import IMAGENET_ARCHITECTURES, is_name

BATCHES = (1, 8, 64, 256)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# ImageNet networks take two cores seconds a batch: on a CPU their largest batches are left out, and
# the quick form checks fewer images (which still are 16,000 logits).
IMAGENET_LARGEST_BATCH, IMAGENET_QUICK_BATCH, QUICK_BATCH = 64, 8, 64
QUICK_IMAGENET_IMAGES = 16


@dataclass(frozen=True)
class Run:
    """How one network is measured.

    Attributes:
        network: an architecture's name, or a checkpoint's path.
        batches: batch sizes.
        images: checked, and cycled through by the timed calls; all batch sizes divide it.
        rounds, min_seconds: see ``timing.interleave``.
    """

    network: str
    batches: tuple[int, ...]
    images: int
    rounds: int
    min_seconds: float


def plan_runs(
    networks: Sequence[str], batches: Sequence[int], quick: bool, on_gpu: bool = False
) -> list[Run]:
    """How to measure networks, in the full or in the quick form.

    Args:
        networks: names of architectures, or checkpoints' paths.
        batches: batch sizes; none: those of the form.
        quick: the quick form.
        on_gpu: all batch sizes and images, also in the quick form.
    """
    runs = []
    for network in networks:
        imagenet, largest = network in IMAGENET_ARCHITECTURES, max(BATCHES)
        if imagenet and not on_gpu:
            largest = IMAGENET_QUICK_BATCH if quick else IMAGENET_LARGEST_BATCH
        elif is_name(network) and quick and not on_gpu:
            largest = QUICK_BATCH
        sizes = tuple(batches) or tuple(size for size in BATCHES if size <= largest)
        few = quick and imagenet and not on_gpu
        images = QUICK_IMAGENET_IMAGES if few else CHECKED_IMAGES
        step = math.lcm(*sizes)
        rounds, min_seconds = (5, 1.0) if quick else (15, 10.0)
        runs.append(Run(network, sizes, -(-images // step) * step, rounds, min_seconds))
    return runs


def command(
    model: str = "all",
    batch: tuple[int, ...] = (),
    quick: bool = False,
    contenders: tuple[str, ...] = (),
    data: Path | None = None,
    json: Path | None = None,
    device: str = "cpu",
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    calibrate: bool = False,
    density: float | None = None,
) -> None:
    """Time BlockDrop against the complete ResNet, policy network included, logits checked first.

    Args:
        model: resnet32, resnet110 or resnet101 (random weights at the published block usage),
            all three; another architecture of ``python -m train pretrain --arch`` (at the share
            of blocks that is published of ResNet-110 or ResNet-101); or a BlockDrop checkpoint, at
            its own decisions on its test images.
        batch: batch sizes; default: 1, 8, 64 and 256, of ImageNet networks on a CPU up to 64.
        quick: fewer repeats, no torch.compile; on a CPU batch sizes up to 64, of ImageNet networks
            up to 8.
        contenders: which ones; default: all. At least one complete baseline is needed.
        data: data set folder of a checkpoint; default: BLOCKDROP_DATA, else the digits.
        json: also write all samples and the machine to this file.
        device: cpu or cuda.
        dtype: default: float32 on a CPU, bfloat16 on a GPU.
        calibrate: measure from which share of kept blocks on dropping does not pay on this
            device, and remember it for ``compile(strategy="auto")``.
        density: each image keeps this share of the blocks, drawn at random, instead of the
            published usage or a checkpoint's decisions.
    """
    if density is not None and not 0 <= density <= 1:
        raise ValueError(f"density: expected 0 to 1, got {density}")
    if calibrate and density is not None:
        raise ValueError("density: --calibrate has its own, expected none")
    if batch and min(batch) < 1:
        raise ValueError(f"batch: expected positive batch sizes, got {batch}")
    if calibrate and contenders:
        raise ValueError("contenders: --calibrate has its own, expected none")
    if json is not None and calibrate:
        check_new_folder(json.parent)
    elif json is not None:
        check_new_file("json", json)
    place = _device(device)
    on_gpu = place.type == "cuda"
    precision = DTYPES[dtype or ("bfloat16" if on_gpu else "float32")]
    runs = plan_runs(list(PUBLISHED) if model == "all" else [model], batch, quick, on_gpu)
    machine = machine_info(place)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    rows, unavailable = [], {}
    for run in runs:
        random = is_name(run.network)
        if random:
            workload = make_workload(run.network, run.images, device=place, dtype=precision)
            source = "random weights at the published block usage"
            if run.network not in PUBLISHED:
                source += " of another network"
        else:
            workload = load_workload(Path(run.network), run.images, data, place, precision)
            source = "trained, at its own decisions"
        if calibrate:
            _calibrate(workload, run, json)
            continue
        if density is not None:
            layers = workload.model.backbone.config.layers
            kept = round(density * sum(layers))
            workload = workload.at(random_k(kept, layers, run.images, per_image=True))
            source = f"random blocks, density {density:g}"
        names = list(contenders) or contender_names(quick, on_gpu)
        kinds = {CONTENDERS[name][0] for name in names if name in CONTENDERS}
        if "decides" in kinds and random:
            workload = fit_policy(workload)
        kept = workload.decisions.sum(1).double()
        print(
            f"{workload.name}: {source}; {run.images} images, {float(kept.mean()):.1f} ± "
            f"{float(kept.std(correction=0)):.1f} of {workload.decisions.shape[1]} blocks"
        )
        for size in run.batches:
            measurement = measure(
                workload,
                size,
                names,
                rounds=run.rounds,
                min_seconds=run.min_seconds,
                host=size == 1,
            )
            rows += measurement.rows
            unavailable |= measurement.unavailable
    if calibrate:
        return
    print(f"\n{format_rows(rows)}\n\n{LEGEND}")
    for name, reason in unavailable.items():
        print(f"not timed: {name} ({reason})")
    if json is not None:
        content = {"machine": machine, "unavailable": unavailable}
        content["rows"] = [asdict(row) for row in rows]
        write_json(json, content)


def _device(name: str) -> torch.device:
    """A device that torch can use here.

    Raises:
        ValueError: it cannot, or this is no device's name.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: torch {torch.__version__} finds no GPU here, got {name!r}")
    return device


def _calibrate(workload: Workload, run: Run, copy_to: Path | None) -> None:
    """Measure, print and remember a network's crossover table."""
    config, device = workload.model.backbone.config, workload.images.device
    print(
        f"\n{workload.name}, {str(workload.dtype).removeprefix('torch.')}: random decisions of "
        f"each keep rate, no policy network; logits checked on {run.images} images"
    )
    cells = calibration.calibrate(
        calibration.subject_of(workload),
        run.batches,
        # Many short measurements: fewer rounds each than where one figure is to be reported.
        rounds=max(3, run.rounds // 3),
        min_seconds=max(1.0, run.min_seconds / 5),
    )
    print(calibration.verdict(cells))
    for path in {crossover.user_file(), copy_to} - {None}:
        print(f"written: {crossover.save(config, workload.dtype, device, cells, path)}")
    engine = compile(workload.model, dtype=workload.dtype)
    print(f"strategy='auto' is now {engine.strategy}: {engine.strategy_reason}")
