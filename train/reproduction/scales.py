"""How large a reproduction is: networks, seeds, penalties, and the options of its runs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from train.config import RECIPES


@dataclass(frozen=True)
class Scale:
    """What a preset, or the data set, fixes.

    Attributes:
        preset: of the stages.
        options: kind of run (see ``train.reproduction.runs``) -> options in place of the preset's.
        archs: the networks.
        seeds: of RandomK, so many.
        penalties: gammas of table 3.
        penalty: gamma of the other tables.
        same: options of all runs whose stage has them.
    """

    preset: str
    options: dict[str, dict]
    archs: tuple[str, ...] = ("resnet32",)
    seeds: int = 5
    penalties: tuple[float, ...] = (1.0, 2.0, 5.0)
    penalty: float = 2.0
    same: dict = field(default_factory=dict)


# Nobody reads the logs of so many runs: the last epoch is evaluated, with all the others.
SAME = {"evaluate_every": 10_000, "routing_images": 0, "static_images": 0}

QUICK = Scale(
    preset="quick",
    options={
        "held": {"held_out": 5000},
        "droppable": {"droppable": True, "epochs": 8, "lr": 0.05},
        "refit": {"epochs": RECIPES["quick"]["refit"].epochs},
        "heuristic": {"epochs": 12},
        "sequential-joint": {"epochs": 12, "lr": 1e-3},
        "act-hard": {"epochs": 3, "free_epochs": 0},
    },
    same=SAME,
)

PAPER = Scale(
    preset="paper",
    options={
        "held": {"held_out": 5000},
        "droppable": {"droppable": True, "epochs": 40},
        "heuristic": {"epochs": 2000},
        "sequential-joint": {"epochs": 2000},
        "act-hard": {"free_epochs": 0},
    },
    archs=("resnet32", "resnet110"),
    penalties=(2.0, 5.0, 10.0),
    penalty=5.0,
    same=SAME,
)

_FEW = {"held_out": 250}
_LINE = {"line_images": 300}
_CHAIN = {"chain_images": 300, "chain_every": 4}
# 1,437 images of digits, nine minutes on two cores. In so few steps only small gammas let a policy
# drop blocks.
DIGITS = replace(
    QUICK,
    options={
        "pretrain": {"epochs": 8, "lr": 0.1},
        "held": {"epochs": 8, "lr": 0.1, **_FEW},
        "droppable": {"droppable": True, "epochs": 10, "lr": 0.1, **_CHAIN},
        "expert": {"epochs": 15, **_LINE, **_FEW},
        "look": {"epochs": 15, **_LINE, **_FEW},
        "joint": {"epochs": 6, **_FEW},
        "refit": {"epochs": 5, **_FEW},
        "static": {"epochs": 6, **_FEW},
        "heuristic": {"epochs": 6, **_FEW},
        "curriculum": {"epochs": 16},
        "finetune": {"epochs": 6, "policy_lr": 3e-3},
        "sequential": {"epochs": 16},
        "sequential-joint": {"epochs": 6, "lr": 1e-3},
        "act": {"epochs": 6, "lr": 0.05},
        "act-hard": {"epochs": 3, "free_epochs": 0, "lr": 0.05},
        "lccl": {"epochs": 5, "lr": 0.05},
        "sact": {"epochs": 5, "lr": 0.05},
        "exits": {"epochs": 6, "lr": 0.05, **_FEW},
        "cascade": _FEW,
        "pfec": {"epochs": 5, "lr": 0.05},
        "pfec-blockdrop": {"epochs": 5, "lr": 0.05},
    },
    seeds=3,
    penalties=(0.3, 0.5, 1.0),
    penalty=0.5,
    same=SAME | {"batch_size": 64, "checkpoint_every": 2},
)

# Network -> its shallower ones, and the blocks that BlockDrop keeps on average: of the paper's
# BlockDrop-32 6.9, of its BlockDrop-110 16.9.
SHALLOWER = {
    "resnet32": ("resnet14", "resnet20", "resnet26"),
    "resnet56": ("resnet20", "resnet32", "resnet44"),
    "resnet110": ("resnet20", "resnet32", "resnet44", "resnet56"),
}
KEPT = {"resnet32": 7, "resnet110": 17}


def shallower(arch: str) -> tuple[str, ...]:
    """Names of networks of fewer blocks; of others than the paper's the one with a third less."""
    if arch in SHALLOWER:
        return SHALLOWER[arch]
    blocks = num_blocks(arch)
    return (f"resnet{2 * max(3, blocks * 2 // 9 * 3) + 2}",) if blocks > 3 else ()


def num_blocks(arch: str) -> int:
    """K of resnet<6n+2>.

    Raises:
        ValueError: another name.
    """
    match = re.fullmatch(r"resnet(\d+)", arch)
    if match is None or int(match[1]) < 8 or (int(match[1]) - 2) % 6:
        raise ValueError(f"arch: expected resnet<6n+2>, got {arch!r}")
    return (int(match[1]) - 2) // 2


def kept_blocks(arch: str) -> int:
    """Blocks of BlockDrop, and of what is trained to be compared with it."""
    return KEPT.get(arch, round(0.45 * num_blocks(arch)))


def budgets(arch: str) -> list[int]:
    """Numbers of blocks around that: of BlockDrop's budgets, and of static sets."""
    kept, blocks = kept_blocks(arch), num_blocks(arch)
    between = {kept, (kept + blocks) // 2, (kept + blocks // 4 + 1) // 2}
    return sorted(one for one in between if blocks // 4 <= one < blocks)
