"""What each training stage can be told: one frozen dataclass a stage, and the presets.

Field comments are the command line's help texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Common:
    """Options of every stage."""

    data: Path | None = None
    """Data set folder; default: BLOCKDROP_DATA, else the embedded handwritten digits."""
    out: Path = Path("runs/latest")
    """Folder of this run: checkpoints, metrics, TensorBoard events."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """"cpu", "cuda", …; "auto" takes a GPU where there is one."""
    threads: int | None = None
    """CPU threads; default: torch's choice."""
    workers: int = 2
    """Processes that read image files (data sets of images above 64 pixels); each keeps up to
    two batches ready in shared memory."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of training passes, and on a GPU of rewards and evaluation too; "auto" is bfloat16 on a GPU
    that has it (autocast in training), else float32."""
    checkpoint_every: int = 1
    """Epochs between checkpoints; the last epoch always has one."""
    evaluate_every: int = 1
    """Epochs between evaluations on the test split; the last epoch always has one."""
    limit: int | None = None
    """Use only so many training images."""
    sync_bn: bool = False
    """Of several processes on GPUs: training statistics of batch norm cover all images of a batch,
    not those of a process alone."""
    timeout: float = 600.0
    """Of several processes: seconds after which one that does not answer is lost, and all end."""
    routing_images: int = 2000
    """Test images on which evaluations also shuffle the decisions, five times, for the routing
    gain; 0: none."""


@dataclass(frozen=True)
class Pretrain(Common):
    """Train a backbone on all its blocks, from scratch or from a checkpoint."""

    out: Path = Path("runs/pretrain")
    arch: str = "resnet32"
    """resnet<6n+2> for 32x32 images; for ImageNet sizes resnet18 / 34 / 50 / 101 / 152, the
    paper's shallower ones, resnet72 / resnet75 / resnet84, and resnext50_32x4d,
    resnext101_32x8d, resnext101_64x4d, wide_resnet50_2, wide_resnet101_2."""
    init: Path | None = None
    """Backbone checkpoint to start from; its file then tells the architecture."""
    epochs: int = 160
    batch_size: int = 128
    lr: float = 0.1
    """Peak of the one-cycle schedule (SGD with Nesterov momentum)."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    held_out: int = 0
    """Training images that are not trained on: those that later stages with the same --seed and
    number hold out, too. Rules of exits and cascades need some that no network has seen."""
    drop_rate: float = 0.0
    """Stochastic depth, drawn for each image: the last block's probability of being dropped,
    falling linearly towards the first block. 0: none."""
    full_share: float | None = None
    """With --drop-rate or --droppable: share of each batch's images that keep all blocks all the
    same, so that the complete network stays good; default: 0.5 and 0.12."""
    droppable: bool = False
    """Make a backbone that bears dropping: each image of a batch runs all blocks (--full-share), a
    random set (--random-share), or a set of a nested chain, which greedy elimination chooses on
    training images. Batch norm covers active images, and is recalibrated at the end."""
    random_share: float = 0.38
    """With --droppable: share of each batch's images whose blocks are each kept with a probability
    of the image's own, uniform in --keep-lowest to 1."""
    keep_lowest: float = 0.35
    chain_lowest: int | None = None
    """With --droppable: blocks of the chain's smallest set; default: a quarter."""
    chain_every: int = 2
    """With --droppable: epochs after which the chain is chosen anew."""
    chain_images: int = 1000
    """With --droppable: training images to choose the chain on."""
    teacher: Path | None = None
    """Backbone checkpoint whose logits, all blocks kept, are also learned (distillation); with
    --droppable the default is --init."""
    distill: float = 0.5
    """With a teacher: weight of that loss; the cross entropy has the rest."""
    temperature: float = 2.0
    """With a teacher: softening of both logits."""


