"""``python -m train STAGE [options]``: pretrain, curriculum, finetune, heuristics, demo."""

from __future__ import annotations

import sys

import tyro

from train.config import PRESETS, STAGES, recipe


def main() -> None:
    """Parse ``STAGE [--preset quick|paper|R101] [options]`` and run the stage."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in STAGES:
        choices = " | ".join(STAGES)
        print(
            f"usage: python -m train {choices} [--preset quick|paper|R101] [options]\n"
            "       python -m train STAGE --help lists a stage's options"
        )
        sys.exit(0 if arguments in ([], ["--help"], ["-h"]) else 2)
    stage, *rest = arguments
    preset = "paper"
    if "--preset" in rest:
        at = rest.index("--preset")
        preset = rest[at + 1] if at + 1 < len(rest) else ""
        if preset not in (*PRESETS, "R101"):
            sys.exit(f"--preset: expected {', '.join(PRESETS)} or R101, got {preset!r}")
        del rest[at : at + 2]
    defaults = recipe(preset) if preset == "R101" else PRESETS[preset]
    config = tyro.cli(
        STAGES[stage], args=rest, default=defaults[stage], prog=f"python -m train {stage}"
    )
    try:
        if stage == "pretrain":
            from train.pretrain import pretrain as run
        elif stage == "curriculum":
            from train.curriculum import curriculum as run
        elif stage == "finetune":
            from train.finetune import finetune as run
        elif stage == "demo":
            from train.demo import demo as run
        else:
            from train.heuristics import heuristics as run
        run(config)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"{stage}: {error}")


if __name__ == "__main__":
    main()
