"""``python -m train STAGE [options]``: a training stage of ``train/``."""

from __future__ import annotations

import sys
from importlib import import_module

import tyro

from train import config as stages_config
from train.systems import config as systems_config

STAGES = stages_config.STAGES | systems_config.SYSTEMS
PRESETS = {
    name: options | systems_config.PRESETS[name] for name, options in stages_config.PRESETS.items()
}


def main() -> None:
    """Parse ``STAGE [--preset NAME] [options]`` and run the stage.

    A stage is the function of its name in the module of its name.
    """
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in STAGES:
        stages, presets = " | ".join(STAGES), "|".join(PRESETS)
        print(
            f"usage: python -m train {stages} [--preset {presets}] [options]\n"
            "       python -m train STAGE --help lists a stage's options"
        )
        sys.exit(0 if arguments in ([], ["--help"], ["-h"]) else 2)
    stage, *rest = arguments
    preset = "paper"
    if "--preset" in rest:
        at = rest.index("--preset")
        preset = rest[at + 1] if at + 1 < len(rest) else ""
        if preset not in PRESETS:
            sys.exit(f"--preset: expected {', '.join(PRESETS)}, got {preset!r}")
        del rest[at : at + 2]
    config = tyro.cli(
        STAGES[stage], args=rest, default=PRESETS[preset][stage], prog=f"python -m train {stage}"
    )
    package = "train.systems" if stage in systems_config.SYSTEMS else "train"
    try:
        getattr(import_module(f"{package}.{stage}"), stage)(config)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"{stage}: {error}")


if __name__ == "__main__":
    main()
