"""A run on disk: its folder, the options it was started with, its state."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blockdrop_fast.files import check_new_folder
from blockdrop_fast.networks.checkpoint_files import content_key, read_first_values, read_torch
from blockdrop_fast.networks.checkpoints import locate
from train.config import Common

STATE_FILE = "state.pt"
MODEL_FILE = "model.safetensors"
METRICS_FILE = "metrics.json"
# A run may be resumed with other values of these: they do not change what it computes.
RESUMABLE = {
    "data",
    "out",
    "resume",
    "device",
    "threads",
    "workers",
    "timeout",
    "checkpoint_every",
    "evaluate_every",
    "routing_images",
    "static_images",
}


def check_out(config: Common) -> None:
    """Raise before any work is done unless a run can be written to its folder.

    Raises:
        FileExistsError: it holds another run, which is not to be resumed.
        OSError: it cannot be made or written.
    """
    check_new_folder(config.out)
    if (config.out / STATE_FILE).exists() and not config.resume:
        raise FileExistsError(
            f"out: {config.out} holds a run already; continue it with --resume, or name "
            "another folder"
        )


def options_text(config: Common) -> str:
    """A run's options, as its state on disk keeps them: JSON; see ``described`` for files."""
    return json.dumps(asdict(config), default=described)


def described(path: Path) -> str | dict[str, str]:
    """A path as options keep it: that of a file with its key, by which it is known elsewhere."""
    file = locate(path)
    return {"file": str(path), "key": content_key(file)} if file.is_file() else str(path)


def read_state(path: Path) -> dict:
    """The state of a run, ``STATE_FILE``.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is something else, or damaged.
    """
    state = read_torch(path)
    wanted = {"config", "epoch", "step", "history", "model", "optimizers", "schedulers"}
    if not wanted <= state.keys():
        raise ValueError(f"{path} is not the checkpoint of a run")
    return state


def read_progress(path: Path) -> tuple[int, str]:
    """The epoch of a run's state and its ``options_text``, without reading what was trained.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is something else, or damaged.
    """
    state = read_first_values(path)
    if not {"config", "epoch"} <= state.keys():
        raise ValueError(f"{path} is not the checkpoint of a run")
    return state["epoch"], state["config"]


def changed_options(started_with: str, config: Common) -> list[str]:
    """Options that a run was started with and that have other values now, but for ``RESUMABLE``.

    Args:
        started_with: ``options_text`` of then.
        config: the options now.

    Returns:
        "name then -> now" of each.
    """
    now, defaults = (json.loads(options_text(one)) for one in (config, type(config)()))
    # An option that there was not yet has its default.
    then = defaults | json.loads(started_with)
    return [
        f"{name} {shown(then[name])} -> {shown(now[name])}"
        + (", whose content is another" if shown(then[name]) == shown(now[name]) else "")
        for name in now
        if name not in RESUMABLE and not same_value(then[name], now[name])
    ]


def same_value(then: Any, now: Any) -> bool:
    """Whether an option's values, of JSON, are the same; of checkpoints, whether their content is.

    Where one has no key, of an older run or as the file is gone, their paths are compared.
    """
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return all(map(same_value, then, now))
    if isinstance(then, dict) and isinstance(now, dict):
        return then["key"] == now["key"]
    return shown(then) == shown(now)


def shown(value: Any) -> Any:
    """An option's value, of JSON, without keys of files."""
    if isinstance(value, list):
        return [*map(shown, value)]
    return value["file"] if isinstance(value, dict) else value


def check_options(started_with: str, config: Common) -> None:
    """Raise ValueError where a run would go on with other options; see ``changed_options``."""
    if changed := changed_options(started_with, config):
        raise ValueError("resume: the run was started with other options: " + ", ".join(changed))
