"""Files of what was found out on a device: the user's own, and those that come with the package.

Each holds a list of entries in JSON. One that is not such a file is warned of, and taken as absent.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from blockdrop_fast.files import write_json

CACHE_VARIABLE = "BLOCKDROP_CACHE"
PACKAGED = Path(__file__).with_name("gpus")  # a folder a GPU


def user_file(name: str) -> Path:
    """Where a user's own are kept: in the folder BLOCKDROP_CACHE, or in ~/.cache."""
    folder = os.environ.get(CACHE_VARIABLE)
    return Path(folder or Path.home() / ".cache" / "blockdrop_fast") / name


def files(name: str) -> list[Path]:
    """All files of a name that there may be, the user's first."""
    return [user_file(name), *sorted(PACKAGED.glob(f"*/{name}"))]


def read(path: Path, format: str, check: Callable[[dict], object]) -> list[dict]:
    """The entries of a file; none, and a warning, if it is not such a file.

    Args:
        path: of the file, which need not exist.
        format: what it has to call itself.
        check: raises KeyError, TypeError, ValueError, AttributeError or OverflowError unless an
            entry is one.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != format:
            raise ValueError(f"its format is {content['format']!r}, expected {format!r}")
        for entry in content["entries"]:
            check(entry)
        return content["entries"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        warnings.warn(
            f"{path} is no file of the format {format!r} and is ignored "
            f"({type(error).__name__}: {error})",
            stacklevel=3,
        )
        return []


def write(path: Path, format: str, before: list[dict], entries: list[dict]) -> None:
    """Write a file in one step; its folder is made.

    A file that is there, but is no such file, is kept beside it, ``.unreadable`` added to its name.

    Args:
        path, format: see ``read``.
        before: what ``read`` gave.
        entries: all that there are now.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not before:
        path.replace(path.with_name(path.name + ".unreadable"))
    write_json(path, {"format": format, "entries": entries})
