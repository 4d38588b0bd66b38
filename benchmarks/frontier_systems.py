"""The systems of ``benchmarks.frontier``: their file, and each of them ready to run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import get_type_hints

import torch
from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.data.image_sets import Dataset
from blockdrop_fast.networks.checkpoints import load_any
from train.loop import EVALUATION_BATCH, plain_batches

HEURISTICS = ("first_k", "distribute_k")


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
    epochs: str | int | float | None = None
    rival: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A system, ready to run.

    Attributes:
        system: what it was made from.
        engine: of its model, or of its backbone alone where the decisions are constant.
        keep: (EVALUATION_BATCH, K) bool, equal rows, the set of blocks for all images; None: a
            policy decides.
    """

    system: System
    engine: bdf.Engine
    keep: Tensor | None

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
            f"{where}: heuristic: expected {' or '.join(HEURISTICS)}, got {system.heuristic!r}"
        )
    return system


def load_systems(systems: Sequence[System], dataset: Dataset) -> list[Loaded]:
    """Load and compile them, each model once, and let each decide on one image.

    Raises:
        ValueError: naming the system: a file that cannot be read, a set or a budget that the model
            cannot take, another number of classes, or a rival without sets of its depth.
    """
    engines: dict[tuple[str, bool], bdf.Engine] = {}
    loaded = []
    for system in systems:
        try:
            loaded.append(_load(system, dataset, engines))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"systems: {system.name!r}: {error}") from None
    for one in loaded:
        if one.system.rival is not None and not rivals_of(one, loaded):
            raise ValueError(
                f"systems: {one.system.name!r}: rival: {one.system.rival!r} has no complete "
                f"network and no sets out of {one.engine.config.num_blocks} blocks"
            )
    return loaded


def _load(system: System, dataset: Dataset, engines: dict[tuple[str, bool], bdf.Engine]) -> Loaded:
    constant = system.keep is not None or system.heuristic is not None
    key = (system.checkpoint, constant)
    if key not in engines:
        load = bdf.load_backbone if constant else load_any
        model = load(system.checkpoint).eval().requires_grad_(False)
        engines[key] = bdf.compile(model)
    engine = engines[key]
    if engine.config.num_classes != len(dataset.classes):
        raise ValueError(
            f"the network has {engine.config.num_classes} classes, but {dataset.name} has "
            f"{len(dataset.classes)}"
        )
    image, _ = next(plain_batches(engine.model, dataset.test.subset(1), 1, 0))
    decisions = engine.decide(image, system.budget)
    policy = engine.model.policy if isinstance(engine.model, bdf.BlockDrop) else None
    if system.keep is not None:
        decisions = _read_keep(Path(system.keep), engine.config.num_blocks)
    elif system.heuristic is not None:
        rule = getattr(bdf.heuristics, system.heuristic)
        decisions = rule(system.k, engine.config.layers, 1)
    elif isinstance(engine.model, bdf.Cascade) or not isinstance(
        policy, (bdf.FixedPolicy, NoneType)
    ):
        return Loaded(system, engine, None)
    return Loaded(system, engine, decisions.repeat(EVALUATION_BATCH, 1))


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
    depth = one.engine.config.num_blocks
    return [
        other
        for other in loaded
        if other.system.group == one.system.rival
        and other.keep is not None
        and (other.engine.config.num_blocks == depth or other.keep.all())
    ]
