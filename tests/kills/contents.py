"""What the files of runs hold, and where two runs differ."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from blockdrop_fast.networks.checkpoint_files import read_torch
from blockdrop_fast.networks.checkpoints import load_any
from train.run_files import METRICS_FILE, STATE_FILE

EVENTS = "events.out.tfevents."

# Measured in seconds, or naming the folder or the machine.
DIFFERS = {"images_per_second", "milliseconds", "speedup", "samples", "machine", "text"}
DIFFERS |= {"config", "checkpoint", "command"}


def files_of(folder: Path) -> Iterator[Path]:
    """Those with their final name: what is being written has one with a dot."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            yield path


def _read_model(path: Path) -> dict:
    load_any(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors | {"metadata": file.metadata()}


def _read_state(path: Path) -> dict:
    state = read_torch(path)
    if "history" in state:
        state["history"] = json.loads(state["history"])
    return state


def _read_json(path: Path) -> object:
    content = json.loads(path.read_text())
    if isinstance(content, dict) and "evaluations" in content:
        # By hashes of files, whose metadata have no order.
        content["evaluations"] = sorted(map(json.dumps, content["evaluations"].values()))
    return content


def _read_figure(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


READERS: dict[str, Callable[[Path], object]] = {
    ".safetensors": _read_model,
    ".pt": _read_state,
    ".json": _read_json,
    ".png": _read_figure,
    ".jpg": _read_figure,
    ".md": lambda path: None if path.read_text().endswith("\n") else 1 / 0,
}


def contents(folder: Path) -> dict[str, object]:
    """What each file holds that two runs must agree in.

    Raises:
        AssertionError: a file cannot be read, or is older than the state beside it.
    """
    found: dict[str, object] = {}
    for path in files_of(folder):
        name = str(path.relative_to(folder))
        if path.name.startswith(EVENTS):
            found.setdefault(f"{path.parent.relative_to(folder)}/events", None)
            continue
        assert path.suffix in READERS, f"{name}: no reader for such files"
        try:
            found[name] = READERS[path.suffix](path)
        except Exception as error:
            raise AssertionError(f"{name} cannot be read: {error!r}") from error
    for name, state in found.items():
        if name.endswith(STATE_FILE):
            rows = found.get(str(Path(name).with_name(METRICS_FILE)))
            assert rows is not None, f"{name} has no metrics beside it"
            assert len(rows) >= state["epoch"], f"{name} is newer than the metrics beside it"
    return found


def shown_values(folder: Path) -> dict[str, object]:
    """What TensorBoard shows of each run: tag -> (step, value) of each epoch."""
    found = {}
    for run in sorted({path.parent for path in files_of(folder) if path.name.startswith(EVENTS)}):
        events = EventAccumulator(str(run), size_guidance={"scalars": 0})
        events.Reload()
        found[f"{run.relative_to(folder)}/events"] = {
            tag: [(one.step, one.value) for one in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
        }
    return found


def differences(one: object, other: object, where: str = "") -> list[str]:
    """Where two contents differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = [name for name in {**one, **other} if name not in DIFFERS]
        found = []
        for name in names:
            if name in one and name in other:
                found += differences(one[name], other[name], f"{where}/{name}")
            else:
                found.append(f"{where}/{name} is in one alone")
        return found
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [each for at, pair in pairs for each in differences(*pair, f"{where}/{at}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = (one.dtype, one.shape) == (other.dtype, other.shape) and _bits(one) == _bits(other)
    else:
        same = one == other or (one != one and other != other)
    return [] if same else [f"{where} differs"]


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def age_events(folder: Path) -> None:
    """Put event files before those of the next process, also within a second.

    TensorBoard goes by their names, which begin with the second.
    """
    for number, path in enumerate(
        sorted((one for one in folder.rglob(f"{EVENTS}*")), key=lambda one: one.stat().st_mtime_ns)
    ):
        rest = path.name.removeprefix(EVENTS).split(".", 1)[1]
        rest = rest if rest.startswith("aged") else f"aged.{os.urandom(4).hex()}"
        path.rename(path.with_name(f"{EVENTS}{number:010d}.{rest}"))
