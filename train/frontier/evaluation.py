"""Accuracy and FLOPs of systems on a test split, each evaluated once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import blockdrop_fast as bdf
from blockdrop_fast.data.batches import batches_of
from blockdrop_fast.data.image_sets import Dataset
from blockdrop_fast.files import json_checksum, write_json
from blockdrop_fast.machine import machine_info
from blockdrop_fast.measure.evaluation import Evaluation, evaluate, summarise
from blockdrop_fast.measure.static_line import fingerprint
from blockdrop_fast.networks.checkpoints import locate
from train.frontier.systems import Loaded
from train.images import EVALUATION_BATCH, plain_batches

CHECKSUM = "crc32"


def evaluate_systems(loaded: Sequence[Loaded], dataset: Dataset, path: Path) -> list[Evaluation]:
    """Evaluate on the test split what was not evaluated before.

    Args:
        loaded: the systems.
        dataset: of whose test split.
        path: of the results: where evaluations of the same checkpoint, decisions and images are
            taken from, and new ones kept, each as soon as it is made.

    Raises:
        ValueError: the file is of another kind.
    """
    content = earlier_results(path)
    # Images and labels; of no network.
    images = fingerprint(nn.Identity(), batches_of(dataset.test, EVALUATION_BATCH))
    found = []
    for number, one in enumerate(loaded, 1):
        key = _key(one, images)
        if not _is_intact(content["evaluations"].get(key)):
            print(f"{number}/{len(loaded)}: {one.system.name}", flush=True)
            evaluation = _evaluate(one, dataset)
            values = evaluation.to_dict() | {"commit": machine_info()["commit"]}
            content["evaluations"][key] = values | {CHECKSUM: json_checksum(values)}
            write_json(path, content)
        values = content["evaluations"][key]
        found.append(Evaluation(**{name: values[name] for name in _measured()}))
    return found


def _is_intact(values: object) -> bool:
    """Whether a kept evaluation is what was written; older ones have no checksum."""
    if not isinstance(values, dict):
        return False
    others = {name: value for name, value in values.items() if name != CHECKSUM}
    return CHECKSUM not in values or values[CHECKSUM] == json_checksum(others)


def _evaluate(one: Loaded, dataset: Dataset) -> Evaluation:
    batches = plain_batches(one.model, dataset.test, EVALUATION_BATCH, 2)
    if one.engine is None:
        return evaluate_pixels(one.model, batches)
    if one.keep is None:
        return evaluate(one.engine, batches, budget=one.system.budget)
    return evaluate(one.engine, batches, lambda images: one.keep[: len(images)], shuffles=0)


@torch.no_grad()
def evaluate_pixels(model: bdf.BlockDrop, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Evaluate a model whose gates decide for every pixel, in its reference.

    Args:
        model: with ``PixelGates``, in eval mode.
        batches: of (images (B, 3, H, W) normalised, labels (B,) int64).

    Returns:
        FLOPs are those that the masks leave; a block is kept where some pixel needs it.
    """
    correct, decisions, flops, size = [], [], [], None
    for images, labels in batches:
        output = model(images)
        correct.append(output.logits.argmax(1) == labels)
        decisions.append(output.decisions)
        flops.append(output.flops)
        size = tuple(images.shape[2:])
    found = summarise(model.backbone, torch.cat(decisions), torch.cat(correct), size)
    counted = torch.cat(flops)
    return replace(found, flops=float(counted.mean()), flops_std=float(counted.std(correction=0)))


def _measured() -> list[str]:
    return [one.name for one in fields(Evaluation)]


def _key(one: Loaded, images: str) -> str:
    """Hash of what an evaluation depends on, and of the names of what it holds."""
    content = locate(one.system.checkpoint).read_bytes()
    if one.keep is None:
        decides = [one.system.budget]
    else:
        sets = one.keep.unique(dim=0) if (one.keep == one.keep[0]).all() else one.keep
        decides = sets.int().flatten().tolist()
    about = [hashlib.sha256(content).hexdigest(), images, one.keep is None, decides, _measured()]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def earlier_results(path: Path) -> dict:
    """What a file of results holds, or nothing yet.

    Raises:
        ValueError: the file is of another kind.
    """
    if not path.exists():
        return {"evaluations": {}}
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("evaluations"), dict):
        raise ValueError(f"out: {path} is no file of results")
    return content
