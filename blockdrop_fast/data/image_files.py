"""Trees of image files, ``root/split/class/image``: listing, decoding, cropping, loading.

Images of up to 64 pixels are decoded into memory at once. Larger ones stay in their files, and
processes of a DataLoader read them as they are needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from blockdrop_fast.data.image_sets import (
    CROP_SIZE,
    Dataset,
    ImageFolder,
    ImageSet,
    Normalization,
    epoch_generator,
)

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
# An image folder whose images are no larger than this, in pixels a side, is kept in memory.
MAX_IN_MEMORY_SIZE = 64
RESIZE_SIZE = 256


def load_image_tree(root: Path) -> Dataset:
    """Load a tree with ``train/`` and ``test/`` or ``val/``; images above 64 pixels stay in files.

    Raises:
        FileNotFoundError, ValueError, OSError: as of ``load_dataset``.
    """
    test_folders = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if not test_folders:
        raise FileNotFoundError(f"data: {str(root)!r} has train/ but neither test/ nor val/")
    # ImageNet's own test/ has no labels, hence no class folders: val/ serves then.
    test_folder = next((path for path in test_folders if _class_folders(path)), test_folders[0])
    train_paths, train_labels, classes = _list_split(root / "train")
    test_paths, test_labels, test_classes = _list_split(test_folder)
    if classes != test_classes:
        only_train = sorted(set(classes) - set(test_classes))
        only_test = sorted(set(test_classes) - set(classes))
        raise ValueError(
            f"data: train/ and {test_folder.name}/ of {str(root)!r} differ in their classes: only "
            f"in train/ {_shorten(only_train)}, only in {test_folder.name}/ {_shorten(only_test)}"
        )

    name = root.resolve().name
    # One header a class tells small images from large ones; decoding checks each size later.
    first_of_class = torch.searchsorted(train_labels, torch.arange(len(classes))).tolist()
    sizes = [_read_size(train_paths[index]) for index in first_of_class]
    if max(map(max, sizes)) > MAX_IN_MEMORY_SIZE:
        train = ImageFolder(train_paths, train_labels, classes, name)
        test = ImageFolder(test_paths, test_labels, classes, name)
        return Dataset(train, test, name, classes)
    if classes == CIFAR10_CLASSES and sizes[0] == (32, 32):
        suffix = Path(train_paths[0]).suffix.lower()
        kind = "JPEG" if suffix in (".jpg", ".jpeg") else suffix[1:].upper()
        name = f"CIFAR-10 ({kind})"
    train_images = _decode_all(train_paths, sizes[0], train_paths[0])
    test_images = _decode_all(test_paths, sizes[0], train_paths[0])
    train = ImageSet(train_images, train_labels, classes, name)
    test = ImageSet(test_images, test_labels, classes, name)
    return Dataset(train, test, name, classes)


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "none") + more


def _class_folders(folder: Path) -> list[Path]:
    return sorted(
        (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")),
        key=lambda path: path.name,
    )


def _list_split(folder: Path) -> tuple[tuple[str, ...], Tensor, tuple[str, ...]]:
    """List the image files of a split in order of class and name, with labels and class names."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data: the folder {str(folder)!r} does not exist")
    class_folders = _class_folders(folder)
    if not class_folders:
        raise ValueError(f"data: {str(folder)!r} has no class folders")
    paths: list[str] = []
    counts = []
    for class_folder in class_folders:
        found = sorted(
            os.path.join(parent, file)
            for parent, _, files in os.walk(class_folder, followlinks=True)
            for file in files
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")
        )
        if not found:
            raise ValueError(f"data: the class folder {str(class_folder)!r} holds no images")
        paths += found
        counts.append(len(found))
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return tuple(paths), labels, tuple(path.name for path in class_folders)


def _unreadable(path: str, error: Exception) -> OSError:
    return OSError(f"data: cannot read the image {path!r} ({type(error).__name__}: {error})")


