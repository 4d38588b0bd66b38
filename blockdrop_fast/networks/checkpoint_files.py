"""Files of tensors: safetensors with our metadata, and PyTorch's. Nothing in them is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from blockdrop_fast.files import atomic_write

FORMAT_VERSION = 1
_METADATA_KEY = "blockdrop_fast"
_CHECKSUM_KEY = "crc32"  # of our metadata and all tensors; files of before 0.2 have none
# Of a pickle: text and numbers, and what may stand between those at its beginning.
_PLAIN = {"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_AROUND = {"PROTO", "EMPTY_DICT", "BINPUT", "LONG_BINPUT", "MARK"}
Tensors = dict[str, Tensor]


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded; the message names the file and what is wrong with it."""


def read(path: Path) -> tuple[dict, dict | None]:
    """Read any checkpoint: (content, our own metadata or None for foreign files).

    Raises:
        OSError: the file cannot be opened.
        CheckpointError: it is neither a safetensors nor a PyTorch file, unsafe or damaged.
    """
    with open(path, "rb") as file:
        start = file.read(16)
    if not start:
        raise CheckpointError(f"{path}: is empty")
    # A safetensors file is the length of its header in 8 bytes, and then the header in JSON.
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    return read_torch(path), None


def read_torch(path: Path) -> dict:
    """Read a dictionary that ``torch.save`` wrote, of tensors, on the CPU, and of plain values.

    Raises:
        OSError: the file cannot be opened.
        CheckpointError: it is no such file, unsafe or damaged.
    """
    with open(path, "rb") as file:
        start = file.read(2)
    # Zip archives (torch.save since 1.6) and pickles (before) begin like this.
    if not start.startswith((b"PK", b"\x80")):
        raise CheckpointError(f"{path}: is neither a safetensors nor a PyTorch file")
    try:
        if start == b"PK":
            _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The first line says it; PyTorch's others advise to load the file unsafely.
        raise CheckpointError(
            f"{path}: refused. It holds more than tensors and plain values, and loading such a "
            f"pickle could run code, or it is damaged ({_reason(error)}). Save its state_dict() "
            "instead"
        ) from None
    except Exception as error:  # a damaged archive fails in any way
        raise CheckpointError(
            f"{path}: cannot be read, it may be truncated ({type(error).__name__}: "
            f"{_reason(error)})"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors, got a {type(content).__name__}"
        )
    return content


def read_first_values(path: Path) -> dict[str, str | int | float]:
    """The text and numbers with which a dictionary that ``write_torch`` wrote begins.

    Reads, and verifies, only the part of the file that is not tensors: of many of them most of the
    time to read them goes into what they are, not into their values.

    Raises:
        OSError: the file cannot be opened.
        CheckpointError: it is no such file, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (one for one in archive.namelist() if one.endswith("/data.pkl"))
            pickled = archive.read(name)  # verified
        values = []
        for operation, value, _ in pickletools.genops(pickled):
            if operation.name in _PLAIN:
                values.append(value)
            elif operation.name not in _AROUND:
                break
    except (zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read, it may be truncated ({_reason(error)})"
        ) from None
    return dict(zip(values[::2], values[1::2], strict=False))


def content_key(path: Path) -> str:
    """Equal for files of equal tensors and metadata: our own checksum, or that of a foreign file.

    Raises:
        OSError: the file cannot be opened.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            checksum = (file.metadata() or {}).get(_CHECKSUM_KEY)
    except safetensors.SafetensorError:
        checksum = None
    return f"{zlib.crc32(path.read_bytes()):08x}" if checksum is None else checksum


def write_torch(content: dict, path: Path) -> None:
    """Write what ``read_torch`` reads, atomically.

    Raises:
        OSError: it cannot be written; an earlier file is then untouched.
    """
    # Not straight into the file: errors of a full disk would be RuntimeErrors that do not say so.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as temporary:
        # Not getbuffer(): in an error's traceback it crashes Python 3.12's collector (gh-111049).
        temporary.write_bytes(buffer.getvalue())


def _check_archive(path: Path) -> None:
    """Raise ValueError unless the checksums of a zip archive are right: PyTorch does not look."""
    with zipfile.ZipFile(path) as archive:
        if not any(entry.CRC for entry in archive.infolist()):
            return  # torch.serialization.set_crc32_options(False)
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"wrong checksum of {damaged}")


def _reason(error: Exception) -> str:
    """The line of PyTorch's message that says what was found, without its advice around it."""
    lines = [line.split("WeightsUnpickler error:")[-1].strip() for line in str(error).split("\n")]
    telling = [line for line in lines if re.search(r"unsupported|global", line, re.IGNORECASE)]
    return (telling or lines)[0].split(". Please")[0][:200]


def _read_safetensors(path: Path) -> tuple[Tensors, dict | None]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors, it may be truncated ({error})"
        ) from None
    if _METADATA_KEY not in metadata:
        return tensors, None
    text, checksum = metadata[_METADATA_KEY], metadata.get(_CHECKSUM_KEY)
    if checksum not in (None, _checksum(tensors, text)):
        raise CheckpointError(f"{path}: damaged, its checksum is wrong")
    try:
        metadata = json.loads(text)
        version = metadata["format_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged metadata ({error!r})") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format version {version!r}, this blockdrop_fast reads {FORMAT_VERSION}"
        )
    return tensors, metadata


def write_safetensors(
    tensors: Tensors, metadata: Mapping[str, Any], path: str | os.PathLike
) -> None:
    """Write what ``read`` takes for our own, atomically.

    Raises:
        OSError: it cannot be written; an earlier file is then untouched.
    """
    text = json.dumps({"format_version": FORMAT_VERSION, **metadata})
    about = {_METADATA_KEY: text, _CHECKSUM_KEY: _checksum(tensors, text)}
    with atomic_write(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, about))


def _checksum(tensors: Tensors, text: str) -> str:
    checksum = zlib.crc32(text.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        about = f"{key} {tensor.dtype} {tuple(tensor.shape)}"
        checksum = zlib.crc32(about.encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), checksum)
    return f"{checksum:08x}"


def some(names: Iterable, limit: int = 4) -> str:
    """The first of these names, and how many there are, for messages."""
    names = list(names)
    listed = ", ".join(str(name) for name in names[:limit]) or "none"
    return listed + (f", … ({len(names)} in all)" if len(names) > limit else "")
