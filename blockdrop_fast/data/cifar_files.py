"""The CIFAR archives as they are published: pickles, read without running any code of theirs."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch

from blockdrop_fast.data.image_sets import Dataset, ImageSet, check_labels


def load_cifar10(folder: Path) -> Dataset:
    """Read ``cifar-10-batches-py``.

    Raises:
        FileNotFoundError, ValueError: as of ``load_dataset``.
    """
    meta = _read_pickle(folder / "batches.meta")
    classes = _class_names(meta, "label_names", folder / "batches.meta")
    files = [folder / f"data_batch_{index}" for index in range(1, 6)]
    train = _read_cifar_split(files, "labels", classes, "CIFAR-10")
    test = _read_cifar_split([folder / "test_batch"], "labels", classes, "CIFAR-10")
    return Dataset(train, test, "CIFAR-10", classes)


def load_cifar100(folder: Path) -> Dataset:
    """Read ``cifar-100-python``, with its 100 fine classes.

    Raises:
        FileNotFoundError, ValueError: as of ``load_dataset``.
    """
    meta = _read_pickle(folder / "meta")
    classes = _class_names(meta, "fine_label_names", folder / "meta")
    train, test = (
        _read_cifar_split([folder / split], "fine_labels", classes, "CIFAR-100")
        for split in ("train", "test")
    )
    return Dataset(train, test, "CIFAR-100", classes)


def _class_names(meta: dict, key: str, path: Path) -> tuple[str, ...]:
    names = meta.get(key)
    if not isinstance(names, list) or not all(isinstance(name, (bytes, str)) for name in names):
        raise ValueError(f"{path}: expected a list of names under {key!r}, got {names!r}")
    return tuple(
        name.decode(errors="replace") if isinstance(name, bytes) else name for name in names
    )


def _read_cifar_split(
    files: list[Path], label_key: str, classes: tuple[str, ...], name: str
) -> ImageSet:
    images, labels = [], []
    for path in files:
        content = _read_pickle(path)
        array, file_labels = content.get("data"), content.get(label_key)
        if not isinstance(array, _PickledArray):
            raise ValueError(f"{path}: expected an array under 'data', got {type(array).__name__}")
        pixels = array.values
        if pixels.ndim != 2 or pixels.shape[1] != 3 * 32 * 32:
            raise ValueError(f"{path}: expected shape (N, 3072) under 'data', got {pixels.shape}")
        if (
            not isinstance(file_labels, list)
            or len(file_labels) != len(pixels)
            or not all(isinstance(label, int) for label in file_labels)
        ):
            raise ValueError(f"{path}: expected {len(pixels)} integers under {label_key!r}")
        images.append(torch.from_numpy(np.array(pixels, order="C")).view(-1, 3, 32, 32))
        labels.append(torch.tensor(file_labels, dtype=torch.int64))
        try:
            check_labels(labels[-1], len(classes))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return ImageSet(torch.cat(images), torch.cat(labels), classes, name)


class _PickledDtype:
    """Stands for numpy's uint8, the only type of the arrays in CIFAR files."""

    def __init__(self, spec: str | bytes, *_: object) -> None:
        if spec not in ("u1", b"u1", "|u1", b"|u1"):
            raise pickle.UnpicklingError(f"refused an array of type {spec!r}, expected uint8")

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and alignment, which mean nothing for single bytes."""


class _PickledArray:
    """Takes the place of a numpy array while it is read, so that no code of numpy's runs."""

    def __init__(self, *_: object) -> None:
        self.values = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self._fill(raw, dtype, shape, "F" if fortran else "C")

    def _fill(self, raw: bytes, dtype: _PickledDtype, shape: tuple, order: str) -> None:
        if not isinstance(dtype, _PickledDtype):
            raise pickle.UnpicklingError(f"refused an array of type {dtype!r}, expected uint8")
        self.values = np.frombuffer(raw, np.uint8).reshape(shape, order=order)


def _array_from_buffer(
    raw: bytes, dtype: _PickledDtype, shape: tuple, order: str, *_: object
) -> _PickledArray:
    array = _PickledArray()
    array._fill(raw, dtype, shape, order)
    return array


def _encode_from_pickle(text: str, encoding: str) -> bytes:
    # How Python 3 writes bytes in pickles that Python 2 can read.
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"refused the encoding {encoding!r}")
    return text.encode("latin1")


_PLAIN_GLOBALS: dict[tuple[str, str], object] = {
    ("_codecs", "encode"): _encode_from_pickle,
    ("numpy", "dtype"): _PickledDtype,
    ("numpy", "ndarray"): "numpy.ndarray",  # an argument of _reconstruct, never called
}
# numpy moved its internals from core to _core in 2.0; files of either version are read.
for _core in ("numpy.core", "numpy._core"):
    _PLAIN_GLOBALS[f"{_core}.multiarray", "_reconstruct"] = _PickledArray
    _PLAIN_GLOBALS[f"{_core}.numeric", "_frombuffer"] = _array_from_buffer


# In Python: the one in C makes a table of as many entries as a number in the file says, up to
# 64 GB, so that a byte could use up the machine's memory. On these files it is no faster.
class _PlainUnpickler(pickle._Unpickler):
    """Unpickler of built-in containers and uint8 arrays, which refuses every other name."""

    def find_class(self, module: str, name: str) -> object:
        try:
            return _PLAIN_GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"refused {module}.{name}: only plain data and numpy arrays are read"
            ) from None


def _read_pickle(path: Path) -> dict:
    """Read a dict of plain data; keys are returned as str, whichever Python wrote them."""
    if not path.is_file():
        raise FileNotFoundError(f"data: the file {str(path)!r} is missing")
    with open(path, "rb") as file:
        try:
            content = _PlainUnpickler(file, encoding="bytes").load()
        except Exception as error:  # a damaged stream can raise nearly anything
            raise ValueError(
                f"{path}: damaged, or not a CIFAR file ({type(error).__name__}: {error})"
            ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict, got {type(content).__name__}")
    return {
        key.decode(errors="replace") if isinstance(key, bytes) else key: value
        for key, value in content.items()
    }
