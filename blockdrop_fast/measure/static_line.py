"""The static line: how good a backbone is with one set of blocks, of each size, for all images.

What a policy that decides by the image has to beat. The sets are found by greedy backward
elimination, on training images, and kept in a file beside the checkpoint, with a checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockdrop_fast.engine import Engine
from blockdrop_fast.files import json_checksum, write_json
from blockdrop_fast.networks.checkpoints import locate

CRITERION = "cross entropy"
CHECKSUM = "crc32"  # of all else in a line's file: trainings go by it
# Rows of activations that one call computes at most, whatever the number of sets.
ROWS = 1024

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class StaticLine:
    """Nested sets of blocks, the greedy best of each size.

    Attributes:
        sets: (K+1, K) bool on the CPU; row k keeps k blocks, all of them in row k+1 too.
        losses: (K+1,) float64, mean cross entropy of each set on the images that chose it.
        images: how many they were.
    """

    sets: Tensor
    losses: Tensor
    images: int

    @property
    def order(self) -> list[int]:
        """The K blocks in the order in which they are dropped."""
        return (self.sets[1:] ^ self.sets[:-1]).int().argmax(1).flip(0).tolist()

    def to_dict(self) -> dict:
        """JSON-ready values, which ``from_dict`` reads back."""
        losses = self.losses.tolist()
        return {
            "criterion": CRITERION,
            "images": self.images,
            "order": self.order,
            "losses": losses,
        }

    @classmethod
    def from_dict(cls, values: dict) -> StaticLine:
        """Read what ``to_dict`` wrote."""
        order = torch.tensor(values["order"])
        # Block order[i] goes in step i: the set of k blocks keeps those that go in the last k.
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order))
        sets = position >= len(order) - torch.arange(len(order) + 1)[:, None]
        losses = torch.tensor(values["losses"], dtype=torch.float64)
        return cls(sets, losses, values["images"])


def default_images(num_blocks: int) -> int:
    """Training images to choose the sets on.

    Their cost grows with the third power of the blocks. One core takes about 1 minute for 2,000
    images and ResNet-32, 6 for ResNet-56.
    """
    return 2000 if num_blocks <= 27 else 500


def static_line(
    engine: Engine, batches: Sequence[Batch], tiers: Tensor | None = None
) -> StaticLine:
    """Drop the blocks one by one, each time that without which the cross entropy is lowest.

    Each step is one call a batch for all candidates, which share their prefixes: about K^3 / 6
    blocks an image in all.

    Args:
        engine: whose backbone is meant.
        batches: of (images (B, 3, H, W) normalised, labels (B,) int64), not augmented; passed
            over K + 1 times.
        tiers: (K,) int; all blocks of a lower tier are dropped before any of a higher one. None:
            any block at any time, as in the files of ``cached_static_line``.

    Raises:
        ValueError: no images.
    """
    images = sum(len(labels) for _, labels in batches)
    if images == 0:
        raise ValueError("batches: no images to choose the sets on")
    current = torch.ones(1, engine.config.num_blocks, dtype=torch.bool)
    if tiers is None:
        tiers = torch.zeros(engine.config.num_blocks, dtype=torch.int64)
    sets, losses = [current], [_means(engine, batches, current, _cross_entropy)]
    while current.any():
        kept = current[0].nonzero().squeeze(1)
        candidates = without_one(current[0])[tiers[kept] == tiers[kept].min()]
        loss = _means(engine, batches, candidates, _cross_entropy)
        best = loss.argmin()
        current = candidates[best, None]
        sets.append(current)
        losses.append(loss[best, None])
    return StaticLine(torch.cat(sets[::-1]), torch.cat(losses[::-1]), images)


def without_one(blocks: Tensor) -> Tensor:
    """(K,) bool -> one row for each of its blocks, which lacks that one."""
    kept = blocks.nonzero().squeeze(1)
    return blocks & (torch.arange(len(blocks)) != kept[:, None])


def set_accuracies(engine: Engine, batches: Iterable[Batch], sets: Tensor) -> Tensor:
    """Accuracy with each set of blocks used for every image.

    Args:
        engine, batches: as of ``static_line``, of any split; passed over once.
        sets: (S, K) bool.

    Returns:
        (S,) float64, 0…1.
    """
    return _means(engine, batches, sets, lambda logits, labels: logits.argmax(-1) == labels)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(S, B, C) and (B,) -> (S, B)."""
    logits = logits.float().flatten(0, 1)
    labels = labels.repeat(len(logits) // len(labels))
    return F.cross_entropy(logits, labels, reduction="none")


def _means(
    engine: Engine,
    batches: Iterable[Batch],
    sets: Tensor,
    measure: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Means over images of a measure of (S, B, C) logits and (B,) labels: (S,) float64."""
    sets = sets.to(engine.device)
    total, images = torch.zeros(len(sets), dtype=torch.float64, device=engine.device), 0
    for all_images, all_labels in batches:
        few = max(1, ROWS // len(sets))
        for some, labels in zip(all_images.split(few), all_labels.split(few), strict=True):
            some, labels = some.to(engine.device, engine.dtype), labels.to(engine.device)
            logits = engine.run_sets(some, sets[:, None].expand(-1, len(some), -1))
            total += measure(logits, labels).view(len(sets), -1).double().sum(1)
            images += len(labels)
    return (total / images).cpu()


def line_file(checkpoint: str | Path) -> Path:
    """Where a checkpoint's static line is kept: beside it."""
    return locate(checkpoint).with_suffix(".static_line.json")


def cached_static_line(
    checkpoint: str | Path,
    engine: Engine,
    batches: Sequence[Batch],
    *,
    only_kept: bool = False,
    keep: bool = True,
) -> StaticLine | None:
    """``static_line``, read from the file beside the checkpoint where that is still true.

    It is where backbone weights, images and labels are the same. A folder that cannot be written
    keeps no file.

    Args:
        checkpoint: the file that the engine's model was loaded from, or will be saved in.
        engine, batches: as of ``static_line``.
        only_kept: return None where the line would have to be computed.
        keep: write the file.
    """
    path, key = line_file(checkpoint), fingerprint(engine.backbone, batches)
    kept = _read(path)
    if kept.get("key") == key:
        return StaticLine.from_dict(kept)
    if only_kept:
        return None
    line = static_line(engine, batches)
    if keep:
        _write(path, {"key": key} | line.to_dict() | {"accuracies": {}})
    return line


def cached_accuracies(
    checkpoint: str | Path,
    engine: Engine,
    line: StaticLine,
    batches: Callable[[], Iterable[Batch]],
    *,
    only_kept: bool = False,
    keep: bool = True,
) -> Tensor | None:
    """``set_accuracies`` of a line that ``cached_static_line`` returned, kept in the same file.

    Args:
        batches: makes those of the split to measure on; called twice.
        only_kept: return None where they would have to be measured.
        keep: write the file.
    """
    path, key = line_file(checkpoint), fingerprint(engine.backbone, batches())
    kept = _read(path)
    accuracies = kept.get("accuracies", {})
    if key not in accuracies:
        if only_kept:
            return None
        accuracies[key] = set_accuracies(engine, batches(), line.sets).tolist()
        if kept and keep:
            _write(path, kept | {"accuracies": accuracies})
    return torch.tensor(accuracies[key], dtype=torch.float64)


def fingerprint(backbone: nn.Module, batches: Iterable[Batch]) -> str:
    """Hash of a network's weights and statistics, and of images and labels."""
    digest = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        _digest(digest, tensor)
    for images, labels in batches:
        _digest(digest, images)
        _digest(digest, labels)
    return digest.hexdigest()


def _digest(digest: hashlib._Hash, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _read(path: Path) -> dict:
    """What a line's file holds; empty where there is none, or it is damaged."""
    try:
        kept = json.loads(path.read_text())
        intact = kept.pop(CHECKSUM) == json_checksum(kept)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return kept if intact else {}


def _write(path: Path, values: dict) -> None:
    """Write a line's file, where its folder can be written."""
    with contextlib.suppress(OSError):
        write_json(path, values | {CHECKSUM: json_checksum(values)})
