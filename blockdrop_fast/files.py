"""Writing files so that a reader, or a crash, never sees half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path`` in one step.

    The file gets the permissions that a plain ``open`` would give it; a symbolic link stays one.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    path = Path(path).resolve()
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new_file(out: Path, suffixes: Sequence[str]) -> None:
    """Raise before any work is done unless a file of this name can be written.

    Raises:
        ValueError: its name ends otherwise.
        FileNotFoundError: its folder does not exist.
    """
    if out.suffix not in suffixes:
        *first, last = suffixes
        endings = f"{', '.join(first)} or {last}" if first else last
        raise ValueError(f"out: expected a name that ends in {endings}, got {str(out)!r}")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"out: the folder {str(out.parent)!r} does not exist")


def _umask() -> int:
    # It can only be read by setting it.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
