"""The systems that are compared: their file, and each of them ready to run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import get_type_hints

import torch
from torch import Tensor, nn

import blockdrop_fast as bdf
from blockdrop_fast.data.image_sets import Dataset
from blockdrop_fast.networks.checkpoints import load_any
from blockdrop_fast.networks.gated import PixelGates
from train.images import EVALUATION_BATCH, plain_batches
from train.static_sets import PER_IMAGE, RULES, static_set

HEURISTICS = (*RULES, PER_IMAGE)
# (checkpoint, whether its backbone alone) -> model and engine.
Models = dict[tuple[str, bool], tuple[nn.Module, bdf.Engine | None]]


@dataclass(frozen=True)
class System:
    """One point of the figure, as the file describes it; see benchmarks/README.md."""

    name: str
    group: str
    checkpoint: str
    budget: int | float | None = None
    keep: str | None = None
    heuristic: str | None = None
    k: int | None = None
    seed: int | None = None
    epochs: str | int | float | None = None
    rival: str | None = None
    command: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A system, ready to run.

    Attributes:
        system: what it was made from.
        model: of the checkpoint, or its backbone alone where the decisions are given.
        engine: of the model; None where gates decide for every pixel: no engine runs those.
        keep: (EVALUATION_BATCH, K) bool, the sets of blocks of a batch, one for all images or one
            drawn for each; None: a policy decides.
    """

    system: System
    model: nn.Module
    engine: bdf.Engine | None
    keep: Tensor | None

    @property
    def num_blocks(self) -> int:
        """K; of a cascade: its networks."""
        return (
            self.model.backbone.num_blocks if self.engine is None else self.engine.config.num_blocks
        )

    def run(self, images: Tensor) -> bdf.Output:
        """(B, 3, H, W), B up to EVALUATION_BATCH -> logits and decisions."""
        if self.keep is None:
            return self.engine(images, self.system.budget)
        decisions = self.keep[: len(images)]
        return bdf.Output(self.engine.run(images, decisions), decisions)


def read_systems(path: Path) -> list[System]:
    """Read the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not as benchmarks/README.md describes it.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"systems: {path} is no JSON ({error})") from None
    if not isinstance(content, list) or not content:
        raise ValueError(f"systems: expected a list of systems in {path}")
    systems = [_read_system(values) for values in content]
    names = [system.name for system in systems]
    for system in systems:
        if names.count(system.name) > 1:
            raise ValueError(f"systems: two are called {system.name!r}")
        groups = {one.group for one in systems}
        if system.rival is not None and system.rival not in groups:
            raise ValueError(
                f"systems: {system.name!r}: rival: expected a group out of "
                f"{', '.join(map(repr, sorted(groups)))}, got {system.rival!r}"
            )
    return systems


def _read_system(values: object) -> System:
    if not isinstance(values, dict):
        raise ValueError(f"systems: expected objects, got {values!r}")
    where, kinds = f"systems: {values.get('name', values)!r}", get_type_hints(System)
    for key in dict.fromkeys([*values, "name", "group", "checkpoint"]):
        value = values.get(key)
        if key not in kinds:
            raise ValueError(f"{where}: expected the keys {', '.join(kinds)}, got {key!r}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            kind = getattr(kinds[key], "__name__", kinds[key])
            raise ValueError(f"{where}: {key}: expected {kind}, got {value!r}")
    system = System(**values)
    if sum(one is not None for one in (system.budget, system.keep, system.heuristic)) > 1:
        raise ValueError(f"{where}: expected one of budget, keep and heuristic at most")
    if (system.heuristic is None) != (system.k is None):
        raise ValueError(f"{where}: expected heuristic and k together")
    if system.heuristic not in (None, *HEURISTICS):
        raise ValueError(
            f"{where}: heuristic: expected {', '.join(HEURISTICS)}, got {system.heuristic!r}"
        )
    return system


def load_systems(systems: Sequence[System], dataset: Dataset) -> list[Loaded]:
    """Load and compile them, each model once, and let each decide on one image.

    Raises:
        ValueError: naming the system: a file that cannot be read, a set or a budget that the model
            cannot take, another number of classes, or a rival without sets of its depth.
    """
    models: Models = {}
    loaded = []
    for system in systems:
        try:
            loaded.append(_load(system, dataset, models))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"systems: {system.name!r}: {error}") from None
    for one in loaded:
        if one.system.rival is not None and not rivals_of(one, loaded):
            raise ValueError(
                f"systems: {one.system.name!r}: rival: {one.system.rival!r} has no complete "
                f"network and no sets out of {one.num_blocks} blocks"
            )
    return loaded


def _load(system: System, dataset: Dataset, models: Models) -> Loaded:
    constant = system.keep is not None or system.heuristic is not None
    key = (system.checkpoint, constant)
    if key not in models:
        load = bdf.load_backbone if constant else load_any
        model = load(system.checkpoint).eval().requires_grad_(False)
        pixels = isinstance(model, bdf.BlockDrop) and isinstance(model.policy, PixelGates)
        models[key] = model, None if pixels else bdf.compile(model)
    model, engine = models[key]
    classes = (model.backbone if engine is None else engine).config.num_classes
    if classes != len(dataset.classes):
        raise ValueError(
            f"the network has {classes} classes, but {dataset.name} has {len(dataset.classes)}"
        )
    if engine is None:
        if system.budget is not None:
            raise ValueError("budget: gates for every pixel take none")
        return Loaded(system, model, None, None)
    image, _ = next(plain_batches(model, dataset.test.subset(1), 1, 0))
    decisions = engine.decide(image, system.budget)
    policy = model.policy if isinstance(model, bdf.BlockDrop) else None
    if system.keep is not None:
        decisions = _read_keep(Path(system.keep), engine.config.num_blocks)
    elif system.heuristic == PER_IMAGE:
        decisions = bdf.heuristics.random_k(
            system.k, engine.config.layers, EVALUATION_BATCH, seed=system.seed or 0, per_image=True
        )
        return Loaded(system, model, engine, decisions)
    elif system.heuristic is not None:
        decisions = static_set(
            system.heuristic,
            system.k,
            engine,
            system.checkpoint,
            dataset.train,
            system.seed or 0,
        )[None]
    elif isinstance(model, bdf.Cascade) or not isinstance(policy, (bdf.FixedPolicy, NoneType)):
        return Loaded(system, model, engine, None)
    return Loaded(system, model, engine, decisions.repeat(EVALUATION_BATCH, 1))


def _read_keep(path: Path, num_blocks: int) -> Tensor:
    """(1, K) bool."""
    try:
        keep = json.loads(path.read_text())["keep"]
        right = len(keep) == num_blocks and all(one in (0, 1) for one in keep)
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise ValueError(f'keep: expected {{"keep": [...]}} of {num_blocks} 0 or 1 in {path}')
    return torch.tensor([keep]).bool()


def rivals_of(one: Loaded, loaded: Iterable[Loaded]) -> list[Loaded]:
    """The systems that a system is compared with.

    Of the group that it names: complete networks of any depth, and sets of blocks of its own depth.
    """
    depth = one.num_blocks
    return [
        other
        for other in loaded
        if other.system.group == one.system.rival
        and other.keep is not None
        and (other.num_blocks == depth or other.keep.all())
    ]
