"""Writing files so that a reader, or a crash, never sees half of one."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path`` in one step.

    The file gets the permissions that a plain ``open`` would give it; a symbolic link stays one.
    What killed processes have left of the same file goes.

    Raises:
        OSError: naming the file: its folder does not exist or cannot be written, the disk is full.
    """
    path = Path(path).resolve()
    remove_leftovers(path)
    try:
        descriptor, name = tempfile.mkstemp(prefix=_prefix(path), dir=path.parent)
    except OSError as error:
        raise _of(path, error) from None
    temporary = Path(name)
    try:
        _lock(descriptor)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, name):
            raise
        raise _of(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file, in UTF-8, as ``atomic_write`` does.

    Raises:
        OSError: see ``atomic_write``.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, for people to read as well, as ``atomic_write`` does.

    Raises:
        OSError: see ``atomic_write``.
    """
    write_text(path, json.dumps(content, indent=1) + "\n")


def json_checksum(content: Any) -> str:
    """Of what a JSON file holds, or will hold, however it is written."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes have left of ``path``, not what others are writing.

    Without locks in its file system, which tell one from the other, all stays.
    """
    for leftover in path.parent.glob(f"{glob.escape(_prefix(path))}????????"):
        with suppress(OSError), open(leftover, "r+b") as file:
            if _lock(file.fileno()):
                leftover.unlink()


def check_new_folder(folder: Path, size: int = 0) -> None:
    """Raise before any work is done unless a folder can be made and written.

    Args:
        folder: may exist; is not made.
        size: bytes that will be written.

    Raises:
        OSError: naming the folder: it cannot be made or written, or has less room.
    """
    whole = folder.absolute()
    there = next(one for one in (whole, *whole.parents) if one.exists())
    try:
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise _of(folder, error) from None
    free = shutil.disk_usage(there).free
    if free < size:
        raise OSError(
            f"{folder}: no room, {size / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free"
        )


def check_new_file(argument: str, path: Path, suffixes: Sequence[str] = ()) -> None:
    """Raise before any work is done unless a file of this name can be written.

    Args:
        argument: the path's, for errors.
        path: of the file.
        suffixes: its name ends in one of these; none: in anything.

    Raises:
        ValueError: its name ends otherwise.
        OSError: it is a folder, or its folder does not exist or cannot be written.
    """
    if suffixes and path.suffix not in suffixes:
        *first, last = suffixes
        endings = f"{', '.join(first)} or {last}" if first else last
        raise ValueError(f"{argument}: expected a name that ends in {endings}, got {str(path)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"{argument}: {str(path)!r} is a folder, expected a file's name")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{argument}: the folder {str(path.parent)!r} does not exist")
    check_new_folder(path.parent)


def _lock(descriptor: int) -> bool:
    """Whether nobody else holds the file: whoever writes it does, until it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return False
    return True


def _prefix(path: Path) -> str:
    return f".{path.name}."


def _of(path: Path, error: OSError) -> OSError:
    """The error, naming a path that the user knows."""
    return OSError(error.errno, error.strerror, str(path))


def _umask() -> int:
    # It can only be read by setting it.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
