"""Which GPUs our kernels have passed their tests on: ``auto`` takes them there, and nowhere else.

`make gpu-check` writes a record of whose tests have passed. It holds for one model of GPU, the
sources of the kernels, and one minor version of torch, whose Triton and cuDNN they use.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from blockdrop_fast._extension import build_record
from blockdrop_fast.executors import measured
from blockdrop_fast.machine import machine_info

FILE_NAME = "proven.json"
FORMAT = "blockdrop_fast proven 1"
STRATEGIES = ("walk", "gather")
# With the CUDA sources, which setup.py hashes where they are: an installed package has none.
PYTHON_SOURCES = (
    "executors/gather_graph.py",
    "executors/graph_choice.py",
    "executors/recording.py",
    "ops/gathered_conv.py",
    "ops/walk_half.py",
    "triton_kernels/config.py",
    "triton_kernels/gathered_conv.py",
)


@dataclass(frozen=True)
class Proof:
    """What has passed its tests on a GPU.

    Attributes:
        strategies: of ``STRATEGIES``; empty if there is no record that holds.
        reason: where the record is, or why there is none.
    """

    strategies: frozenset[str]
    reason: str


@functools.cache
def kernels_hash() -> str:
    """Names the sources of this installation's kernels; empty without CUDA kernels."""
    cuda = build_record().get("cuda_sources")
    if not cuda:
        return ""
    found = hashlib.sha256(cuda.encode())
    for name in PYTHON_SOURCES:
        found.update(Path(__file__).parents[1].joinpath(name).read_bytes())
    return found.hexdigest()


def load(device: torch.device | str) -> Proof:
    """The record for this installation on a GPU: the user's own, else one of the package.

    Args:
        device: a CUDA device.
    """
    gpu = torch.cuda.get_device_name(device)
    return _load(gpu, _minor(torch.__version__), kernels_hash(), tuple(measured.files(FILE_NAME)))


@functools.cache
def _load(gpu: str, version: str, kernels: str, files: Sequence[Path]) -> Proof:
    if not kernels:
        return Proof(frozenset(), "the extension was built without CUDA kernels")
    reason = f"our kernels have not passed `make gpu-check` on an {gpu}"
    for path in files:
        for entry in measured.read(path, FORMAT, _check):
            where = f"{path}, {entry['checked']}"
            if entry["gpu"] != gpu:
                continue
            if entry["kernels"] != kernels:
                reason = f"our kernels have changed since they passed on an {gpu} ({where})"
            elif _minor(entry["torch"]) != version:
                reason = f"they passed on an {gpu} with torch {entry['torch']} ({where})"
            elif not entry["strategies"]:
                return Proof(frozenset(), f"`make gpu-check` did not pass on an {gpu} ({where})")
            else:
                names = " and ".join(entry["strategies"])
                return Proof(frozenset(entry["strategies"]), f"{names} passed ({where})")
    return Proof(frozenset(), reason)


def save(
    strategies: Sequence[str], device: torch.device | str = "cuda", path: Path | None = None
) -> Path:
    """Write down which of this installation's kernels have passed their tests on a GPU.

    Args:
        strategies: of ``STRATEGIES``, whose tests passed; none is a record, too.
        device: the GPU.
        path: default: the user's file; its records of other GPUs stay.

    Returns:
        The file.

    Raises:
        ValueError: strategies that there are not, or no CUDA kernels.
        OSError: it cannot be written.
    """
    if not set(strategies) <= set(STRATEGIES):
        raise ValueError(f"strategies: expected some of {STRATEGIES}, got {strategies}")
    if not kernels_hash():
        raise ValueError("proven: the extension was built without CUDA kernels")
    path = Path(path or measured.user_file(FILE_NAME))
    entry = {
        "gpu": torch.cuda.get_device_name(device),
        "kernels": kernels_hash(),
        "torch": torch.__version__,
        "strategies": list(strategies),
        "checked": datetime.date.today().isoformat(),
        "machine": machine_info(device),
    }
    before = measured.read(path, FORMAT, _check)
    others = [one for one in before if one["gpu"] != entry["gpu"]]
    measured.write(path, FORMAT, before, [*others, entry])
    _load.cache_clear()
    return path


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _check(entry: dict) -> None:
    if not set(entry["strategies"]) <= set(STRATEGIES):
        raise ValueError(f"strategies: expected some of {STRATEGIES}, got {entry['strategies']}")
    for key in ("gpu", "kernels", "torch", "checked"):
        if not isinstance(entry[key], str):
            raise ValueError(f"{key}: expected a string, got {entry[key]!r}")
