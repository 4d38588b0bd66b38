"""Stages of the trainer with options under which they take seconds."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from PIL import Image

from train.run_files import MODEL_FILE
from train.stages import PRESETS, STAGES, Stage


@dataclass(frozen=True)
class Case:
    """A stage with options.

    Attributes:
        stage: of ``python -m train``.
        options: in place of ``SMALL``, and those in place of the preset's.
        takes: options that name checkpoints -> the cases that leave them.
        preset: of the command.
        data: makes a data set in a folder; None: the digits.
        processes: that train together.
    """

    stage: str
    options: dict = field(default_factory=dict)
    takes: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    preset: str = "paper"
    data: Callable[[Path], None] | None = None
    processes: int = 1

    @property
    def needs(self) -> list[str]:
        """Cases whose models it takes."""
        taken = self.takes.values()
        return [one for each in taken for one in ([each] if isinstance(each, str) else each)]

    def words(self, folder: Path, resume: bool) -> list[str]:
        """Of the command line, from "train" on.

        Args:
            folder: of the run, ``out``, and of what it takes, ``given``.
            resume: ``--resume``.
        """
        default = PRESETS[self.preset][self.stage]
        known = {one.name for one in fields(default)}
        options = {name: value for name, value in SMALL.items() if name in known} | self.options
        for option, taken in self.takes.items():
            several = [taken] if isinstance(taken, str) else taken
            paths = tuple(folder / "given" / one / MODEL_FILE for one in several)
            options[option] = paths[0] if isinstance(taken, str) else paths
        if self.data is not None:
            options["data"] = folder / "given" / "data"
        config = replace(default, out=folder / "out", resume=resume, **options)
        return shlex.split(Stage(self.stage, config).command(self.preset))[2:]


def _image_files(folder: Path) -> None:
    random_pixels = np.random.default_rng(0)
    for split, images in (("train", 12), ("val", 4)):
        for name in ("ant", "bee"):
            (folder / split / name).mkdir(parents=True)
            for number in range(images):
                pixels = random_pixels.integers(0, 256, (90, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.jpg")


SMALL = {
    "epochs": 4,
    "limit": 192,
    "batch_size": 48,
    "threads": 1,
    "routing_images": 100,
    "static_images": 50,
}
_HELD = {"held_out": 64}
_TARGET = {"usage_target": 1.5, "lr": 1e-3}
_TWO = {"samples": 2, "estimator": "leave_one_out"}

# Those that leave models for later ones come first.
CASES = {
    "pretrain": Case("pretrain", {"arch": "resnet8", "drop_rate": 0.3}),
    "deep": Case(
        "pretrain", {"arch": "resnet20", "epochs": 5, "checkpoint_every": 2, "held_out": 64}
    ),
    "droppable": Case(
        "pretrain", {"droppable": True, "chain_images": 50}, {"init": "deep"}, preset="quick"
    ),
    "image files": Case(
        "pretrain",
        {"arch": "resnet8", "limit": None, "batch_size": 8, "epochs": 3},
        data=_image_files,
    ),
    "curriculum": Case("curriculum", {"samples": 2} | _TARGET, {"backbone": "pretrain"}),
    "finetune": Case(
        "finetune",
        {"bn": "active", "policy_frozen": 1} | _TARGET | _TWO,
        {"model": "curriculum", "teacher": "pretrain"},
    ),
    "finetune, masked": Case("finetune", {"bn": "all"}, {"model": "curriculum"}),
    "expert": Case("expert", {"budget": 5.0, "line_images": 50} | _HELD, {"backbone": "droppable"}),
    "expert, look": Case(
        "expert",
        {"budget": 5.0, "look": 1, "groups": 2, "line_images": 50} | _HELD,
        {"backbone": "droppable"},
    ),
    "joint": Case("joint", {"policy_lr": 0.01} | _HELD, {"model": "expert", "teacher": "deep"}),
    "joint, look": Case("joint", {"policy_lr": 0.01} | _HELD, {"model": "expert, look"}),
    "expert, again": Case("expert", _HELD, {"model": "joint"}),
    "static": Case(
        "joint",
        {"static": 6, "static_set": "distribute_k"} | _HELD,
        {"backbone": "droppable", "teacher": "deep"},
    ),
    "static, greedy": Case("joint", {"static": 2} | _HELD, {"backbone": "pretrain"}),
    "static, drawn": Case(
        "joint",
        {"static": 2, "static_set": "random_k_per_image"} | _HELD,
        {"backbone": "pretrain"},
    ),
    "groups": Case("expert", {"groups": 2, "look": 1} | _HELD, {"model": "static"}),
    "joint, groups": Case("joint", {"spread": 0.0} | _HELD, {"model": "groups"}),
    "sequential": Case("sequential", _TARGET | _TWO, {"backbone": "pretrain"}),
    "sequential, joint": Case("sequential", {"joint": True}, {"model": "sequential"}),
    "halting": Case("halting", {"tau": 0.1}, {"backbone": "deep"}, preset="quick"),
    "halting, hard": Case(
        "halting", {"tau": 0.1, "hard": True, "free_epochs": 0}, {"model": "halting"}
    ),
    "lccl": Case("lccl", {"free_epochs": 1}, {"model": "pretrain"}, preset="quick"),
    "sact": Case("sact", {"teacher": None}, {"model": "deep"}, preset="quick"),
    "exits": Case(
        "exits", {"after": (1, 2)} | _HELD, {"backbone": "pretrain", "teacher": "pretrain"}
    ),
    "cascade": Case("cascade", _HELD, {"networks": ("pretrain", "deep")}),
    "pfec": Case("pfec", {"ratios": (0.5, 0.4, 0.3), "skip": (2,)}, {"model": "deep"}),
    "pfec, policy": Case(
        "pfec", {"ratios": (0.3, 0.3, 0.3)}, {"model": "curriculum"}, preset="quick"
    ),
    "heuristics": Case("heuristics", {"keep": 2}, {"model": "curriculum"}),
    "recipe": Case("recipe", {"arch": "resnet8", "epochs": 2}),
    "demo": Case("demo", {"epochs": 1, "limit": 256, "batches": (1,)}),
    "reproduce": Case(
        "reproduce", {"arch": ("resnet14",), "epochs": 1, "limit": 320, "rounds": 1}, preset="quick"
    ),
    "curriculum, by two": Case(
        "curriculum", {"samples": 2} | _TARGET, {"backbone": "pretrain"}, processes=2
    ),
    "finetune, by two": Case(
        "finetune",
        {"bn": "active", "policy_frozen": 1} | _TARGET | _TWO,
        {"model": "curriculum", "teacher": "pretrain"},
        processes=2,
    ),
    "expert, by two": Case(
        "expert",
        {"budget": 5.0, "line_images": 50} | _HELD,
        {"backbone": "droppable"},
        processes=2,
    ),
}


def check_coverage() -> None:
    """Raise AssertionError naming a stage of the trainer that has no case."""
    covered = {case.stage for case in CASES.values()}
    for stage in STAGES:
        assert stage in covered, f"no case for stage {stage}"
