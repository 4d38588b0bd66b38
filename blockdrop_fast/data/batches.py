"""Reading data sets: in-memory image sets, ImageNet-style folders, normalisation and batches.

``load_dataset`` recognises what lies in a folder and returns its two splits. Small images (CIFAR,
the embedded digits) are kept in memory as uint8 and augmented in batches on the device; larger
ones are read from their files by a DataLoader. ``batches_of`` hides the difference.

``image_sets`` has the types, ``cifar_files`` and ``image_files`` read what is on disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdrop_fast.data.cifar_files import load_cifar10, load_cifar100
from blockdrop_fast.data.image_files import (
    FileImages,
    file_batches,
    file_loader,
    load_image_tree,
)
from blockdrop_fast.data.image_sets import (
    NO_NORMALIZATION,
    Dataset,
    ImageFolder,
    ImageSet,
    Normalization,
    epoch_generator,
)

DATA_VARIABLE = "BLOCKDROP_DATA"
CROP_PADDING = 4


def load_dataset(data: str | Path | None = None) -> Dataset:
    """Load the data set in a folder, or the embedded digits.

    Recognised are ``cifar-10-batches-py`` and ``cifar-100-python`` in their standard form, each as
    the folder itself or as its parent, and a tree of images, ``train/`` and ``test/`` or ``val/``
    with a folder for each class, classes in alphabetical order. Nothing is written to the folder.

    Args:
        data: the folder; None means the one that the environment variable BLOCKDROP_DATA names,
            and if that is unset, scikit-learn's handwritten digits, scaled up to 32×32.

    Returns:
        The data set; its splits are ``ImageSet``s, for images above 64 pixels ``ImageFolder``s.

    Raises:
        FileNotFoundError, NotADirectoryError: the folder, or a file that belongs in it, is missing.
        ValueError: the folder's layout, classes or image sizes are not as described, or a CIFAR
            file is damaged, or holds anything but plain data.
        OSError: an image cannot be read; the message names it.
    """
    source = "data"
    if data is None:
        data = os.environ.get(DATA_VARIABLE) or None
        source = DATA_VARIABLE
    if data is None:
        return load_digits()
    root = Path(data).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"{source}: the folder {str(root)!r} does not exist")
    if not root.is_dir():
        raise NotADirectoryError(f"{source}: expected a folder, {str(root)!r} is a file")

    found = [
        (kind, folder)
        for folder in (root, root / "cifar-10-batches-py", root / "cifar-100-python")
        if (kind := _folder_kind(folder)) is not None
    ]
    if not found:
        raise ValueError(
            f"{source}: no data set recognised in {str(root)!r}; expected cifar-10-batches-py, "
            "cifar-100-python, or train/ and test/ (or val/) with a folder for each class"
        )
    if len(found) > 1:
        folders = ", ".join(repr(str(folder)) for _, folder in found)
        raise ValueError(f"{source}: several data sets found, name one of them: {folders}")
    kind, folder = found[0]
    return {"cifar10": load_cifar10, "cifar100": load_cifar100, "tree": load_image_tree}[kind](
        folder
    )


def load_digits() -> Dataset:
    """Load scikit-learn's 1,797 handwritten digits, 8×8 scaled up to 32×32×3 by interpolation.

    Every fifth image of each class is a test image, so the split is the same everywhere.
    """
    from sklearn.datasets import load_digits as load_sklearn_digits

    digits = load_sklearn_digits()
    small = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).long()
    rank_in_class = torch.zeros_like(labels)
    for label in range(10):
        members = labels == label
        rank_in_class[members] = torch.arange(int(members.sum()))
    is_test = rank_in_class % 5 == 4
    classes = tuple(str(label) for label in range(10))
    train, test = (
        ImageSet(images[chosen], labels[chosen], classes, "digits", flip=False)
        for chosen in (~is_test, is_test)
    )
    return Dataset(train, test, "digits", classes)


class Batches:
    """Iterator over the batches of one epoch, with a length; made by ``batches``."""

    def __init__(self, iterator: Iterator[tuple[Tensor, Tensor]], length: int) -> None:
        self._iterator = iterator
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        return next(self._iterator)


def batches_of(
    image_set: ImageSet | ImageFolder,
    batch_size: int,
    *,
    shuffle: bool = False,
    augment: bool = False,
    normalization: Normalization = NO_NORMALIZATION,
    seed: int = 0,
    epoch: int = 0,
    device: torch.device | str | None = None,
    drop_last: bool = False,
    flip: bool | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    workers: int = 2,
    numbered: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> Batches:
    """Iterate over one epoch of a split in normalised batches.

    All randomness is a function of ``seed`` and ``epoch`` alone: it does not depend on the device,
    on other random draws or on the number of workers, so a resumed training sees the same batches.

    Args:
        image_set: the split.
        batch_size: images in a batch, at least 1; the last batch may be smaller.
        shuffle: draw the order of the images, otherwise keep it.
        augment: for in-memory images, crop each at random after padding it with 4 black pixels a
            side, and mirror half of them; for image files, a random resized crop, and the same.
        normalization: applied to the images in 0…1.
        seed: non-negative.
        epoch: non-negative.
        device: of the batches; None means where the split lies.
        drop_last: leave out a last batch that is smaller than the others.
        flip: let augmentation mirror images; None means ``image_set.flip``.
        memory_format: torch.contiguous_format or torch.channels_last.
        workers: processes that read image files; not used for in-memory images.
        numbered: give each image's number in the split instead of its label, for who knows more
            of the images than their labels.
        shard: (r, p): of each batch only every p-th image, from number r on, for one of p processes
            that train on it together.

    Returns:
        An iterator, with a length, of images (B, 3, H, W) float32 and labels (B,) int64.

    Raises:
        TypeError: image_set is neither an ImageSet nor an ImageFolder.
        ValueError: batch_size, seed, epoch, shard or memory_format is out of range.
    """
    if not isinstance(image_set, (ImageSet, ImageFolder)):
        raise TypeError(
            f"image_set: expected an ImageSet or ImageFolder, got {type(image_set).__name__}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if not 0 <= shard[0] < shard[1] <= batch_size:
        raise ValueError(
            f"shard: expected (r, p) with 0 <= r < p <= batch_size {batch_size}, got {shard}"
        )
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            f"memory_format: expected contiguous_format or channels_last, got {memory_format}"
        )
    flip = image_set.flip if flip is None else flip
    generator = epoch_generator(seed, epoch)
    total = len(image_set)
    length = total // batch_size if drop_last else -(-total // batch_size)
    if isinstance(image_set, ImageSet):
        labels = torch.arange(total, device=image_set.device) if numbered else image_set.labels
        raw = _memory_batches(
            image_set.images,
            labels,
            batch_size,
            length,
            shuffle,
            augment,
            flip,
            generator,
            device,
            shard,
        )
    else:
        if numbered:
            image_set = replace(image_set, labels=torch.arange(total))
        files = FileImages(image_set, augment=augment, flip=flip, seed=seed, epoch=epoch)
        loader = file_loader(
            files, batch_size, shuffle=shuffle, drop_last=drop_last, workers=workers, shard=shard
        )
        raw = file_batches(loader)

    def normalised() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in raw:
            images = images.to(device, non_blocking=True) if device is not None else images
            labels = labels.to(device, non_blocking=True) if device is not None else labels
            images = images.to(torch.float32, memory_format=memory_format).div_(255)
            yield normalization.apply(images), labels

    return Batches(normalised(), length)


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """Shift each image by its own offset, filling with zeros, and mirror the marked ones.

    Args:
        images: (B, C, H, W), any dtype.
        offsets: (B, 2) int64 in 0…2·CROP_PADDING, row and column at which the crop of size (H, W)
            starts in the image padded by CROP_PADDING on each side; (4, 4) changes nothing.
        flips: (B,) bool, mirror the crop left to right.

    Returns:
        (B, C, H, W) of the same dtype, contiguous.
    """
    count, channels, height, width = images.shape
    padded = F.pad(images, (CROP_PADDING,) * 4)
    padded_width = padded.shape[3]
    rows = offsets[:, :1] + torch.arange(height, device=images.device)  # (B, H)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flips[:, None], columns.flip(0), columns) + offsets[:, 1:]  # (B, W)
    pixels = (rows * padded_width)[:, :, None] + columns[:, None, :]  # (B, H, W)
    pixels = pixels.view(count, 1, height * width).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, pixels).view(images.shape)


def _memory_batches(
    split: Tensor,
    labels: Tensor,
    batch_size: int,
    length: int,
    shuffle: bool,
    augment: bool,
    flip: bool,
    generator: torch.Generator,
    device: torch.device | str | None,
    shard: tuple[int, int],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield uint8 batches of a split in memory, augmented where they will be used."""
    total = len(split)
    device = split.device if device is None else torch.device(device)
    # The epoch's draws are made at once, on the CPU: they are the same for every device and batch
    # size, and cost a GPU one copy an epoch instead of a synchronisation a batch.
    order = torch.randperm(total, generator=generator) if shuffle else None
    order = order if order is None else order.to(split.device)
    if augment:
        offsets = torch.randint(2 * CROP_PADDING + 1, (total, 2), generator=generator).to(device)
        flips = torch.randint(2, (total,), generator=generator).bool()
        flips = (flips & flip).to(device)
    for start in range(0, length * batch_size, batch_size):
        chosen = slice(start + shard[0], min(start + batch_size, total), shard[1])
        source = chosen if order is None else order[chosen]
        images = split[source]
        if augment:
            images = images.to(device, non_blocking=True)
            images = crop_and_flip(images, offsets[chosen], flips[chosen])
        yield images, labels[source]


def _folder_kind(folder: Path) -> str | None:
    """Tell by its entries which kind of data set a folder holds, if any."""
    if (folder / "data_batch_1").is_file() or (folder / "batches.meta").is_file():
        return "cifar10"
    if (folder / "train").is_file() and (folder / "meta").is_file():
        return "cifar100"
    return "tree" if (folder / "train").is_dir() else None