def _read_size(path: str) -> tuple[int, int]:
    """Return width and height from an image's header."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # decoders of damaged files raise more than OSError
        raise _unreadable(path, error) from error


def _read_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:
        raise _unreadable(path, error) from error


def _decode_all(paths: tuple[str, ...], size: tuple[int, int], size_from: str) -> Tensor:
    """Decode images of one size (width, height) into uint8 (N, 3, H, W), in several threads."""
    width, height = size
    pixels = np.empty((len(paths), 3, height, width), dtype=np.uint8)

    def decode(start: int) -> None:
        for index in range(start, min(start + chunk, len(paths))):
            image = _read_image(paths[index])
            if image.size != size:
                raise ValueError(
                    f"data: images of mixed sizes: {paths[index]!r} is {image.size[0]}×"
                    f"{image.size[1]}, {size_from!r} is {width}×{height}; images of up to "
                    f"{MAX_IN_MEMORY_SIZE} pixels have to be all of one size"
                )
            pixels[index] = np.asarray(image).transpose(2, 0, 1)

    chunk = 256
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(decode, range(0, len(paths), chunk)):
            pass
    return torch.from_numpy(pixels)


def image_folder_loader(
    root: str | Path,
    split: str,
    batch_size: int,
    *,
    train: bool = False,
    workers: int = 2,
    seed: int = 0,
    epoch: int = 0,
    normalization: Normalization | None = None,
) -> DataLoader:
    """Make a DataLoader over one split of an ImageNet-style tree, ``root/split/class/image``.

    Evaluation resizes the shorter side to 256 pixels and takes the central 224×224; training takes
    a random crop of 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3, resized to 224×224,
    mirrors half of the images and shuffles them.

    Args:
        root: the folder that holds the splits.
        split: name of the split's folder.
        batch_size: images in a batch, at least 1.
        train: shuffle and augment; the last, smaller batch is left out.
        workers: processes that read images, 0 reads in this process.
        seed: of the order and the crops, which do not depend on the number of workers.
        epoch: the epoch this loader serves; each one draws anew.
        normalization: applied to the images, None leaves them as uint8.

    Returns:
        A loader of images (B, 3, 224, 224), uint8 or normalised float32, and labels (B,) int64.

    Raises:
        FileNotFoundError: the split's folder does not exist.
        ValueError: it holds no classes, a class holds no images, or an argument is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    paths, labels, classes = _list_split(Path(root) / split)
    folder = ImageFolder(paths, labels, classes, Path(root).resolve().name)
    files = FileImages(
        folder, augment=train, flip=True, seed=seed, epoch=epoch, normalization=normalization
    )
    return file_loader(files, batch_size, shuffle=train, drop_last=train, workers=workers)


class FileImages(torch.utils.data.Dataset):
    """Map-style data set over image files: index → uint8 or normalised image, and label."""

    def __init__(
        self,
        folder: ImageFolder,
        *,
        augment: bool,
        flip: bool,
        seed: int,
        epoch: int,
        normalization: Normalization | None = None,
    ) -> None:
        self.folder = folder
        self.augment = augment
        self.flip = flip
        self.seed = seed
        self.epoch = epoch
        self.normalization = normalization

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = _read_image(self.folder.paths[index])
        if self.augment:
            random = np.random.default_rng((self.seed, self.epoch, index))
            image = _random_resized_crop(image, random)
            if self.flip and random.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        else:
            image = _resize_and_center_crop(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if self.normalization is not None:
            pixels = self.normalization.apply(pixels.to(torch.float32).div_(255))
        return pixels.contiguous(), int(self.folder.labels[index])


def file_loader(
    files: FileImages,
    batch_size: int,
    *,
    shuffle: bool,
    drop_last: bool,
    workers: int,
    shard: tuple[int, int] = (0, 1),
) -> DataLoader:
    """Make a loader whose order and crops do not depend on the number of workers.

    Raises:
        ValueError: workers is negative.
    """
    if workers < 0:
        raise ValueError(f"workers: expected at least 0, got {workers}")
    generator = epoch_generator(files.seed, files.epoch)
    # An order of our own: a DataLoader's depends on whether it has workers, and its generator is
    # the global one by default.
    order = torch.randperm(len(files), generator=generator) if shuffle else range(len(files))
    order = [int(index) for index in order]
    if drop_last:
        order = order[: len(order) // batch_size * batch_size]
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    return DataLoader(
        files,
        batch_sampler=[batch[shard[0] :: shard[1]] for batch in batches],
        num_workers=workers,
        generator=generator,
        pin_memory=torch.cuda.is_available(),
    )


def file_batches(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a loader's batches; an unreadable image ends them with one line that names it."""
    try:
        yield from loader
    except OSError as error:
        # A worker's error arrives as the text of its traceback, whose last line is the message.
        message = str(error).strip().split("\n")[-1].removeprefix("OSError: ")
        raise OSError(message) from error


def _resize_and_center_crop(image: Image.Image) -> Image.Image:
    """Resize the shorter side to 256 pixels and take the central 224×224."""
    width, height = image.size
    short = min(width, height)
    width, height = RESIZE_SIZE * width // short, RESIZE_SIZE * height // short
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - CROP_SIZE) / 2), round((height - CROP_SIZE) / 2)
    return image.crop((left, top, left + CROP_SIZE, top + CROP_SIZE))


def _random_resized_crop(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Take 8 to 100 % of the area at an aspect ratio of 3/4 to 4/3 and resize it to 224×224."""
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        crop_width, crop_height = (round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio)))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(random.integers(width - crop_width + 1))
            top = int(random.integers(height - crop_height + 1))
            break
    else:
        # An extreme aspect ratio: the largest central crop that is allowed.
        crop_width = min(width, round(height * 4 / 3))
        crop_height = min(height, round(width * 4 / 3))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
    image = image.crop((left, top, left + crop_width, top + crop_height))
    return image.resize((CROP_SIZE, CROP_SIZE), Image.Resampling.BILINEAR)
