"""A run on disk: its folder, the options it was started with, its state."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from blockdrop_fast.files import check_new_folder
from blockdrop_fast.networks.checkpoint_files import read_torch
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
    """A run's options, as its state on disk keeps them: JSON."""
    return json.dumps(asdict(config), default=str)


def read_state(path: Path, *more: str) -> dict:
    """The state of a run, ``STATE_FILE``.

    Args:
        path: of the file.
        more: what is needed beside "config" and "epoch", which are all that rules leave behind.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is something else, or damaged.
    """
    state = read_torch(path)
    if not {"config", "epoch", *more} <= state.keys():
        raise ValueError(f"{path} is not the checkpoint of a run")
    return state


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
        f"{name} {then[name]} -> {now[name]}"
        for name in now
        if name not in RESUMABLE and then[name] != now[name]
    ]


def check_options(started_with: str, config: Common) -> None:
    """Raise ValueError where a run would go on with other options; see ``changed_options``."""
    if changed := changed_options(started_with, config):
        raise ValueError("resume: the run was started with other options: " + ", ".join(changed))
