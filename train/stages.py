"""The stages by name, and several of them in a row, each from what earlier ones left."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path

from train import config as stages_config
from train.config import Common
from train.run_files import MODEL_FILE, STATE_FILE, changed_options, read_progress
from train.systems import config as systems_config

STAGES = stages_config.STAGES | systems_config.SYSTEMS
PRESETS = {
    name: options | systems_config.PRESETS[name] for name, options in stages_config.PRESETS.items()
}


def function_of(stage: str) -> Callable[[Common], None]:
    """What runs a stage: the function of its name in the module of its name."""
    package = "train.systems" if stage in systems_config.SYSTEMS else "train"
    return getattr(import_module(f"{package}.{stage}"), stage)


@dataclass(frozen=True)
class Stage:
    """A stage, with its options.

    Attributes:
        stage: its name.
        config: its options; the folder among them.
    """

    stage: str
    config: Common

    @property
    def checkpoint(self) -> Path:
        """The model that it leaves."""
        return self.config.out / MODEL_FILE

    @property
    def started(self) -> bool:
        """Whether its folder has something to go on from."""
        return (self.config.out / STATE_FILE).exists()

    @property
    def complete(self) -> bool:
        """Whether its last epoch is done."""
        return self.started and self._progress()[0] >= getattr(self.config, "epochs", 0)

    def check(self) -> None:
        """Raise ValueError if its folder holds a run with other options."""
        if self.started and (changed := changed_options(self._progress()[1], self.config)):
            raise ValueError(
                f"out: {self.config.out} holds a run with other options: {', '.join(changed)}"
            )

    def run(self) -> None:
        """Run it, from where it was."""
        resume = self.started or self.checkpoint.exists()
        function_of(self.stage)(replace(self.config, resume=resume))

    def command(self, preset: str) -> str:
        """The command that runs it.

        Args:
            preset: of which the options are; what differs is named.
        """
        words = ["python", "-m", "train", self.stage, "--preset", preset]
        default = PRESETS[preset][self.stage]
        for one in fields(self.config):
            value, flag = getattr(self.config, one.name), one.name.replace("_", "-")
            if value == getattr(default, one.name):
                continue
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                values = value if isinstance(value, tuple) else [value]
                words += [f"--{flag}", *map(str, values)]
        return shlex.join(words)

    def _progress(self) -> tuple[int, str]:
        return read_progress(self.config.out / STATE_FILE)


def run_stages(stages: dict[str, Stage]) -> None:
    """Run the stages that are not complete.

    Raises:
        ValueError: a folder holds a run with other options; before anything runs.
    """
    for stage in stages.values():
        stage.check()
    for name, stage in stages.items():
        if stage.complete:
            print(f"{name}: complete in {stage.config.out}")
            continue
        print(f"{name}: {stage.config.epochs} epochs, {stage.config.out}")
        stage.run()
