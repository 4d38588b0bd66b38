"""``python -m benchmarks.gpu``: the figures of a machine with a GPU, the most valuable first.

`make gpu-bench` runs this. It needs no network, and no package beyond what blockdrop_fast imports.
It begins no cell that its time would not do for, writes its files after every cell, and goes on
where an earlier run of the same commit on the same machine stopped.

    BLOCKDROP_GPU_BENCH_SECONDS   its time, default 440
    BLOCKDROP_GPU_BENCH_OUT       folder of the results, default benchmarks/results/<GPU>
    BLOCKDROP_GPU_BENCH_DEVICE    "cpu" rehearses all of it with tiny networks: figures without
                                  meaning, marked as such
    BLOCKDROP_COMMIT              named in the results where there is no git to ask
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from blockdrop_fast.engine import compile
from blockdrop_fast.executors import crossover
from blockdrop_fast.files import atomic_write
from blockdrop_fast.machine import machine_info
from blockdrop_fast.measure import baselines, calibration
from blockdrop_fast.measure.baselines import UnavailableError
from blockdrop_fast.measure.contenders import LEGEND, Row, build, format_rows, measure
from blockdrop_fast.measure.workload import Workload, fit_policy, make_workload, random_workload
from blockdrop_fast.networks.folding import fold_network
from blockdrop_fast.networks.resnet import ResNet, ResNetConfig, resnet_cifar

RESULTS = Path(__file__).with_name("results")
DEFAULT_SECONDS = 440
ROUNDS = 30
PAPER_BATCH_1_MS = 10.9  # ResNet-110's BlockDrop in the paper, on the GPUs of its day
BUSY_SECONDS = 0.2

CIFAR = (
    "eager",
    "cudnn-graph",
    "authors",
    "gather-decides",
    "gather-all",
    "walk-decides",
    "walk-all",
)
CIFAR_COMPILED = ("compile", "cudnn-graph", "walk-decides", "walk-all")
IMAGENET = ("eager", "cudnn-graph", "authors", "dense", "gather-decides", "gather-all")
GATHER_LAUNCHES = ("gather-decides", "gather-universal")
IMAGENET_LAUNCHES = (*IMAGENET[:-2], *GATHER_LAUNCHES, "gather-all")
IMAGENET_COMPILED = ("compile", "cudnn-graph", "gather-decides", "gather-all")
RANDOM = ("eager", "cudnn-graph", "authors", "dense", "gather")
RANDOM_COMPILED = ("compile", "cudnn-graph", "gather")


class OutOfTime(BaseException):
    """A cell's time is up. Not an Exception: compilers catch those, and go on without."""


