"""The command ``blockdrop evaluate``: what the authors' test prints, for any checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tyro.conf import Positional

from blockdrop_fast import heuristics
from blockdrop_fast.data.batches import Batches, batches_of, load_dataset
from blockdrop_fast.data.image_sets import (
    NO_NORMALIZATION,
    Dataset,
    ImageFolder,
    ImageSet,
    Normalization,
)
from blockdrop_fast.engine import Engine, compile
from blockdrop_fast.executors.cascade import CascadeEngine
from blockdrop_fast.files import check_new_file, write_json
from blockdrop_fast.measure.evaluation import evaluate, format_curve
from blockdrop_fast.measure.static_line import (
    cached_accuracies,
    cached_static_line,
    default_images,
    line_file,
)
from blockdrop_fast.networks.blockdrop import BlockDrop
from blockdrop_fast.networks.cascade import Cascade
from blockdrop_fast.networks.checkpoints import load_any
from blockdrop_fast.networks.resnet import ResNet

Heuristic = Literal["first_k", "random_k", "distribute_k"]


def command(
    checkpoint: Positional[Path],
    data: Path | None = None,
    strategy: Literal["auto", "walk", "gather", "dense"] = "auto",
    batch_size: int = 256,
    limit: int | None = None,
    heuristic: Heuristic | None = None,
    keep: int | None = None,
    seed: int = 0,
    budget: tuple[float, ...] = (),
    device: str = "auto",
    shuffles: int = 5,
    static_line: bool = False,
    json: Path | None = None,
) -> None:
    """Evaluate a checkpoint on the test split of a data set.

    Args:
        checkpoint: BlockDrop model, evaluated at its policy's decisions, a bare backbone, which
            keeps all blocks, or a cascade.
        data: data set folder; default: BLOCKDROP_DATA, else the embedded handwritten digits.
        strategy: how the engine executes.
        batch_size: images a batch.
        limit: use only so many test images, drawn at random.
        heuristic: decide by this rule (BlockDrop section 4.2) in place of the policy.
        keep: blocks that the heuristic keeps.
        seed: of random_k, which draws one set of blocks for all images.
        budget: mean kept blocks, of a policy network that chooses from a menu; default: its own.
            Several give a line each.
        device: cpu, cuda, …; auto takes a GPU where there is one.
        shuffles: permutations of the decisions among the images, for the routing gain.
        static_line: also find the best sets of blocks of each size for all images, in minutes, and
            keep them beside the checkpoint. Where they are there already, they are shown anyway.
        json: also write the results to this file.
    """
    if (heuristic is None) != (keep is None):
        raise ValueError("heuristic and keep: give both, or neither")
    if heuristic is not None and budget:
        raise ValueError("budget: a heuristic takes --keep, expected none")
    if json is not None:
        check_new_file("json", json)
    engine, dataset, normalization = prepare(checkpoint, data, strategy, limit, device)
    decide = None if heuristic is None else _decide(heuristic, keep, seed, engine)

    def batches(split: ImageSet | ImageFolder) -> Batches:
        return batches_of(split, batch_size, normalization=normalization, device=engine.device)

    accuracies = static_accuracies(checkpoint, engine, dataset, batches, only_kept=not static_line)
    evaluations = [
        evaluate(
            engine,
            batches(dataset.test),
            decide,
            budget=blocks,
            shuffles=shuffles,
            static_accuracies=accuracies,
        )
        for blocks in budget or (None,)
    ]
    if heuristic is not None:
        decisions = f"{heuristic}, {keep} of {engine.config.num_blocks} blocks"
    else:
        decisions = "all blocks" if isinstance(engine.model, ResNet) else "policy"
    if budget:
        decisions += f", budget {', '.join(f'{blocks:g}' for blocks in budget)}"
    about = {
        "checkpoint": str(checkpoint),
        "data": f"{dataset.name}, test",
        "decisions": decisions,
        "strategy": f"{engine.strategy} ({engine.strategy_reason})",
    }
    for name, value in about.items():
        print(f"{name:<16} {value}")
    print(evaluations[0].format() if len(evaluations) == 1 else format_curve(evaluations))
    if json is not None:
        about |= {"strategy": engine.strategy, "strategy_reason": engine.strategy_reason}
        about |= {"heuristic": heuristic, "keep": keep, "seed": seed, "device": str(engine.device)}
        found = [evaluation.to_dict() for evaluation in evaluations]
        about |= found[0] if len(found) == 1 else {"budgets": list(budget), "curve": found}
        write_json(json, about)


def static_accuracies(
    checkpoint: Path,
    engine: Engine | CascadeEngine,
    dataset: Dataset,
    batches: Callable[[ImageSet | ImageFolder], Batches],
    only_kept: bool,
) -> Tensor | None:
    """(K+1,) accuracies of the static line on the test split, kept beside the checkpoint.

    Args:
        batches: of a split.
        only_kept: None where they would have to be computed, in minutes.

    Raises:
        ValueError: of a cascade, unless ``only_kept``.
    """
    if isinstance(engine, CascadeEngine) and not only_kept:
        raise ValueError("static_line: a cascade runs whole networks, which have no common blocks")
    if isinstance(engine, CascadeEngine) or (only_kept and not line_file(checkpoint).exists()):
        return None
    engine = compile(engine.backbone, dtype=engine.dtype)  # whatever decides
    some = dataset.train.subset(min(default_images(engine.config.num_blocks), len(dataset.train)))
    line = cached_static_line(checkpoint, engine, list(batches(some)), only_kept=only_kept)
    if line is None:
        return None
    return cached_accuracies(
        checkpoint, engine, line, lambda: batches(dataset.test), only_kept=only_kept
    )


def prepare(
    checkpoint: Path, data: Path | None, strategy: str, limit: int | None, device: str
) -> tuple[Engine | CascadeEngine, Dataset, Normalization]:
    """What commands need that run a checkpoint on a data set.

    Args:
        checkpoint, data, strategy, limit, device: as of ``command``.

    Returns:
        The compiled checkpoint, the data set with ``limit`` of its test images, and what to
        normalise its images with. Where a checkpoint does not say that, images are left in 0…1,
        and a line is printed.

    Raises:
        ValueError: the data set has another number of classes than the network, or ``limit`` or
            ``device`` is impossible.
        OSError, CheckpointError: a file cannot be read.
    """
    model = load_any(checkpoint)
    engine = compile(model.to(_device(device)), strategy=strategy)
    dataset = load_dataset(data)
    split, classes = dataset.test, engine.config.num_classes
    if len(dataset.classes) != classes:
        raise ValueError(
            f"data: {dataset.name} has {len(dataset.classes)} classes, but the network of "
            f"{checkpoint} has {classes}"
        )
    if limit is not None:
        if not 1 <= limit <= len(split):
            raise ValueError(f"limit: expected 1 to {len(split)} images, got {limit}")
        dataset = replace(dataset, test=split.subset(limit))
    normalization = engine.backbone.normalization
    if normalization is None:
        print(f"{checkpoint} does not say how to normalise images: they are left in 0…1")
        normalization = NO_NORMALIZATION
    return engine, dataset, normalization


def prepare_policy(
    checkpoint: Path,
    data: Path | None,
    strategy: str,
    limit: int | None,
    device: str,
    cascades: bool = False,
) -> tuple[Engine | CascadeEngine, Dataset, Normalization]:
    """``prepare`` for commands that show what a policy decides.

    Args:
        cascades: whose rules decide which networks run, will do, too.

    Raises:
        ValueError: as of ``prepare``; there is no policy that decides on blocks.
    """
    engine, dataset, normalization = prepare(checkpoint, data, strategy, limit, device)
    if not isinstance(engine.model, (BlockDrop, Cascade) if cascades else BlockDrop):
        raise ValueError(
            f"checkpoint: {checkpoint} holds no policy that keeps blocks and drops others; "
            "expected a BlockDrop model"
        )
    return engine, dataset, normalization


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"device: {name!r} is not available ({reason})") from None
    return device


def _decide(
    heuristic: Heuristic, keep: int, seed: int, engine: Engine
) -> Callable[[Tensor], Tensor]:
    options = {"device": engine.device} | ({"seed": seed} if heuristic == "random_k" else {})
    rule, segments = getattr(heuristics, heuristic), engine.config.layers
    return lambda images: rule(keep, segments, len(images), **options)
