"""``python -m benchmarks.gpu [bench | decide]``: a GPU's figures, the most valuable first.

`make gpu-bench` and `make gpu-decide` run this. It needs no network, and no package beyond what
blockdrop_fast imports. Each cell is a process of its own: one that fails, hangs or loses the GPU
loses no other. It begins none that its time would not do for, writes its files after every cell,
keeps the batch sizes that one was done with when its time was up, and goes on where an earlier run
of the same code on the same machine stopped.

    bench     the walk and gather against complete networks
    decide    crossover tables, and configurations of the Triton kernels, which engines go by
              afterwards, and what these change

    BLOCKDROP_GPU_BENCH_UNTIL     when its time is up, in seconds since the epoch; default: when
                                  it has run for DEFAULT_SECONDS
    BLOCKDROP_GPU_BENCH_OUT       folder of the results, default benchmarks/results/<GPU>
    BLOCKDROP_GPU_BENCH_DEVICE    "cpu" rehearses all of it with tiny networks: figures without
                                  meaning, marked as such
    BLOCKDROP_COMMIT              named in the results where there is no git to ask
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.gpu import bench, cells, report
from benchmarks.gpu.cells import Cell
from blockdrop_fast.executors import measured, proven
from blockdrop_fast.files import write_json, write_text
from blockdrop_fast.machine import machine_info
from blockdrop_fast.measure.contenders import SLOW_TO_BUILD

ROOT = Path(__file__).parents[2]
DEFAULT_SECONDS = 440
SOURCES = ("blockdrop_fast/**/*.py", "benchmarks/gpu/*.py", "csrc/**/*.h", "csrc/**/*.c*")


def code_hash() -> str:
    """Names the code that figures are of, whether git is there or not."""
    found = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()


def write(content: dict, folder: Path) -> None:
    """gpu.json and gpu.txt, each in one step."""
    write_json(folder / "gpu.json", content)
    write_text(folder / "gpu.txt", report.describe(content))


def earlier_cells(path: Path, machine: Mapping, code: str) -> dict[str, dict]:
    """What a run of the same code and versions on the same GPU has left, results or reasons."""
    same = ("gpu", "driver", "torch", "cuda", "cudnn", "triton", "device")
    try:
        content = json.loads(path.read_text())
        if content["code"] != code:
            return {}
        if any(content["machine"].get(key) != machine.get(key) for key in same):
            return {}
        return content["cells"]
    except (OSError, ValueError, KeyError, AttributeError):
        return {}


def measure_cell(cell: Cell, folder: Path, left: float, environ: Mapping[str, str]) -> dict:
    """A cell's result, without the contenders that took its process with them.

    Returns:
        With "why" if there is none, and "failed" if that is a fault; with "incomplete", which says
        what is missing, where the time was up before all of it was measured; with "dropped" if
        contenders are missing, and why.
    """
    started, dropped = time.monotonic(), {}
    while True:
        seconds = left - (time.monotonic() - started)
        limit = max(1.0, min(3 * cell.seconds, seconds))
        with tempfile.TemporaryDirectory() as scratch:
            result, who, why = _run(cell, folder, Path(scratch), list(dropped), limit, environ)
            part = Path(scratch) / "result"
            so_far = json.loads(part.read_text()) if part.exists() else None
        if result is not None:
            break
        seconds = left - (time.monotonic() - started)
        if seconds < 1:
            up = f"the time was up, at {who}" if who else "the time was up"
            result = so_far or {"why": up}
            break
        if who:
            dropped[who] = why
        # torch.compile has a round of its own: without it there is nothing new to measure.
        if not who or who in SLOW_TO_BUILD or seconds < cell.seconds:
            result = {"why": f"{who}: {why}" if who else why, "failed": True}
            break
        print(f"-- {cell.name}, again without {who} ({why})", flush=True)
    if dropped := dropped | result.get("dropped", {}):
        result["dropped"] = dropped
    return result | {"took_seconds": round(time.monotonic() - started, 1)}


def command_of(cell: Cell, folder: Path, scratch: Path, without: list[str]) -> list[str]:
    """What measures a cell and writes ``scratch / "result"``."""
    return [
        *(sys.executable, "-u", "-m", "benchmarks.gpu.cells", cell.name, str(folder)),
        *("--result", str(scratch / "result"), "--progress", str(scratch / "progress")),
        *("--without", *without),
    ]


def _run(
    cell: Cell,
    folder: Path,
    scratch: Path,
    without: list[str],
    seconds: float,
    environ: Mapping[str, str],
) -> tuple[dict | None, str, str]:
    """A cell's result; or None, the contender that it ended at, "" if at none, and how it ended."""
    command = command_of(cell, folder, scratch, without)
    variables = {**os.environ, **environ, **cell.environ}
    # A session of its own: compilers have processes, too.
    process = subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True)
    try:
        process.wait(seconds)
        how = f"its process ended with status {process.returncode}"
    except subprocess.TimeoutExpired:
        how = f"stopped after {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if (scratch / "result").exists() and process.returncode == 0:
        return json.loads((scratch / "result").read_text()), "", ""
    progress = scratch / "progress"
    who, _, why = (progress.read_text() if progress.exists() else "").partition("\n")
    return None, who, why or how


