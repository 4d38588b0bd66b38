"""CIFAR archives of few images, as Python 2 wrote them and as newer pickles are."""

import pickle

import numpy as np

from blockdrop_fast.data.image_files import CIFAR10_CLASSES


def py2_pickle(array_key: bytes, pixels: np.ndarray, labels: list[int], label_key: bytes) -> bytes:
    """The bytes that Python 2 and an old numpy wrote: the form of the published CIFAR files."""

    def short(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    raw = pixels.tobytes()
    rows, columns = (b"J" + int(size).to_bytes(4, "little") for size in pixels.shape)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        + short(b"b")
        + b"\x87R(K\x01"
        + rows
        + columns
        + b"\x86cnumpy\ndtype\n"
        + short(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + short(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + len(raw).to_bytes(4, "little")
        + raw
        + b"tb"
    )
    label_list = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + short(array_key) + array + short(label_key) + label_list + b"u."


def cifar_rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def write_cifar10(folder, write):
    folder.mkdir(parents=True)
    for index in range(1, 6):
        write(folder / f"data_batch_{index}", cifar_rows(4, index), [0, 9, index, 2], "labels")
    write(folder / "test_batch", cifar_rows(3, 6), [1, 2, 3], "labels")
    (folder / "batches.meta").write_bytes(
        pickle.dumps({b"label_names": [name.encode() for name in CIFAR10_CLASSES]}, protocol=2)
    )


def write_cifar100(folder, write):
    folder.mkdir(parents=True)
    write(folder / "train", cifar_rows(3, 0), [99, 0, 5], "fine_labels")
    write(folder / "test", cifar_rows(2, 1), [7, 98], "fine_labels")
    names = [f"class {index}".encode() for index in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": names}, protocol=2))


def write_as_python2(path, rows, labels, label_key):
    path.write_bytes(py2_pickle(b"data", rows, labels, label_key.encode()))


def writer_with_protocol(protocol):
    def write(path, rows, labels, label_key):
        path.write_bytes(pickle.dumps({"data": rows, label_key: labels}, protocol=protocol))

    return write