@dataclass(frozen=True)
class Expert(Common):
    """Train a policy network on examples: which sets of a menu are right for which image."""

    out: Path = Path("runs/expert")
    backbone: Path | None = None
    """Backbone checkpoint, best one that bears dropping (pretrain --droppable); it or --model is
    required."""
    model: Path | None = None
    """BlockDrop checkpoint whose backbone and menu to take, and whose policy to start from where it
    looks at the same: fits a policy anew to a backbone that has changed. Or one of a single set
    (joint --static), which becomes a set for each of --groups."""
    look: int | None = None
    """Blocks, of the first segment, after which the policy looks at what the backbone sees, instead
    of a network of its own that looks at the image; they always run. 0: such a network. Default:
    as that of --model, else 0."""
    budget: float | None = None
    """Mean kept blocks of the model where it is asked for none; default: that of --model, else half
    of all. Others can be asked for at any time."""
    lowest: int | None = None
    """Blocks of the menu's smallest set, not below --look; default: a quarter."""
    sets: int = 12
    """Sets of the menu, at most; more of them small than large. An image's examples cost a forward
    of each."""
    groups: int = 1
    """Groups of classes, by what the backbone mistakes for each other, each with sets of its own:
    blocks of the last segment are dealt out to them in turns. So the network's whole capacity is
    used at the cost of a part."""
    away: float = 0.5
    """With --groups: how much of its worth a set keeps for images of another group. A wish, which
    joint training makes come true; --model then goes by what is."""
    line_images: int = 1000
    """Training images to choose the menu on, by greedy elimination."""
    held_out: int = 5000
    """Training images that are not trained on: the prices of budgets are calibrated on them."""
    epochs: int = 18
    batch_size: int = 128
    lr: float = 2e-3
    """Peak of the one-cycle schedule (AdamW)."""
    weight_decay: float = 1e-4
    classify: float = 1.0
    """Weight of telling the class, too: what makes a set right for an image are the features that
    tell what it is."""
    value: float = 3.0
    """Weight of predicting the sets that are right."""
    static_images: int | None = None
    """Training images on which the static line is found, for the logs; default: by the depth, and
    0 for images above 64 pixels; 0: it is left out."""


@dataclass(frozen=True)
class Joint(Common):
    """Finetune a backbone for the decisions of a menu's policy network, or for one set."""

    out: Path = Path("runs/joint")
    model: Path | None = None
    """BlockDrop checkpoint whose policy has a menu, of the stage expert, or one set, of --static,
    to train on (required, or --backbone and --static)."""
    budget: float | None = None
    """Mean kept blocks to train at, and the model's own; default: the one that it has."""
    spread: float = 0.25
    """Share of the images that run at another budget, so that the backbone serves all of them; 1:
    no budget is preferred."""
    budgets: tuple[float, float] | None = None
    """With --spread: the lowest and the highest of them; default: all that the menu reaches."""
    backbone: Path | None = None
    """Backbone checkpoint, with --static."""
    static: int | None = None
    """The control: every image runs one set of so many blocks, see --static-set."""
    static_set: Literal["greedy", "first_k", "random_k", "random_k_per_image", "distribute_k"] = (
        "greedy"
    )
    """The best one, by greedy elimination on training images, or the paper's baselines: the first
    blocks, blocks drawn by --seed, the first ones of each segment. "random_k_per_image" draws anew
    for each image and step, and leaves a backbone without a policy."""
    epochs: int = 8
    batch_size: int = 128
    lr: float = 0.05
    """Peak of the one-cycle schedule (SGD with Nesterov momentum)."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    policy_lr: float = 0.0
    """Peak for the policy network, which learns from what came of the sets that ran; 0: it stays
    as it is, and so do the first blocks where it looks at what they see."""
    value: float = 1.0
    """With --policy-lr: weight of its loss."""
    held_out: int = 5000
    """Training images that are not trained on: the prices of budgets are calibrated on them."""
    teacher: Path | None = None
    """Backbone checkpoint whose logits, all blocks kept, are also learned (distillation)."""
    distill: float = 0.5
    """With --teacher: weight of that loss; the cross entropy has the rest."""
    temperature: float = 2.0
    """With --teacher: softening of both logits."""
    static_images: int | None = None
    """Training images on which the static line is found at the end, for the logs; default: by the
    depth, and 0 for images above 64 pixels; 0: it is left out."""


@dataclass(frozen=True)
class Policy(Common):
    """Options of the stages that train a policy network."""

    alpha: float = 0.8
    """Bounds the sampling distribution: s' = alpha s + (1 - alpha)(1 - s). Paper: 0.8."""
    samples: int = 1
    """Sampled decisions an image and step; they share the image's prefix. Paper: 1."""
    estimator: Literal["self_critical", "leave_one_out", "rloo", "arms", "flips"] = "self_critical"
    """Of the policy gradient. Three subtract a baseline from a sample's reward: that of the
    thresholded decisions (paper); the mean of the image's other samples and the thresholded
    decisions; "rloo": the mean of its other samples, two or more in all. "arms" is that with
    antithetic samples, best three or more. "flips" compares each sample with single blocks on and
    off. The last three run, and log, no thresholded decisions."""
    flips: int | None = None
    """With "flips": free blocks compared an image and sample, drawn anew each step; default: all
    of them. Each is one more set that shares the sample's prefix."""
    reward_of: Literal["right", "probability"] = "right"
    """What earns the reward: a right prediction (paper), or the label's probability p, which tells
    more: p (1 - usage^2) - (1 - p) gamma. Test rewards stay those of right predictions."""
    entropy_form: Literal["authors", "bernoulli"] = "authors"
    """What --entropy weighs: the authors' -s' log s' over all blocks, which draws s' to 0.37, or
    the entropy of s itself over free blocks, which keeps s from saturating at 0 or 1."""
    usage_target: float | None = None
    """Mean kept blocks to end at, beside gamma: rewards are lowered by a price times the share of
    kept blocks, and each step moves the price (also below 0) with the thresholded decisions' usage
    above the target. While blocks are forced, the target is the same share of the free ones."""
    usage_rate: float = 0.02
    """With --usage-target: by how much a step moves the price, times the share of blocks that are
    kept too much."""
    statistics_images: int = 2000
    """Training images over which running batch-norm statistics of networks that train are counted
    anew after each epoch, without a step; 0: they stay those of the last ten steps or so."""
    static_images: int | None = None
    """Training images on which the static line is found, once in a stage: of a frozen backbone at
    the first evaluation, else at the last; default: by the depth, and 0 for images above 64
    pixels; 0: it is left out."""


