"""Reading data sets: in-memory image sets, ImageNet-style folders, normalisation and batches.

``load_dataset`` recognises what lies in a folder and returns its two splits. Small images (CIFAR,
the embedded digits) are kept in memory as uint8 and augmented in batches on the device; larger
ones are read from their files by a DataLoader. ``batches`` hides the difference.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
DATA_VARIABLE = "BLOCKDROP_DATA"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
# An image folder whose images are no larger than this, in pixels a side, is kept in memory.
MAX_IN_MEMORY_SIZE = 64
CROP_PADDING = 4
RESIZE_SIZE = 256
CROP_SIZE = 224


@dataclass(frozen=True)
class Normalization:
    """What a model expects its input images to be shifted and scaled by, per channel.

    Args:
        mean: three floats, subtracted from images in 0…1.
        std: three floats above 0, the result is divided by them.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)) or len(values) != 3:
                raise ValueError(f"{name}: expected three numbers, one a channel, got {values!r}")
            values = tuple(float(value) for value in values)
            if not np.isfinite(values).all():
                raise ValueError(f"{name}: expected finite numbers, got {values!r}")
            object.__setattr__(self, name, values)
        if min(self.std) <= 0:
            raise ValueError(f"std: expected numbers above 0, got {self.std!r}")

    def apply(self, images: Tensor) -> Tensor:
        """Normalise images.

        Args:
            images: (…, 3, H, W) floating point, values in 0…1.

        Returns:
            (images − mean) / std, of the same shape, dtype and memory format.

        Raises:
            TypeError: images are not floating point.
            ValueError: images do not have three channels.
        """
        if not images.is_floating_point():
            raise TypeError(f"images: expected floating point values in 0…1, got {images.dtype}")
        if images.dim() < 3 or images.shape[-3] != 3:
            raise ValueError(f"images: expected shape (…, 3, H, W), got {tuple(images.shape)}")
        if self == NO_NORMALIZATION:
            return images
        mean = images.new_tensor(self.mean).view(3, 1, 1)
        std = images.new_tensor(self.std).view(3, 1, 1)
        return (images - mean).div_(std)

    def to_dict(self) -> dict[str, list[float]]:
        """Return a JSON-ready form, which ``from_dict`` reads back exactly."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict) -> Normalization:
        """Read what ``to_dict`` wrote.

        Raises:
            ValueError: other keys than "mean" and "std", or values which are not three numbers.
        """
        if not isinstance(values, dict) or set(values) != {"mean", "std"}:
            raise ValueError(f"values: expected a dict of 'mean' and 'std', got {values!r}")
        return cls(mean=values["mean"], std=values["std"])


NO_NORMALIZATION = Normalization(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
IMAGENET_NORMALIZATION = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
# What the BlockDrop authors' ResNet-32 for CIFAR-10 was trained with.
R32_C10_NORMALIZATION = Normalization(
    mean=(125.3 / 255, 123.0 / 255, 113.9 / 255), std=(63.0 / 255, 62.1 / 255, 66.7 / 255)
)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split of a data set, held in memory.

    Args:
        images: (N, 3, H, W) uint8.
        labels: (N,) int64, indices into ``classes``, on the device of the images.
        classes: name of each class.
        name: the data set's display name.
        flip: whether a mirrored image keeps its class, so that augmentation may mirror it.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    flip: bool = True

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images: expected uint8 of shape (N, 3, H, W), "
                f"got {images.dtype} of shape {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels: expected int64 of shape ({len(images)},), "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if labels.device != images.device:
            raise ValueError(f"labels: expected on {images.device}, got on {labels.device}")
        if labels.device.type == "cpu":  # elsewhere a look at the values waits for the device
            _check_labels(labels, len(self.classes))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where the images lie."""
        return self.images.device

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images which ``batches`` yields."""
        return tuple(self.images.shape[2:])

    @property
    def num_classes(self) -> int:
        """Number of classes, those without an image in this split included."""
        return len(self.classes)

    def to(self, device: torch.device | str) -> ImageSet:
        """Return this split with images and labels on ``device``."""
        images, labels = self.images.to(device), self.labels.to(device)
        return ImageSet(images, labels, self.classes, self.name, self.flip)

    def subset(self, n: int, seed: int = 0) -> ImageSet:
        """Return ``n`` images drawn without replacement, in their original order.

        Raises:
            ValueError: n is not in 0…len(self), or the seed is negative.
        """
        chosen = _draw_subset(len(self), n, seed).to(self.device)
        images, labels = self.images[chosen], self.labels[chosen]
        return ImageSet(images, labels, self.classes, self.name, self.flip)


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """One split of a data set of larger images, read from their files as they are needed.

    Args:
        paths: the N image files.
        labels: (N,) int64 on the CPU, indices into ``classes``.
        classes: name of each class.
        name: the data set's display name.
        flip: whether a mirrored image keeps its class, so that augmentation may mirror it.
    """

    paths: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    flip: bool = True

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images which ``batches`` yields."""
        return (CROP_SIZE, CROP_SIZE)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def subset(self, n: int, seed: int = 0) -> ImageFolder:
        """Return ``n`` images drawn without replacement, in their original order.

        Raises:
            ValueError: n is not in 0…len(self), or the seed is negative.
        """
        chosen = _draw_subset(len(self), n, seed)
        paths = tuple(self.paths[index] for index in chosen.tolist())
        return ImageFolder(paths, self.labels[chosen], self.classes, self.name, self.flip)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Both splits of a data set, of the same classes in the same order."""

    train: ImageSet | ImageFolder
    test: ImageSet | ImageFolder
    name: str
    classes: tuple[str, ...]


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
        ValueError: the folder's layout, classes or image sizes are not as described.
        OSError: an image cannot be read; the message names it.
        pickle.UnpicklingError: a CIFAR file is damaged, or holds anything but plain data.
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
    return {"cifar10": _load_cifar10, "cifar100": _load_cifar100, "tree": _load_image_tree}[kind](
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


def batches(
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

    Returns:
        An iterator, with a length, of images (B, 3, H, W) float32 and labels (B,) int64.

    Raises:
        TypeError: image_set is neither an ImageSet nor an ImageFolder.
        ValueError: batch_size, seed, epoch or memory_format is out of range.
    """
    if not isinstance(image_set, (ImageSet, ImageFolder)):
        raise TypeError(
            f"image_set: expected an ImageSet or ImageFolder, got {type(image_set).__name__}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            f"memory_format: expected contiguous_format or channels_last, got {memory_format}"
        )
    flip = image_set.flip if flip is None else flip
    generator = epoch_generator(seed, epoch)
    total = len(image_set)
    length = total // batch_size if drop_last else -(-total // batch_size)
    if isinstance(image_set, ImageSet):
        raw = _memory_batches(
            image_set, batch_size, length, shuffle, augment, flip, generator, device
        )
    else:
        files = _FileImages(image_set, augment=augment, flip=flip, seed=seed, epoch=epoch)
        loader = _file_loader(
            files, batch_size, shuffle=shuffle, drop_last=drop_last, workers=workers
        )
        raw = _file_batches(loader)

    def normalised() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in raw:
            images = images.to(device, non_blocking=True) if device is not None else images
            labels = labels.to(device, non_blocking=True) if device is not None else labels
            images = images.to(torch.float32, memory_format=memory_format).div_(255)
            yield normalization.apply(images), labels

    return Batches(normalised(), length)


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return a CPU generator that is a function of a seed and an epoch number alone.

    Args:
        seed: non-negative.
        epoch: non-negative.

    Raises:
        ValueError: seed or epoch is negative.
    """
    for name, value in (("seed", seed), ("epoch", epoch)):
        if value < 0:
            raise ValueError(f"{name}: expected a number from 0 on, got {value}")
    # Hashed, because seed + epoch would let runs of neighbouring seeds share most epochs.
    state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


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
    files = _FileImages(
        folder, augment=train, flip=True, seed=seed, epoch=epoch, normalization=normalization
    )
    return _file_loader(files, batch_size, shuffle=train, drop_last=train, workers=workers)


def _memory_batches(
    image_set: ImageSet,
    batch_size: int,
    length: int,
    shuffle: bool,
    augment: bool,
    flip: bool,
    generator: torch.Generator,
    device: torch.device | str | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield uint8 batches of a split in memory, augmented where they will be used."""
    total = len(image_set)
    device = image_set.device if device is None else torch.device(device)
    # The epoch's draws are made at once, on the CPU: they are the same for every device and batch
    # size, and cost a GPU one copy an epoch instead of a synchronisation a batch.
    order = torch.randperm(total, generator=generator) if shuffle else None
    order = order if order is None else order.to(image_set.device)
    if augment:
        offsets = torch.randint(2 * CROP_PADDING + 1, (total, 2), generator=generator).to(device)
        flips = torch.randint(2, (total,), generator=generator).bool()
        flips = (flips & flip).to(device)
    for start in range(0, length * batch_size, batch_size):
        chosen = slice(start, min(start + batch_size, total))
        source = chosen if order is None else order[chosen]
        images, labels = image_set.images[source], image_set.labels[source]
        if augment:
            images = images.to(device, non_blocking=True)
            images = crop_and_flip(images, offsets[chosen], flips[chosen])
        yield images, labels


