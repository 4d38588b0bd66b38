"""What a data set is here: its splits, in memory or in files, and how images are normalised."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

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
            check_labels(labels, len(self.classes))

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
        return self.take(_draw_subset(len(self), n, seed))

    def take(self, numbers: Tensor) -> ImageSet:
        """Return the images with these numbers (N,) int64, in this order."""
        chosen = numbers.to(self.device)
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])


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
        return self.take(_draw_subset(len(self), n, seed))

    def take(self, numbers: Tensor) -> ImageFolder:
        """Return the images with these numbers (N,) int64, in this order."""
        paths = tuple(self.paths[number] for number in numbers.tolist())
        return replace(self, paths=paths, labels=self.labels[numbers])


@dataclass(frozen=True, eq=False)
class Dataset:
    """Both splits of a data set, of the same classes in the same order."""

    train: ImageSet | ImageFolder
    test: ImageSet | ImageFolder
    name: str
    classes: tuple[str, ...]


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


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise unless labels (N,), on the CPU, are indices of classes.

    Raises:
        ValueError: a label outside of 0…num_classes - 1.
    """
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise ValueError(
            f"labels: expected 0 to {num_classes - 1}, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )


def _draw_subset(total: int, n: int, seed: int) -> Tensor:
    if not 0 <= n <= total:
        raise ValueError(f"n: expected 0 to {total}, got {n}")
    return torch.randperm(total, generator=epoch_generator(seed, 0))[:n].sort().values