def main(arguments: list[str], environ: Mapping[str, str] = os.environ) -> int:
    """Measure what the time is enough for.

    Returns:
        The exit status: 1 if a cell or a contender failed, 2 if there is no GPU or no such stage;
        cells left out are no failure.
    """
    stage = arguments[0] if arguments else "bench"
    if stage not in cells.STAGES or len(arguments) > 1:
        print(f"gpu-bench: expected one of {', '.join(cells.STAGES)}", file=sys.stderr)
        return 2
    scale = bench.scale_here(environ)
    if not scale.rehearsal and not torch.cuda.is_available():
        print("gpu-bench: torch finds no GPU here", file=sys.stderr)
        return 2
    # Of the clock, as what is imported above may have taken long.
    until = float(environ.get("BLOCKDROP_GPU_BENCH_UNTIL") or time.time() + DEFAULT_SECONDS)
    folder = bench.folder_of(scale, environ)
    machine, code = machine_info(scale.device), code_hash()
    machine["commit"] = machine["commit"] or environ.get("BLOCKDROP_COMMIT")
    proof = None if scale.rehearsal else proven.load(scale.device)
    content = {
        "machine": machine,
        "code": code,
        "rehearsal": scale.rehearsal,
        "checked": sorted(proof.strategies) if proof else [],
        "check": proof.reason if proof else "",
        "cells": earlier_cells(folder / "gpu.json", machine, code),
        "left_out": [],
    }
    for cell in cells.STAGES[stage]:
        left = until - time.time()
        before = content["cells"].get(cell.name, {"why": "not yet measured"})
        if not {"why", "incomplete"} & before.keys():
            continue
        if left < cell.seconds:
            content["left_out"].append(cell.name)
        else:
            print(f"-- {cell.name} ({left:.0f} s left)", flush=True)
            result = measure_cell(cell, folder, left, environ)
            # Something is better than nothing.
            if "why" not in result or "incomplete" not in before:
                content["cells"][cell.name] = result
            if left - result["took_seconds"] < 1 and {"why", "incomplete"} & result.keys():
                content["left_out"].append(cell.name)
        write(content, folder)
    write(content, folder)
    record = measured.user_file(proven.FILE_NAME)
    if proof and proof.strategies and record.exists():
        shutil.copy(record, folder / proven.FILE_NAME)
    print(f"\n{report.describe(content)}\nwritten: {folder}/gpu.json and gpu.txt")
    faults = ("failed", "dropped")
    return int(any(fault in result for result in content["cells"].values() for fault in faults))


if __name__ == "__main__":
    # As an exception, so that the cell's processes end as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main(sys.argv[1:]))
