"""The images that a stage trains and is evaluated on, in batches as its model takes them."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import blockdrop_fast as bdf
from blockdrop_fast.data.batches import DATA_VARIABLE, Batches, batches_of, load_dataset
from blockdrop_fast.data.image_sets import (
    NO_NORMALIZATION,
    Dataset,
    ImageFolder,
    ImageSet,
    Normalization,
)
from train import distributed
from train.config import Common
from train.ranges import check_ranges

EVALUATION_BATCH = 250


def prepare(config: Common) -> tuple[torch.device, Dataset]:
    """Apply thread and device options, and load the data set.

    Raises:
        ValueError: an option is out of range, see ``check_ranges``, or the device is not there.
    """
    check_ranges(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = distributed.device_for(config)
    dataset = _loaded(config.data, os.environ.get(DATA_VARIABLE))
    train = dataset.train if config.limit is None else dataset.train.subset(config.limit)
    test = dataset.test
    if isinstance(train, ImageSet):
        train, test = train.to(device), test.to(device)
    return device, Dataset(train, test, dataset.name, dataset.classes)


@functools.lru_cache(maxsize=1)
def _loaded(data: Path | None, default: str | None) -> Dataset:
    """The data set, for all stages that this process runs in a row: nobody changes its tensors.

    Args:
        data: its folder.
        default: that which counts without.
    """
    return load_dataset(data)


def check_held_out(held_out: int, images: int) -> None:
    """Raise ValueError unless so many of the training images can be held out."""
    if not 0 < held_out < images:
        raise ValueError(f"held_out: expected 1 to {images - 1}, got {held_out}")


def split(
    image_set: ImageSet | ImageFolder, held_out: int, seed: int
) -> tuple[ImageSet | ImageFolder, ImageSet | ImageFolder]:
    """Divide a training split at random: images that are held out, and images to train on.

    Raises:
        ValueError: nothing would be left of one of the two.
    """
    check_held_out(held_out, len(image_set))
    order = torch.randperm(len(image_set), generator=torch.Generator().manual_seed(seed))
    return tuple(
        image_set.take(part.sort().values) for part in (order[:held_out], order[held_out:])
    )


def training_batches(
    model: nn.Module,
    image_set: ImageSet | ImageFolder,
    config: Common,
    epoch: int,
    batch_size: int,
    numbered: bool = False,
) -> Batches:
    """A split shuffled and augmented, a function of seed and epoch, as the model takes it.

    Without a last, smaller batch. Of several processes, each has its own images of each batch, as
    many as the others.

    Raises:
        ValueError: there are fewer images than processes, or other classes than the model's.
    """
    _check_classes(model, image_set)
    processes = distributed.count()
    if len(image_set) < processes:
        raise ValueError(
            f"limit: {len(image_set)} images cannot be shared by {processes} processes"
        )
    return batches_of(
        image_set,
        min(batch_size, len(image_set) // processes * processes),
        shuffle=True,
        augment=True,
        normalization=normalization_of(model),
        seed=config.seed,
        epoch=epoch,
        device=device_of(model),
        drop_last=True,
        memory_format=torch.channels_last,
        workers=config.workers,
        numbered=numbered,
        shard=(distributed.rank(), processes),
    )


def plain_batches(
    model: nn.Module, image_set: ImageSet | ImageFolder, batch_size: int, workers: int
) -> Batches:
    """A split in order and not augmented, as the model takes it; the same in all processes.

    Image files are shared: each process reads some, and gives them to the others.

    Raises:
        ValueError: the model has other classes.
    """
    _check_classes(model, image_set)
    processes, images = distributed.count(), len(image_set)
    sizes = [min(batch_size, images - start) for start in range(0, images, batch_size)]
    shares = isinstance(image_set, ImageFolder) and 1 < processes <= min(sizes, default=0)
    batches = batches_of(
        image_set,
        batch_size,
        normalization=normalization_of(model),
        device=device_of(model),
        memory_format=torch.channels_last,
        workers=workers,
        shard=(distributed.rank(), processes) if shares else (0, 1),
    )
    return Batches(_joined(batches, sizes), len(batches)) if shares else batches


def _joined(batches: Batches, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    for (images, labels), size in zip(batches, sizes, strict=True):
        whole = distributed.joined(images, size).contiguous(memory_format=torch.channels_last)
        yield whole, distributed.joined(labels, size)


def normalization_of(model: nn.Module) -> Normalization:
    """What the model's images are normalised with."""
    return _backbone_of(model).normalization or NO_NORMALIZATION


def _backbone_of(model: nn.Module) -> bdf.ResNet:
    one = model.networks[0] if isinstance(model, bdf.Cascade) else model
    return one.backbone if isinstance(one, bdf.BlockDrop) else one


def _check_classes(model: nn.Module, image_set: ImageSet | ImageFolder) -> None:
    there, known = len(image_set.classes), _backbone_of(model).config.num_classes
    if there != known:
        raise ValueError(f"data: {image_set.name} has {there} classes, but the network has {known}")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device
