"""The crossover table: from which share of kept blocks on dropping does not pay, as measured.

``blockdrop benchmark --calibrate`` measures it on the user's device and writes it to the user's
file; engines read it when they are made. One file holds the tables of all networks, precisions
and devices. Without one, executors go by their defaults.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from blockdrop_fast.executors import measured
from blockdrop_fast.machine import cpu_model, machine_info
from blockdrop_fast.networks.resnet import ResNetConfig

FILE_NAME = "crossover.json"
FORMAT = "blockdrop_fast crossover 1"
NEVER = 2.0  # a share that none reaches


@dataclass(frozen=True)
class Cell:
    """What was measured at one batch size and keep rate.

    Attributes:
        batch: images.
        keep: share of blocks that each image keeps, drawn at random for each image.
        seconds: "dense", "gather" and, where it serves the network, "walk" -> median of a call at
            given decisions. "gather" never runs dropped images along; "dense" runs all images.
    """

    batch: int
    keep: float
    seconds: dict[str, float]


@dataclass(frozen=True)
class Crossover:
    """The measured table of one network, precision and device.

    Attributes:
        cells: at least one.
        source: the file and the day of the measurement.
    """

    cells: tuple[Cell, ...]
    source: str

    def dense_from(self, batch: int) -> float:
        """The share of active images from which computing all of a block's beats gathering them.

        Read at the nearest measured batch size, between keep rates by interpolation. What is kept
        by all needs no gathering, so the keep rate 1 does not count.

        Args:
            batch: images, at least 1.

        Returns:
            In 0 to 1; 2.0 if gathering won everywhere, or no keep rate below 1 was measured.
        """
        cells = sorted(
            (cell for cell in self._nearest(batch) if cell.keep < 1),
            key=lambda cell: cell.keep,
            reverse=True,
        )
        share, gain = NEVER, 0.0
        for cell in cells:
            # Above 0: gathering loses.
            loss = math.log(cell.seconds["gather"] / cell.seconds["dense"])
            if loss <= 0:
                if share < NEVER:
                    share -= (share - cell.keep) * gain / (gain - loss)
                break
            share, gain = cell.keep, loss
        return share

    def walk_wins(self, batch: int) -> bool | None:
        """Whether the walk beat dense and gather at every keep rate of the nearest batch size.

        Returns:
            None if the walk was not measured there.
        """
        cells = self._nearest(batch)
        if not all("walk" in cell.seconds for cell in cells):
            return None
        return all(
            cell.seconds["walk"] <= min(cell.seconds["dense"], cell.seconds["gather"])
            for cell in cells
        )

    def walk_wins_somewhere(self) -> bool:
        """Whether there is a batch size at which the walk won."""
        return any(self.walk_wins(cell.batch) for cell in self.cells)

    def walk_loses_somewhere(self) -> bool:
        """Whether there is a batch size at which the walk was measured and did not win."""
        return any(self.walk_wins(cell.batch) is False for cell in self.cells)

    def _nearest(self, batch: int) -> list[Cell]:
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
        sizes = {cell.batch for cell in self.cells}
        nearest = min(sizes, key=lambda size: (abs(math.log(size / batch)), size))
        return [cell for cell in self.cells if cell.batch == nearest]


def user_file() -> Path:
    """Where a user's measurements are kept."""
    return measured.user_file(FILE_NAME)


def load(config: ResNetConfig, dtype: torch.dtype, device: torch.device | str) -> Crossover | None:
    """The table for a network on a device: the user's own, else one that comes with the package.

    A file that is not such a table is warned of, and taken as absent.

    Args:
        config: the backbone's architecture; the number of classes does not matter.
        dtype: of weights and images.
        device: a GPU, or the CPU at torch's present number of threads.

    Returns:
        None if this combination was not measured.
    """
    wanted = _key(config, dtype, torch.device(device))
    for path in measured.files(FILE_NAME):
        for entry in _read(path):
            if entry["key"] == wanted:
                return Crossover(_cells(entry), f"{path}, {entry['measured']}")
    return None


def save(
    config: ResNetConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    cells: Iterable[Cell],
    path: Path | None = None,
) -> Path:
    """Add measured cells to a file, in one step; its other tables and batch sizes stay.

    A file that is not such a table is kept beside it, with ``.unreadable`` added to its name.

    Args:
        config, dtype, device: see ``load``.
        cells: replace those of the same batch sizes.
        path: default: the user's file.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
    """
    path, cells = Path(path or user_file()), list(cells)
    entries = _read(path)
    wanted, replaced = _key(config, dtype, torch.device(device)), {cell.batch for cell in cells}
    old = [entry for entry in entries if entry["key"] == wanted]
    kept = [cell for entry in old for cell in _cells(entry) if cell.batch not in replaced]
    entry = {
        "key": wanted,
        "measured": datetime.date.today().isoformat(),
        "machine": machine_info(device),
        "cells": [asdict(cell) for cell in sorted(kept + cells, key=lambda c: (c.batch, c.keep))],
    }
    others = [one for one in entries if one["key"] != wanted]
    measured.write(path, FORMAT, entries, [*others, entry])
    return path


def _key(config: ResNetConfig, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """What the times depend on, as the file holds it."""
    on_gpu = device.type == "cuda"
    architecture = config.to_dict()
    del architecture["num_classes"]
    key = {
        "architecture": architecture,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_model(),
        "threads": 0 if on_gpu else torch.get_num_threads(),
    }
    return json.loads(json.dumps(key))  # tuples are lists in a file


def _read(path: Path) -> list[dict]:
    return measured.read(path, FORMAT, _check)


def _check(entry: dict) -> None:
    if not isinstance(entry["key"], dict) or not isinstance(entry["measured"], str):
        raise ValueError("a table has no key or no day")
    _cells(entry)


def _cells(entry: dict) -> tuple[Cell, ...]:
    """The checked cells of a table.

    Raises:
        KeyError, TypeError, ValueError: they are not what ``save`` writes.
    """
    cells = []
    for cell in entry["cells"]:
        seconds = {str(name): float(value) for name, value in cell["seconds"].items()}
        if not all(math.isfinite(value) and value > 0 for value in seconds.values()):
            raise ValueError(f"seconds: expected positive values, got {seconds}")
        if not {"dense", "gather"} <= set(seconds):
            raise ValueError(f"seconds: expected dense and gather among {sorted(seconds)}")
        batch, keep = int(cell["batch"]), float(cell["keep"])
        if batch < 1 or not 0 <= keep <= 1:
            raise ValueError(f"expected batch >= 1 and keep in 0 to 1, got {batch} and {keep}")
        cells.append(Cell(batch, keep, seconds))
    if not cells:
        raise ValueError("a table has no cells")
    return tuple(cells)