@dataclass(frozen=True)
class Curriculum(Policy):
    """Train a policy network on a frozen backbone (Algorithm 1, lines 3 to 13)."""

    out: Path = Path("runs/curriculum")
    backbone: Path | None = None
    """Backbone checkpoint (required)."""
    policy_init: Path | None = None
    """ImageNet only: ResNet-18 checkpoint whose first blocks start the policy network."""
    policy: Path | None = None
    """Checkpoint whose policy network to start from, to go on under other options."""
    epochs: int = 5000
    """Paper: 5,000 (CIFAR), 45 (ImageNet)."""
    batch_size: int = 2048
    """Paper: 2,048."""
    lr: float = 1e-4
    """Adam. Paper: 1e-4; the authors' commands: 1e-3."""
    weight_decay: float = 0.0
    penalty: float = 1.0
    """gamma: a wrong prediction's reward is -gamma. The authors' curriculum: 1."""
    entropy: float = 0.1
    """beta, the weight of the authors' bonus (--entropy-form); not in the paper. 0: none."""
    blocks_per_epoch: float = 1.0
    """Blocks freed each epoch, last ones first. Paper: 1 (the first K - t stay on in epoch t)."""


@dataclass(frozen=True)
class Finetune(Policy):
    """Finetune backbone and policy network jointly (Algorithm 1, lines 14 to 16)."""

    out: Path = Path("runs/finetune")
    model: Path | None = None
    """BlockDrop checkpoint, of the curriculum (required)."""
    epochs: int = 2000
    """Paper, CIFAR: 1,600 at 1e-4 and 400 at 1e-5; ImageNet: 10."""
    batch_size: int = 256
    """Paper: 256 (CIFAR), 320 (ImageNet)."""
    lr: float = 1e-4
    """Adam, backbone. Paper: 1e-4, then 1e-5 (CIFAR); 1e-5 (ImageNet)."""
    policy_lr: float | None = None
    """Adam, policy network; default: as the backbone's."""
    policy_frozen: int = 0
    """Epochs at the start in which the policy network stays as it is and the backbone gets used to
    it."""
    schedule: Literal["step", "constant", "one_cycle"] = "step"
    """"step" divides by ten after 80 % of the epochs (paper, CIFAR); "constant" stays (paper,
    ImageNet); "one_cycle" warms up and anneals."""
    weight_decay: float = 0.0
    entropy: float = 0.0
    """beta, as in the curriculum; neither the paper nor the authors' code has it here."""
    penalty: float = 5.0
    """gamma: a wrong prediction's reward is -gamma. Paper: 2, 5, 10."""
    bn: Literal["all", "active", "frozen"] = "all"
    """Batch-norm statistics of a block cover all images of the batch (the authors' code; dropped
    blocks are computed, so nothing is saved), its active images only, or stay as they are."""
    teacher: Path | None = None
    """Backbone checkpoint whose logits, all blocks kept, the sampled pass also learns to match
    (distillation; not in the paper)."""
    distill: float = 1.0
    """With --teacher: weight of that loss beside the cross entropy."""
    temperature: float = 2.0
    """With --teacher: softening of both logits."""


@dataclass(frozen=True)
class Heuristics(Common):
    """Evaluate FirstK, RandomK and DistributeK on a backbone, as it is (paper, section 4.2)."""

    out: Path = Path("runs/heuristics")
    model: Path | None = None
    """BlockDrop or backbone checkpoint (required)."""
    keep: int | None = None
    """K, the kept blocks; default: the rounded block usage of the model's own policy."""