class _FileImages(torch.utils.data.Dataset):
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


def _file_loader(
    files: _FileImages, batch_size: int, *, shuffle: bool, drop_last: bool, workers: int
) -> DataLoader:
    if workers < 0:
        raise ValueError(f"workers: expected at least 0, got {workers}")
    generator = epoch_generator(files.seed, files.epoch)
    # An order of our own: a DataLoader's depends on whether it has workers, and its generator is
    # the global one by default.
    order = torch.randperm(len(files), generator=generator) if shuffle else range(len(files))
    return DataLoader(
        files,
        batch_size=batch_size,
        sampler=[int(index) for index in order],
        num_workers=workers,
        drop_last=drop_last,
        generator=generator,
        pin_memory=torch.cuda.is_available(),
    )


def _file_batches(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
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


def _folder_kind(folder: Path) -> str | None:
    """Tell by its entries which kind of data set a folder holds, if any."""
    if (folder / "data_batch_1").is_file() or (folder / "batches.meta").is_file():
        return "cifar10"
    if (folder / "train").is_file() and (folder / "meta").is_file():
        return "cifar100"
    return "tree" if (folder / "train").is_dir() else None


def _load_cifar10(folder: Path) -> Dataset:
    meta = _read_pickle(folder / "batches.meta")
    classes = _class_names(meta, "label_names", folder / "batches.meta")
    files = [folder / f"data_batch_{index}" for index in range(1, 6)]
    train = _read_cifar_split(files, "labels", classes, "CIFAR-10")
    test = _read_cifar_split([folder / "test_batch"], "labels", classes, "CIFAR-10")
    return Dataset(train, test, "CIFAR-10", classes)


def _load_cifar100(folder: Path) -> Dataset:
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
    return tuple(name.decode() if isinstance(name, bytes) else name for name in names)


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
            _check_labels(labels[-1], len(classes))
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


class _PlainUnpickler(pickle.Unpickler):
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
            raise pickle.UnpicklingError(
                f"{path}: damaged, or not a CIFAR file ({type(error).__name__}: {error})"
            ) from error
    if not isinstance(content, dict):
        raise pickle.UnpicklingError(f"{path}: expected a dict, got {type(content).__name__}")
    return {
        key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()
    }


def _load_image_tree(root: Path) -> Dataset:
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


def _draw_subset(total: int, n: int, seed: int) -> Tensor:
    if not 0 <= n <= total:
        raise ValueError(f"n: expected 0 to {total}, got {n}")
    return torch.randperm(total, generator=epoch_generator(seed, 0))[:n].sort().values


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise ValueError(
            f"labels: expected 0 to {num_classes - 1}, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
