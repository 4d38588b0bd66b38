"""What a model did with a split: its decisions, which were right, and images to show for them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blockdrop_fast.data.batches import batches_of
from blockdrop_fast.data.image_sets import ImageFolder, ImageSet, Normalization
from blockdrop_fast.engine import Engine
from blockdrop_fast.executors.cascade import CascadeEngine


@dataclass(frozen=True)
class Results:
    """What a model did with the N images of a split, in their order.

    Attributes:
        decisions: (N, K) bool.
        labels: (N,) int64.
        correct: (N,) bool, whether the prediction is the label.
        unit: what is decided on: "block", or "network" of a cascade.
    """

    decisions: Tensor
    labels: Tensor
    correct: Tensor
    unit: str = "block"

    @property
    def usage(self) -> Tensor:
        """(N,) int64: the kept blocks, or networks, of each image."""
        return self.decisions.sum(1)


def collect(
    engine: Engine | CascadeEngine,
    split: ImageSet | ImageFolder,
    normalization: Normalization,
    batch_size: int,
) -> Results:
    """Run a split through an engine at its policy's decisions."""
    decisions, labels, correct = [], [], []
    for images, batch_labels in batches_of(
        split, batch_size, normalization=normalization, device=engine.device
    ):
        output = engine(images)
        decisions.append(output.decisions.cpu())
        labels.append(batch_labels.cpu())
        correct.append((output.logits.argmax(1) == batch_labels).cpu())
    return Results(torch.cat(decisions), torch.cat(labels), torch.cat(correct), unit_of(engine))


def unit_of(engine: Engine | CascadeEngine) -> str:
    """What is decided on: the ``unit`` of ``Results``."""
    return "network" if isinstance(engine, CascadeEngine) else "block"


def choose_examples(
    results: Results, count: int, label: int | None = None
) -> tuple[list[int], list[int]]:
    """Correctly classified images, of a class or of all, with the fewest and with the most blocks.

    Splits often are sorted by class, so among images of one usage a fixed random order decides.

    Returns:
        At most ``count`` indices each, by ascending and by descending block usage; no image is
        in both.
    """
    order = torch.randperm(len(results.correct), generator=torch.Generator().manual_seed(0))
    shown = results.correct if label is None else results.correct & (results.labels == label)
    order = order[shown[order]]
    order = order[results.usage[order].argsort(stable=True)].tolist()
    count = min(count, len(order) // 2)
    return order[:count], order[::-1][:count]


def images_of(split: ImageSet | ImageFolder, indices: list[int]) -> Tensor:
    """(N, 3, H, W) float, 0…1: some of a split's images, as the model sees them."""
    if isinstance(split, ImageSet):
        chosen = replace(split, images=split.images[indices], labels=split.labels[indices])
    else:
        paths = tuple(split.paths[index] for index in indices)
        chosen = replace(split, paths=paths, labels=split.labels[indices])
    images, _ = next(batches_of(chosen, len(indices), device="cpu", workers=0))
    return images