@dataclass(frozen=True)
class Recipe(Common):
    """All stages of a recipe in a row."""

    out: Path = Path("runs/recipe")
    recipe: Literal["paper", "quick", "groups", "R101"] = "paper"
    """The stages and their options; a preset takes its own."""
    arch: str | None = None
    """See pretrain; default: the preset's."""
    init: Path | None = None
    """Backbone checkpoint to start from; its file then tells the architecture."""
    budget: float | None = None
    """Mean kept blocks of the model and of its control (quick, groups: required)."""
    look: int | None = None
    """The policy looks at the backbone's features after this block, see expert (quick: default 0;
    groups: default 1)."""
    control: bool = True
    """Also train the best static set of as many blocks, and say which is ahead (quick, groups)."""
    epochs: int | None = None
    """Of every stage; default: the preset's."""
    held_out: int | None = None
    """Of every stage that holds images out, see expert; default: the preset's."""
    static_images: int | None = None
    """See expert."""


@dataclass(frozen=True)
class Demo(Common):
    """The recipe quick, small, on the embedded digits, and the measured latency."""

    out: Path = Path("demo_output")
    epochs: int | None = None
    """Of every stage; default: from 5 to 20."""
    budget: float = 6.0
    """Mean kept blocks of 15."""
    batches: tuple[int, ...] = (1, 64)
    """Batch sizes to time."""


@dataclass(frozen=True)
class Reproduce(Common):
    """The paper's tables and figures: run what is missing for them, evaluate, time, write."""

    out: Path = Path("runs/reproduce")
    """Folder of reproduce.md, reproduce.json, the figures, and of the runs, each in its own."""
    scale: Literal["paper", "quick"] = "paper"
    """Which networks, and how long they train; a preset takes its own. On the embedded digits
    "quick" is nine minutes on two cores."""
    only: tuple[Literal["table1", "table2", "table3", "fig3", "times"], ...] = ()
    """Parts to make; default: all. Others that the folder has stay as they are."""
    arch: tuple[str, ...] | None = None
    """Networks, see pretrain; default: ResNet-32, and of the paper also ResNet-110."""
    init: Path | None = None
    """Checkpoint from which the first network's training starts."""
    epochs: int | None = None
    """Of every run; default: those of the stages."""
    rounds: int = 5
    """Timed calls of each of the 4 batches of images."""


STAGES = {
    "pretrain": Pretrain,
    "expert": Expert,
    "joint": Joint,
    "curriculum": Curriculum,
    "finetune": Finetune,
    "heuristics": Heuristics,
    "recipe": Recipe,
    "demo": Demo,
    "reproduce": Reproduce,
}

# The field defaults: the paper's values for CIFAR.
PAPER = {stage: config() for stage, config in STAGES.items()}

# The paper's ImageNet values: its implementation details. The paper starts from a pretrained
# ResNet-101 (any file that ``load_backbone`` reads serves as ``--backbone`` of the curriculum);
# ``pretrain`` is for those who have none.
R101 = PAPER | {
    "pretrain": Pretrain(arch="resnet101", epochs=90, batch_size=256),
    "curriculum": Curriculum(epochs=45),
    "finetune": Finetune(epochs=10, batch_size=320, lr=1e-5, schedule="constant"),
}

# What two CPU cores can finish for ResNet-32 in an evening.
QUICK = PAPER | {
    "pretrain": Pretrain(epochs=4, lr=0.05),
    "curriculum": Curriculum(
        epochs=24, batch_size=256, lr=1e-3, samples=3, estimator="leave_one_out"
    ),
    "finetune": Finetune(
        epochs=12,
        lr=1e-3,
        schedule="one_cycle",
        alpha=0.95,
        samples=3,
        estimator="leave_one_out",
        penalty=2.0,
        bn="active",
    ),
}

# Recipe -> its stages in order (train/recipe.py says what each takes from the earlier ones).
RECIPES: dict[str, dict[str, Common]] = {
    "paper": {stage: PAPER[stage] for stage in ("pretrain", "curriculum", "finetune")},
    "R101": {stage: R101[stage] for stage in ("pretrain", "curriculum", "finetune")},
    "quick": {
        "pretrain": QUICK["pretrain"],
        "droppable": Pretrain(droppable=True, epochs=8, lr=0.05),
        "expert": QUICK["expert"],
        "joint": QUICK["joint"],
        "refit": Expert(epochs=8),
        "control": QUICK["joint"],
    },
    "groups": {
        "pretrain": QUICK["pretrain"],
        "droppable": Pretrain(droppable=True, epochs=8, lr=0.05),
        "static": Joint(),
        "groups": Expert(groups=4, look=1, epochs=10),
        "groups_joint": Joint(spread=0.0),
        "groups_control": Joint(),
    },
}
QUICK |= {"recipe": Recipe(recipe="quick"), "reproduce": Reproduce(scale="quick")}
R101 |= {"recipe": Recipe(recipe="R101")}

PRESETS = {"paper": PAPER, "quick": QUICK, "R101": R101}
