"""What the stages of ``train/systems`` can be told; see ``train/config.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from train.config import Common, Policy


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


@dataclass(frozen=True)
class Halting(Retraining):
    """ACT and ACT-hard: train a backbone and the scores by which images leave its segments."""

    out: Path = Path("runs/halting")
    backbone: Path | None = None
    """Backbone checkpoint to start from; it or --model is required."""
    model: Path | None = None
    """Checkpoint of this stage to go on with, say of ACT with --hard."""
    hard: bool = False
    """A segment gives the output of its last block that ran (ACT-hard), not the weighted mean
    (ACT). Gradients are still those of the mean."""
    tau: float = 0.01
    """Weight of the ponder cost: the higher, the earlier images halt."""
    free_epochs: int = 1
    """Epochs at the start in which running costs nothing and scores stay, so that the backbone gets
    used to them."""
    bias: float = -5.0
    """With --backbone: of new scores' logits. The authors, who start from scratch, have -3; then
    the last of 5 blocks begins with a weight of 0.81, of 18 with 0.19. At -5: 0.97 and 0.89."""
    epsilon: float = 0.01
    """With --backbone: an image halts where its scores add up to 1 - epsilon."""
    policy_lr: float = 0.02
    """Peak of the scores' one-cycle schedule (Adam: their gradients are tiny at first)."""


@dataclass(frozen=True)
class Sequential(Policy):
    """BlockDrop-seq: train gates on the way by the curriculum, then, with --joint, the backbone."""

    out: Path = Path("runs/sequential")
    backbone: Path | None = None
    """Backbone checkpoint, which stays as it is (required without --joint)."""
    joint: bool = False
    """Train the backbone, too: all blocks free, cross entropy of the sampled runs beside the policy
    gradient, whose gradients reach the backbone through what gates see; one-cycle schedule."""
    model: Path | None = None
    """With --joint: checkpoint of this stage to start from (required)."""
    epochs: int = 5000
    batch_size: int = 2048
    lr: float = 1e-4
    """Adam."""
    weight_decay: float = 0.0
    penalty: float = 1.0
    """gamma: a wrong prediction's reward is -gamma."""
    entropy: float = 0.1
    """beta, the weight of the bonus of --entropy-form; 0: none."""
    blocks_per_epoch: float = 1.0
    """Blocks freed each epoch, last ones first."""


@dataclass(frozen=True)
class Pixels(Retraining):
    """Options of the stages whose gates decide for every pixel."""

    model: Path | None = None
    """Backbone checkpoint, or one of this stage to go on with (required)."""
    policy_lr: float = 0.01
    """Peak of the gates' one-cycle schedule (Adam)."""
    free_epochs: int = 0
    """Epochs at the start in which computing costs nothing, and the gates stay as they are."""


@dataclass(frozen=True)
class Lccl(Pixels):
    """LCCL: train masks of pixels for which convolutions are computed, and the backbone."""

    out: Path = Path("runs/lccl")
    sparsity: float = 1.0
    """Weight of the share of the complete network's FLOPs that are left; 0: the authors' loss."""
    epochs: int = 350
    """Paper: 350, batches of 128."""


@dataclass(frozen=True)
class Sact(Pixels):
    """SACT: train scores by which positions leave the segments, and the backbone."""

    out: Path = Path("runs/sact")
    tau: float = 0.01
    """Weight of the ponder cost: the higher, the earlier positions halt."""
    free_epochs: int = 1
    """Epochs at the start in which running costs nothing, and the scores stay as they are."""
    bias: float = -5.0
    """Of new scores' logits. The authors, who start from scratch, have -3."""
    epsilon: float = 0.01
    """Of new scores: a position halts where they add up to 1 - epsilon."""
    policy_lr: float = 0.02
    """Peak of the scores' one-cycle schedule (Adam)."""
    epochs: int = 256
    """Paper: 100,000 steps of 128 images."""


SYSTEMS: dict[str, type[Common]] = {
    "sequential": Sequential,
    "halting": Halting,
    "lccl": Lccl,
    "sact": Sact,
    "exits": Exits,
    "cascade": Cascade,
    "pfec": Pfec,
}

_PAPER = {stage: config() for stage, config in SYSTEMS.items()}
# What two CPU cores finish for ResNet-32 in an evening.
_QUICK = _PAPER | {
    "exits": Exits(epochs=4, lr=0.05),
    "lccl": Lccl(epochs=8, lr=0.02),
    "sact": Sact(epochs=6, lr=0.02, tau=0.1),
    "pfec": Pfec(epochs=5, batch_size=128, schedule="one_cycle", lr=0.02),
    "halting": Halting(epochs=6, lr=0.05, tau=0.1),
    "sequential": Sequential(
        epochs=24, batch_size=256, lr=5e-3, samples=3, estimator="leave_one_out"
    ),
}

PRESETS = {"paper": _PAPER, "quick": _QUICK, "R101": _PAPER}
