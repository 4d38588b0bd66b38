"""What the stages of ``train/systems`` can be told; see ``train/config.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from train.config import Common


@dataclass(frozen=True)
class Rules(Common):
    """Options of the stages that fit rules on held-out images."""

    budget: float | None = None
    """Mean blocks of an image, which the model's rules meet on held-out images; default: half of
    those of the complete network, in a cascade of the largest one."""
    rules: Literal["learned", "threshold"] = "learned"
    """The model's rules: by weighted classification from the last exit backwards (Bolukbasi et al.
    2017), or a threshold of the largest probability an exit (MSDNet). The logs have both, at the
    budget and at many others."""
    held_out: int = 5000
    """Training images that are not trained on: the rules are fitted on them. The networks must not
    have seen them either: pretrain takes the same option and --seed."""


@dataclass(frozen=True)
class Exits(Rules):
    """Adaptive Neural Networks, early exits: train classifiers on the way, then their rules."""

    out: Path = Path("runs/exits")
    backbone: Path | None = None
    """Backbone checkpoint, of pretrain --held-out (required)."""
    after: tuple[int, ...] | None = None
    """Blocks behind which there are exits; default: four, at fifths of the network."""
    frozen: bool = False
    """Train the classifiers alone; the backbone, and so its own accuracy, stays as it is."""
    epochs: int = 40
    batch_size: int = 128
    lr: float = 0.1
    """Peak of the one-cycle schedule (SGD with Nesterov momentum)."""
    head_lr: float = 0.5
    """Peak for the exits' classifiers, which are new, and see a part of the mean loss each."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    teacher: Path | None = None
    """Backbone checkpoint whose logits, all blocks kept, all exits also learn (distillation)."""
    distill: float = 0.5
    """With --teacher: weight of that loss; the cross entropy has the rest."""
    temperature: float = 2.0
    """With --teacher: softening of both logits."""


@dataclass(frozen=True)
class Cascade(Rules):
    """Adaptive Neural Networks, network selection: rules for a cascade of trained networks."""

    out: Path = Path("runs/cascade")
    networks: tuple[Path, ...] = ()
    """Two or more checkpoints, from small to large (required): backbones, of pretrain --held-out,
    or sets of blocks, of joint --static."""


@dataclass(frozen=True)
class Retraining(Common):
    """Options of the stages that change a trained network, and train it again."""

    model: Path | None = None
    """Backbone checkpoint (required)."""
    epochs: int = 40
    batch_size: int = 128
    lr: float = 0.1
    """Peak of the one-cycle schedule (SGD with Nesterov momentum)."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    teacher: Path | None = None
    """Backbone checkpoint whose logits, all blocks kept, are also learned (distillation)."""
    distill: float = 0.5
    """With --teacher: weight of that loss; the cross entropy has the rest."""
    temperature: float = 2.0
    """With --teacher: softening of both logits."""


@dataclass(frozen=True)
class Pfec(Retraining):
    """PFEC: cut off filters of the smallest l1 norms inside blocks, and train again."""

    out: Path = Path("runs/pfec")
    model: Path | None = None
    """Backbone checkpoint, or BlockDrop checkpoint, whose policy stays (required)."""
    variant: Literal["A", "B"] = "B"
    """Of the paper, for ResNet-56 and 110: A prunes little, B more; carried over to ResNet-32."""
    ratios: tuple[float, ...] | None = None
    """Instead of a variant: share of the filters that go, for each segment."""
    skip: tuple[int, ...] | None = None
    """With --ratios: blocks that stay whole, counted from 1."""
    multiple: int = 1
    """Widths are rounded up to multiples of this: those of the processor's vectors, say 8."""
    batch_size: int = 64
    """Paper: 40 epochs, at a constant 1e-3; the authors' code: 64 images."""
    schedule: Literal["constant", "one_cycle"] = "constant"
    lr: float = 1e-3
    """As it is, or peak, of SGD with Nesterov momentum."""


SYSTEMS: dict[str, type[Common]] = {
    "pfec": Pfec,
    "exits": Exits,
    "cascade": Cascade,
}

_PAPER = {stage: config() for stage, config in SYSTEMS.items()}
# What two CPU cores finish for ResNet-32 within half an hour.
_QUICK = _PAPER | {
    "exits": Exits(epochs=4, lr=0.05),
    "pfec": Pfec(epochs=5, batch_size=128, schedule="one_cycle", lr=0.02),
}

PRESETS = {"paper": _PAPER, "quick": _QUICK, "R101": _PAPER}
