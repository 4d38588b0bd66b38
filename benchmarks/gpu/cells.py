"""What is measured on a GPU, one cell a process: ``python -m benchmarks.gpu.cells NAME FOLDER``."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.bench import Bench, LostDeviceError, scale_here
from blockdrop_fast.files import write_json
from blockdrop_fast.measure.baselines import UnavailableError

# What is most likely to fail comes last.
CIFAR = (
    *("eager", "cudnn-graph", "authors"),
    *("walk-all", "walk-decides", "gather-all", "gather-decides"),
)
CIFAR_COMPILED = ("eager", "cudnn-graph", "walk-all", "walk-decides", "compile")
WALK = ("eager", "cudnn-graph", "walk-all", "walk-decides")
IMAGENET = ("eager", "cudnn-graph", "authors", "dense", "gather-all", "gather-decides")
IMAGENET_LAUNCHES = (*IMAGENET, "gather-universal")
IMAGENET_COMPILED = ("eager", "cudnn-graph", "gather-all", "gather-decides", "compile")
RANDOM = ("eager", "cudnn-graph", "authors", "dense", "gather")
RANDOM_COMPILED = ("eager", "cudnn-graph", "gather", "compile")
WALK_BATCHES = (1, 8, 16, 17, 24, 32, 64, 256, 1024)
NO_CLUSTERS = {"BLOCKDROP_CLUSTERS": "0"}


@dataclass(frozen=True)
class Cell:
    """One thing to measure, in a process of its own.

    Attributes:
        name: key of its result.
        seconds: it is begun only if so many are left, and stopped after three times as many.
        run: gives its result, ready for JSON.
        environ: variables of its process.
    """

    name: str
    seconds: float
    run: Callable[[Bench], dict]
    environ: Mapping[str, str] = field(default_factory=dict)


def _times(seconds, family, sizes, contenders, decisions="published", more="", **rest) -> Cell:
    sizes = (sizes,) if isinstance(sizes, int) else sizes
    which = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    form = " compiled" if "compile" in contenders else ""
    return Cell(
        f"{family} {decisions} {which}{form}{more}",
        seconds,
        lambda bench: bench.times(family, sizes, decisions, contenders),
        **rest,
    )


def _waits(family: str, contenders: Sequence[str]) -> Cell:
    return Cell(f"{family} waits", 15, lambda bench: bench.waits(family, 64, contenders))


# The most valuable first; what has to compile for minutes, last.
BENCH = (
    _times(30, "cifar", 256, CIFAR),
    _times(25, "cifar", 1, CIFAR),
    _times(45, "imagenet", 64, IMAGENET_LAUNCHES),
    _times(30, "imagenet", 1, IMAGENET_LAUNCHES),
    _times(30, "cifar", 64, CIFAR),
    _times(40, "imagenet", 256, IMAGENET),
    _times(50, "cifar", WALK_BATCHES, WALK, more=" with clusters"),
    _times(50, "cifar", WALK_BATCHES, WALK, more=" without clusters", environ=NO_CLUSTERS),
    _times(30, "cifar", 1024, CIFAR),
    _times(30, "imagenet", 64, RANDOM, "random"),
    _waits("cifar", ("walk-decides", "gather-decides")),
    _waits("imagenet", ("gather-decides", "gather-universal")),
    Cell("imagenet memory", 20, lambda bench: bench.memory("imagenet", 64)),
    _times(60, "cifar", 256, CIFAR_COMPILED),
    _times(80, "imagenet", 64, IMAGENET_COMPILED),
    _times(60, "cifar", 1, CIFAR_COMPILED),
    _times(70, "imagenet", 1, IMAGENET_COMPILED),
    _times(80, "imagenet", 64, RANDOM_COMPILED, "random"),
    _times(60, "cifar", 1024, CIFAR_COMPILED),
    _times(80, "imagenet", 256, IMAGENET_COMPILED),
    _times(25, "cifar", 8, CIFAR),
    _times(30, "imagenet", 8, IMAGENET),
)
TUNE = "imagenet tune"
# 19 kinds of convolution, of which each has 8 to 26 configurations: tuning takes what it is given.
DECIDE = (
    Cell(TUNE, 60, lambda bench: bench.tune("imagenet", 64, 45)),
    Cell("cifar crossover", 60, lambda bench: bench.crossover("cifar", (1, 8, 16, 32, 64, 256))),
    Cell("imagenet crossover", 80, lambda bench: bench.crossover("imagenet", (1, 8, 64))),
    _times(80, "imagenet", 64, IMAGENET_COMPILED, more=" tuned"),
    _times(70, "imagenet", 1, IMAGENET_COMPILED, more=" tuned"),
    Cell(f"{TUNE}, the rest", 135, lambda bench: bench.tune("imagenet", 64, 120, after=TUNE)),
)
PROFILE = (Cell("walk profile", 60, Bench.profile),)
STAGES = {"bench": BENCH, "decide": DECIDE}
ALL = {cell.name: cell for cell in (*BENCH, *DECIDE, *PROFILE)}


def run(cell: Cell, bench: Bench) -> dict:
    """A cell's result; with "why" if there is none, and "failed" if that is a fault.

    Raises:
        LostDeviceError: a contender took the device with it.
    """
    try:
        result = cell.run(bench)
    except LostDeviceError:
        raise
    except UnavailableError as error:
        result = {"why": str(error)}
    except Exception as error:  # whatever it is, the other cells are worth their time
        traceback.print_exc()
        result = {"why": f"{type(error).__name__}: {error}".splitlines()[0], "failed": True}
    return result | ({"dropped": bench.dropped} if bench.dropped else {})


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.cells")
    parser.add_argument("name", choices=ALL)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--result", type=Path, help="a file; default: standard output")
    parser.add_argument("--progress", type=Path, help="names the contender that is attempted")
    parser.add_argument("--without", nargs="*", default=[], help="contenders")
    given = parser.parse_args(arguments)
    files = {"progress": given.progress, "result": given.result}
    bench = Bench(scale_here(), given.folder, frozenset(given.without), **files)
    result = run(ALL[given.name], bench)
    if given.result is None:
        print(json.dumps(result))
    else:
        write_json(given.result, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
