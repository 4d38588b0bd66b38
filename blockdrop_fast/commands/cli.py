"""The command ``blockdrop``: one subcommand a module, imported only when it is called.

What subcommands import beside the library is the extra ``cli``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import blockdrop_fast

# Subcommand -> its module and one line of help. The module's function `command` is the
# subcommand: its signature gives the options, its docstring their help.
COMMANDS = {
    "info": ("blockdrop_fast.commands.info", "what is installed, built and active, and why not"),
    "evaluate": ("blockdrop_fast.commands.evaluate", "accuracy, blocks and FLOPs on a data set"),
    "visualize": (
        "blockdrop_fast.commands.visualize",
        "a figure of which images use which blocks",
    ),
    "report": ("blockdrop_fast.commands.report", "a page on what a model does, for a browser"),
    "benchmark": ("blockdrop_fast.commands.benchmark", "milliseconds against the complete ResNet"),
}
TRACEBACK_VARIABLE = "BLOCKDROP_TRACEBACK"
INTERRUPTED = 130  # the exit status: 128 + SIGINT, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``blockdrop`` with these arguments (default: the command line's).

    Returns:
        The exit status: 0; 1 if the subcommand met bad input or cannot be imported; 2 if the call
        itself was wrong; 130 if it was interrupted.
    """
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(blockdrop_fast.__version__)
        return 0
    if name not in COMMANDS:
        print(f"blockdrop: unknown command {name!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[name]
    try:
        import tyro

        command = import_module(module).command
    except ModuleNotFoundError as error:
        hint = "pip install 'blockdrop_fast[cli]'"
        print(f"blockdrop {name}: error: {error.name} is not installed; {hint}", file=sys.stderr)
        return 1
    try:
        tyro.cli(command, prog=f"blockdrop {name}", args=rest)
    except (ValueError, TypeError, OSError) as error:
        # Bad input: the message names it, and a traceback would only hide that.
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"blockdrop {name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nblockdrop {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _usage() -> str:
    lines = ["usage: blockdrop COMMAND [OPTIONS]", "", "commands:"]
    lines += [f"  {name:<12} {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += [
        "",
        "blockdrop COMMAND --help lists the options of a command.",
        f"Errors are one line; {TRACEBACK_VARIABLE}=1 shows where they come from.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
