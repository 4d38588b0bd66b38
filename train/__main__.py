"""``python -m train STAGE [options]``: a training stage of ``train/``."""

from __future__ import annotations

import os
import sys

import tyro

from blockdrop_fast.commands.cli import INTERRUPTED
from train import distributed
from train.stages import PRESETS, STAGES, function_of

# They time what they have trained.
IN_ONE_PROCESS = ("demo", "reproduce")


def main() -> None:
    """Parse ``STAGE [--preset NAME] [options]`` and run the stage."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in STAGES:
        stages, presets = " | ".join(STAGES), "|".join(PRESETS)
        if arguments and arguments[0] not in ("--help", "-h"):
            print(f"train: unknown stage {arguments[0]!r}")
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
    try:
        with distributed.processes(config):
            if stage in IN_ONE_PROCESS and distributed.count() > 1:
                raise ValueError("runs in one process, without torchrun")
            function_of(stage)(config)
    except distributed.LostProcessError as error:
        print(f"{stage}: {error}", file=sys.stderr, flush=True)
        # Not by sys.exit: threads of torch's that wait for the other one can abort the end.
        os._exit(1)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"{stage}: {error}")
    except KeyboardInterrupt:
        goes_on = f"--resume goes on from the last checkpoint in {config.out}, if there is one"
        print(f"\n{stage}: interrupted; {goes_on}", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