@dataclass(frozen=True)
class Scale:
    """What a rehearsal does smaller.

    Attributes:
        device, dtype: of all contenders.
        images: of "cifar" and "imagenet" workloads.
        divide: batch sizes are divided by this.
        rounds: timed calls of each contender.
    """

    device: torch.device
    dtype: torch.dtype
    images: Mapping[str, int]
    divide: int
    rounds: int

    @property
    def rehearsal(self) -> bool:
        return self.device.type != "cuda"

    def batch(self, size: int) -> int:
        return max(1, size // self.divide)


def full_scale() -> Scale:
    """On the GPU."""
    images = {"cifar": 1024, "imagenet": 256}
    return Scale(torch.device("cuda"), torch.bfloat16, images, 1, ROUNDS)


def rehearsal_scale() -> Scale:
    """On a CPU, in seconds."""
    images = {"cifar": 64, "imagenet": 16}
    return Scale(torch.device("cpu"), torch.float32, images, 16, 2)


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        name: key of its result.
        seconds: it is begun only if so many are left, and stopped after three times as many.
        run: gives its result, ready for JSON.
    """

    name: str
    seconds: float
    run: Callable[[], dict]


@dataclass
class Bench:
    """The workloads, shared by all cells."""

    scale: Scale
    _workloads: dict[tuple, Workload] = field(default_factory=dict)

    def workload(self, family: str, batch: int, decisions: str) -> Workload:
        """So many images that several batches differ, and the tolerance means something."""
        total = self.scale.images[family]
        count = min(max(64, 4 * batch), total)
        key = (family, decisions, count)
        if key not in self._workloads:
            everything = self._all_images(family)
            if decisions == "random":
                generator = torch.Generator().manual_seed(0)
                shape = everything.decisions.shape
                everything = everything.at(torch.rand(shape, generator=generator) < 0.5)
            self._workloads[key] = everything.first(count)
        return self._workloads[key]

    def _all_images(self, family: str) -> Workload:
        key = (family,)
        if key not in self._workloads:
            make = _tiny if self.scale.rehearsal else _published
            self._workloads[key] = fit_policy(make(family, self.scale))
        return self._workloads[key]

    # ------------------------------------------------------------------ what cells run

    def times(self, family: str, size: int, decisions: str, contenders: tuple[str, ...]) -> dict:
        """A round-robin of contenders."""
        batch = self.scale.batch(size)
        workload = self.workload(family, batch, decisions)
        measured = measure(workload, batch, contenders, rounds=self.scale.rounds, host=size == 1)
        usage = workload.decisions.sum(1).double()
        return {
            "batch": batch,
            "given_usage": [float(usage.mean()), float(usage.std(correction=0))],
            "rows": [asdict(row) for row in measured.rows],
            "unavailable": measured.unavailable,
            # An engine may run otherwise than it was asked to, and says so.
            "engines": workload.engine_reasons(),
        }

    def memory(self, family: str, size: int) -> dict:
        """Peak memory of the gather engine and of complete networks, weights included."""
        if self.scale.rehearsal:
            raise UnavailableError("peak memory is a GPU's")
        batch = self.scale.batch(size)
        workload = self.workload(family, batch, "published")
        images = workload.images[:batch]

        def engine(strategy: str) -> Callable[[], object]:
            made = compile(workload.model, dtype=workload.dtype, strategy=strategy)
            return lambda: made(images)

        def network() -> Callable[[], object]:
            # Without cuDNN's tries, which need memory for what is not taken in the end.
            folded = fold_network(workload.model.backbone, workload.dtype)
            complete = baselines.FoldedResNet(folded).eval()
            return lambda: complete(images)

        def graph() -> Callable[[], object]:
            folded = fold_network(workload.model.backbone, workload.dtype)
            call = baselines.cudnn_graph(folded, images)
            return lambda: call(images, None)

        makers = {
            "complete, eager": network,
            "complete, cudnn-graph": graph,
            "dense": lambda: engine("dense"),
            "gather": lambda: engine("gather"),
        }
        return {"batch": batch} | {name: _peak(make) for name, make in makers.items()}

    def waits(self, family: str, size: int, contenders: tuple[str, ...]) -> dict:
        """Whether a call returns while the device is busy with what came before."""
        if self.scale.rehearsal:
            raise UnavailableError("a CPU computes before it returns")
        batch = self.scale.batch(size)
        workload = self.workload(family, batch, "published")
        images, result = workload.images[:batch], {"batch": batch}
        for name in contenders:
            try:
                call = build(name, workload, images)
            except UnavailableError as error:
                result[name] = str(error)
                continue
            for _ in range(4):
                call(images, None)
            torch.cuda.synchronize()
            torch.cuda._sleep(int(BUSY_SECONDS * 2e9))
            started = time.perf_counter()
            call(images, None)
            result[name] = time.perf_counter() - started > BUSY_SECONDS / 2
            torch.cuda.synchronize()
        return result

    def crossover(self, family: str, sizes: tuple[int, ...], out: Path) -> dict:
        """The crossover map at a few batch sizes."""
        batches = tuple(self.scale.batch(size) for size in sizes)
        workload = self.workload(family, 1, "published")
        cells = calibration.calibrate(
            calibration.subject_of(workload),
            tuple(dict.fromkeys(batches)),
            rounds=max(2, self.scale.rounds // 2),
        )
        print(calibration.verdict(cells))
        config = workload.model.backbone.config
        crossover.save(config, workload.dtype, workload.images.device, cells, out)
        return {"cells": [asdict(cell) for cell in cells]}


def _published(family: str, scale: Scale) -> Workload:
    network = {"cifar": "resnet110", "imagenet": "resnet101"}[family]
    return make_workload(network, scale.images[family], device=scale.device, dtype=scale.dtype)


def _tiny(family: str, scale: Scale) -> Workload:
    torch.manual_seed(0)
    backbone = resnet_cifar(8)
    if family == "imagenet":
        layers, widths = (1, 2, 1, 1), (8, 16, 16, 16)
        config = ResNetConfig("bottleneck", layers, widths, "imagenet", "projection", 10)
        backbone = ResNet(config)
    decisions = torch.rand(scale.images[family], backbone.num_blocks) < 0.6
    size = {"cifar": 32, "imagenet": 96}[family]
    return random_workload("tiny", backbone, decisions, size, scale.device, scale.dtype)


def _peak(make: Callable[[], Callable[[], object]]) -> dict[str, int]:
    """Bytes that making something and calling it takes at most."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    call = make()
    with torch.inference_mode():
        for _ in range(4):
            call()
    torch.cuda.synchronize()
    # A captured graph's memory is reserved for it; that it is allocated shows while it is captured.
    return {
        "allocated": torch.cuda.max_memory_allocated() - before[0],
        "reserved": torch.cuda.max_memory_reserved() - before[1],
    }


def plan_cells(bench: Bench, folder: Path) -> list[Cell]:
    """All cells, the most valuable first; what has to compile for minutes, last."""

    def times(seconds: float, family: str, size: int, contenders, decisions="published") -> Cell:
        form = " compiled" if "compile" in contenders else ""
        name = f"{family} {decisions} {size}{form}"
        return Cell(name, seconds, lambda: bench.times(family, size, decisions, contenders))

    def waits(family: str, contenders: tuple[str, ...]) -> Cell:
        return Cell(f"{family} waits", 5, lambda: bench.waits(family, 64, contenders))

    table = folder / crossover.FILE_NAME
    return [
        times(20, "cifar", 256, CIFAR),
        times(15, "cifar", 1, CIFAR),
        times(40, "imagenet", 64, IMAGENET_LAUNCHES),
        times(20, "imagenet", 1, IMAGENET_LAUNCHES),
        times(20, "cifar", 1024, CIFAR),
        times(20, "imagenet", 64, RANDOM, "random"),
        times(30, "imagenet", 256, IMAGENET),
        waits("cifar", ("walk-decides", "gather-decides")),
        waits("imagenet", GATHER_LAUNCHES),
        Cell("imagenet memory", 10, lambda: bench.memory("imagenet", 64)),
        times(50, "cifar", 256, CIFAR_COMPILED),
        times(70, "imagenet", 64, IMAGENET_COMPILED),
        times(10, "imagenet", 64, RANDOM_COMPILED, "random"),
        Cell("imagenet crossover", 40, lambda: bench.crossover("imagenet", (1, 64), table)),
        times(50, "cifar", 1, CIFAR_COMPILED),
        times(60, "imagenet", 1, IMAGENET_COMPILED),
        times(50, "cifar", 1024, CIFAR_COMPILED),
        times(60, "imagenet", 256, IMAGENET_COMPILED),
        times(15, "cifar", 64, CIFAR),
        times(15, "cifar", 8, CIFAR),
        times(20, "imagenet", 8, IMAGENET),
    ]


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime here after so many seconds."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    # Again and again, should the first be swallowed.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1), 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------- what has to be shown


@dataclass(frozen=True)
class Requirement:
    """A figure and what it has to be.

    Attributes:
        text: what it is of.
        target, goal: how good it has to be, and ought to be.
        unit: behind the figures.
        at_most: smaller is better.
        value: measured, or None.
        remark: why not, or what it does not include.
    """

    text: str
    target: float
    goal: float | None
    unit: str
    at_most: bool
    value: float | None
    remark: str

    def __str__(self) -> str:
        bound = f"{'at most' if self.at_most else 'at least'} {self.target:g}"
        if self.goal is not None:
            bound += f", goal {self.goal:g}"
        if self.value is None:
            return f"not measured  {self.text}: {bound}{self.unit} ({self.remark})"
        good = self.value <= self.target if self.at_most else self.value >= self.target
        remark = f"; {self.remark}" if self.remark else ""
        verdict = "met" if good else "missed"
        return f"{verdict:<12}  {self.text}: {self.value:.3g}{self.unit} ({bound}{remark})"


def requirements(results: Mapping[str, dict]) -> list[Requirement]:
    """What the walk and gather have to show on a GPU, with what was measured of it."""
    found = []

    def row(cell: str, contender: str) -> tuple[dict | None, str]:
        """A contender's row, from the round with torch.compile where there is one."""
        for name, remark in ((f"{cell} compiled", ""), (cell, "torch.compile not in this round")):
            rows = {one["contender"]: one for one in results.get(name, {}).get("rows", ())}
            if contender in rows:
                return rows[contender], remark
        for name in (cell, f"{cell} compiled"):
            result = results.get(name, {})
            why = result.get("unavailable", {}).get(contender) or result.get("why")
            if why:
                return None, why
        return None, "left out"

    def add(
        text: str,
        cell: str,
        contender: str,
        read: Callable[[dict], float | None],
        target: float,
        goal: float | None = None,
        unit: str = "",
        at_most: bool = False,
    ) -> None:
        one, remark = row(cell, contender)
        value = None if one is None else read(one)
        if one is not None and value is None:
            remark = "not timed"
        found.append(Requirement(text, target, goal, unit, at_most, value, remark))

    def host_speedup(one: dict) -> float | None:
        """Over the fastest baseline of the same round, both by the host's clock."""
        for result in results.values():
            rows = result.get("rows", ())
            if one in rows and one["host_seconds"]:
                fastest = min(r["host_seconds"] for r in rows if r["kind"] == "baseline")
                return fastest / one["host_seconds"]
        return None

    for size in (256, 1024):
        cell = f"cifar published {size}"
        what = f"walk, ResNet-110, batch {size}"
        add(f"{what}, over the fastest complete network", cell, "walk-decides",
            lambda one: one["speedup"], 4, 6, "x")  # fmt: skip
        add(f"{what}, share of the FLOP bound over its own complete network", cell, "walk-decides",
            lambda one: one["share_of_own_bound"], 0.85)  # fmt: skip
        add(f"{what}, images/s", cell, "walk-decides",
            lambda one: one["images_per_second"], 7e5, 1.5e6)  # fmt: skip
    one_image = "walk, ResNet-110, one image"
    cell = "cifar published 1"
    add(f"{one_image}, device time", cell, "walk-decides",
        lambda one: 1e6 * one["seconds"], 80, 40, " µs", True)  # fmt: skip
    add(f"{one_image}, over the fastest complete network", cell, "walk-decides",
        lambda one: one["speedup"], 1, None, "x")  # fmt: skip
    add(f"{one_image}, over the paper's {PAPER_BATCH_1_MS} ms on other hardware, host time", cell,
        "walk-decides",
        lambda one: PAPER_BATCH_1_MS / 1e3 / one["host_seconds"] if one["host_seconds"] else None,
        1, None, "x")  # fmt: skip
    for size in (64, 256):
        add(f"gather, ResNet-101, ten policies, batch {size}, over the fastest complete network",
            f"imagenet published {size}", "gather-decides",
            lambda one: one["speedup"], 1.15, 1.2, "x")  # fmt: skip
    add("gather, ResNet-101, random decisions of density 0.5, batch 64, over the fastest complete "
        "network", "imagenet random 64", "gather",
        lambda one: one["speedup"], 1.5, None, "x")  # fmt: skip
    add("gather, ResNet-101, ten policies, one image, host time, over the fastest complete network",
        "imagenet published 1", "gather-decides", host_speedup, 1.1, None, "x")  # fmt: skip
    for size in (1, 8, 64, 256):
        add(f"gather, ResNet-101, all kept, batch {size}, time over the fastest complete network's",
            f"imagenet published {size}", "gather-all",
            lambda one: 1 / one["speedup"], 1.03, None, "", True)  # fmt: skip

    def add_value(
        text: str, cell: str, read: Callable[[dict], float], target: float, unit: str = ""
    ) -> None:
        result = results.get(cell, {"why": "left out"})
        why = result.get("why", "")
        value = None if why else read(result)
        found.append(Requirement(text, target, None, unit, True, value, why))

    add_value(
        "gather, ResNet-101, worst cell of the crossover map, time of auto over dense",
        "imagenet crossover",
        lambda result: max(c["seconds"]["auto"] / c["seconds"]["dense"] for c in result["cells"]),
        1 + calibration.ALLOWED_LOSS,
    )
    add_value(
        "gather, ResNet-101, batch 64, peak reserved memory over the complete network's",
        "imagenet memory",
        lambda result: result["gather"]["reserved"] / result["complete, eager"]["reserved"],
        1.3,
    )
    waiting = {
        "walk": ("cifar waits", "walk-decides", 0, ""),
        "gather": ("imagenet waits", "gather-decides", 1, " (the copy of K counts)"),
        "gather, launch='universal'": ("imagenet waits", "gather-universal", 0, ""),
    }
    for name, (cell, contender, allowed, remark) in waiting.items():
        result = results.get(cell, {"why": "left out"})
        answer = result.get(contender)
        if isinstance(answer, bool):
            text = f"{name}, waits for the device in a call{remark}"
            found.append(Requirement(text, allowed, None, "", True, float(answer), ""))
        else:
            why = answer or result.get("why", "left out")
            found.append(
                Requirement(f"{name}, waits in a call", allowed, None, "", True, None, why)
            )
    return found


# ---------------------------------------------------------------------- files and the run


def describe(content: Mapping) -> str:
    """Tables of all cells, and what has to be shown."""
    lines = [", ".join(f"{key} {value}" for key, value in content["machine"].items()), ""]
    if content["rehearsal"]:
        lines += ["REHEARSAL on a CPU with tiny networks: these figures mean nothing.", ""]
    for name, result in content["cells"].items():
        lines.append(f"== {name}")
        if "why" in result:
            lines.append(result["why"])
        elif "rows" in result:
            rows = [Row(**one) for one in result["rows"]]
            lines.append(format_rows(rows))
            lines += [f"not timed: {who} ({why})" for who, why in result["unavailable"].items()]
            lines += [f"engine {which}: {reason}" for which, reason in result["engines"].items()]
            lines += [
                f"{row.contender}: {row.block_usage[0]:.1f} ± {row.block_usage[1]:.1f} blocks, "
                f"{row.policies} different decisions"
                for row in rows
                if row.kind == "decides"
            ]
        elif "cells" in result:
            cells = [crossover.Cell(**one) for one in result["cells"]]
            lines += [calibration.HEAD, *map(calibration.format_cell, cells)]
            lines.append(calibration.verdict(cells))
        else:
            lines += [f"{key}: {value}" for key, value in result.items()]
        lines.append("")
    lines += [LEGEND, ""]
    if content["left_out"]:
        lines += [f"left out, run again to go on: {', '.join(content['left_out'])}", ""]
    prefix = "rehearsal, no claim: " if content["rehearsal"] else ""
    lines += [prefix + str(one) for one in requirements(content["cells"])]
    return "\n".join(lines) + "\n"


def write(content: dict, folder: Path) -> None:
    """gpu.json and gpu.txt, each in one step."""
    texts = {"gpu.json": json.dumps(content, indent=1), "gpu.txt": describe(content)}
    for name, text in texts.items():
        with atomic_write(folder / name) as path:
            path.write_text(text)


def earlier_cells(path: Path, machine: Mapping) -> dict[str, dict]:
    """What a run of the same commit and versions on the same GPU has measured already."""
    same = ("commit", "gpu", "driver", "torch", "cuda", "cudnn", "triton", "device")
    try:
        content = json.loads(path.read_text())
        commit = machine["commit"]
        if commit is None or commit.endswith("-dirty"):
            return {}
        if any(content["machine"].get(key) != machine.get(key) for key in same):
            return {}
        return {name: cell for name, cell in content["cells"].items() if "why" not in cell}
    except (OSError, ValueError, KeyError, AttributeError):
        return {}


def folder_of(scale: Scale, environ: Mapping[str, str]) -> Path:
    """Where the results go; made if it is not there."""
    name = "rehearsal" if scale.rehearsal else torch.cuda.get_device_name(scale.device)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder = Path(environ.get("BLOCKDROP_GPU_BENCH_OUT") or RESULTS / slug)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def measure_cell(cell: Cell, left: float) -> dict:
    """A cell's result; with "why" if there is none, and "failed" if that is a fault."""
    started = time.monotonic()
    try:
        with limit(min(3 * cell.seconds, left)):
            result = cell.run()
    except OutOfTime:
        result = {"why": f"stopped after {time.monotonic() - started:.0f} s"}
    except UnavailableError as error:
        result = {"why": str(error)}
    except Exception as error:  # whatever it is, the other cells are worth their time
        traceback.print_exc()
        result = {"why": f"{type(error).__name__}: {error}", "failed": True}
    return result | {"took_seconds": round(time.monotonic() - started, 1)}


def main(environ: Mapping[str, str]) -> int:
    """Measure what the time is enough for.

    Returns:
        The exit status: 1 if a cell failed, 2 if there is no GPU; cells left out are no failure.
    """
    started = time.monotonic()
    budget = float(environ.get("BLOCKDROP_GPU_BENCH_SECONDS", DEFAULT_SECONDS))
    rehearsal = environ.get("BLOCKDROP_GPU_BENCH_DEVICE") == "cpu"
    if not rehearsal and not torch.cuda.is_available():
        print("gpu-bench: torch finds no GPU here", file=sys.stderr)
        return 2
    scale = rehearsal_scale() if rehearsal else full_scale()
    folder = folder_of(scale, environ)
    machine = machine_info(scale.device)
    machine["commit"] = machine["commit"] or environ.get("BLOCKDROP_COMMIT")
    done = earlier_cells(folder / "gpu.json", machine)
    content = {"machine": machine, "rehearsal": rehearsal, "cells": {}, "left_out": []}
    bench = Bench(scale)
    for cell in plan_cells(bench, folder):
        left = budget - (time.monotonic() - started)
        if cell.name in done:
            content["cells"][cell.name] = done[cell.name]
        elif left < cell.seconds:
            content["left_out"].append(cell.name)
        else:
            print(f"-- {cell.name} ({left:.0f} s left)", flush=True)
            content["cells"][cell.name] = measure_cell(cell, left)
        write(content, folder)
    print(f"\n{describe(content)}\nwritten: {folder}/gpu.json and gpu.txt")
    return int(any(result.get("failed") for result in content["cells"].values()))


if __name__ == "__main__":
    sys.exit(main(os.environ))
