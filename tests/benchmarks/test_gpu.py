"""`make gpu-bench`, rehearsed on a CPU with tiny networks, and how its figures are read."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from blockdrop_fast.machine import machine_info
from blockdrop_fast.measure import baselines, contenders, tolerance

ROOT = Path(__file__).resolve().parents[2]


def _load_gpu():
    specification = importlib.util.spec_from_file_location(
        "benchmarks_gpu", ROOT / "benchmarks" / "gpu.py"
    )
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look themselves up there
    specification.loader.exec_module(module)
    return module


gpu = _load_gpu()


@pytest.fixture
def no_compiler(monkeypatch):
    """torch.compile takes half a minute for these networks: eager stands in for it."""
    eager = ("baseline", lambda workload, _: baselines.torch_eager(workload.folded))
    monkeypatch.setitem(contenders.CONTENDERS, "compile", eager)


def run(folder: Path, **more: str) -> tuple[int, dict, str]:
    environ = {"BLOCKDROP_GPU_BENCH_DEVICE": "cpu", "BLOCKDROP_GPU_BENCH_OUT": str(folder)}
    status = gpu.main(environ | more)
    return status, json.loads((folder / "gpu.json").read_text()), (folder / "gpu.txt").read_text()


@pytest.mark.slow
def test_rehearsal(tmp_path, no_compiler, capsys):
    status, content, text = run(tmp_path, BLOCKDROP_GPU_BENCH_SECONDS="1000")
    assert status == 0
    assert content["rehearsal"]
    assert content["left_out"] == []
    assert content["machine"]["torch"] == torch.__version__
    cells = content["cells"]
    assert list(cells) == [cell.name for cell in gpu.plan_cells(None, tmp_path)]
    # What only a GPU can show says so, and the rest was measured.
    without = {name for name, cell in cells.items() if "why" in cell}
    assert without == {"cifar waits", "imagenet waits", "imagenet memory"}
    rows = {row["contender"]: row for row in cells["imagenet published 64"]["rows"]}
    assert set(rows) >= {"eager", "authors", "dense", "gather-decides", "gather-all"}
    assert all(len(row["samples"]) == 2 for row in rows.values())
    assert "needs a GPU" in cells["imagenet published 64"]["unavailable"]["cudnn-graph"]
    assert cells["imagenet published 64"]["engines"]["gather counts"].startswith(
        "gather, asked for"
    )
    assert "engine gather counts: gather, asked for" in text
    assert cells["imagenet crossover"]["cells"]
    assert (tmp_path / "crossover.json").exists()
    claims = [line for line in text.splitlines() if line.startswith("rehearsal, no claim: ")]
    assert len(claims) == len(gpu.requirements({}))
    assert sum("not measured" in line for line in claims) >= 4
    assert any("all kept, batch 64" in line and "not measured" not in line for line in claims)
    assert text in capsys.readouterr().out


def test_without_time_everything_is_left_out(tmp_path):
    status, content, text = run(tmp_path, BLOCKDROP_GPU_BENCH_SECONDS="1")
    assert status == 0
    assert content["cells"] == {}
    names = [cell.name for cell in gpu.plan_cells(None, tmp_path)]
    assert content["left_out"] == names
    assert f"left out, run again to go on: {names[0]}" in text


def make_cells(names: dict[str, object]) -> list:
    def run(outcome):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return [gpu.Cell(name, 1, lambda o=outcome: run(o)) for name, outcome in names.items()]


def test_a_failed_cell_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    wrong = tolerance.WrongLogitsError("walk: logits are off")
    gone = baselines.UnavailableError("not here")
    outcomes = {"a": wrong, "b": gone, "c": gpu.OutOfTime(), "d": {"batch": 3}}
    monkeypatch.setattr(gpu, "plan_cells", lambda *_: make_cells(outcomes))
    status, content, text = run(tmp_path)
    assert status == 1
    cells = content["cells"]
    assert cells["a"]["why"] == "WrongLogitsError: walk: logits are off"
    assert cells["a"]["failed"]
    assert cells["b"]["why"] == "not here"
    assert cells["c"]["why"].startswith("stopped after")
    assert cells["d"]["batch"] == 3
    assert "logits are off" in text


def test_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    info = machine_info()
    monkeypatch.setattr(gpu, "machine_info", lambda *_: info | {"commit": "abc"})
    first = {"a": {"batch": 1}, "b": RuntimeError("once")}
    monkeypatch.setattr(gpu, "plan_cells", lambda *_: make_cells(first))
    assert run(tmp_path)[0] == 1
    again = {"a": RuntimeError("measured again"), "b": {"batch": 2}}
    monkeypatch.setattr(gpu, "plan_cells", lambda *_: make_cells(again))
    status, content, _ = run(tmp_path)
    assert status == 0
    assert [cell["batch"] for cell in content["cells"].values()] == [1, 2]
    # Another commit is measured afresh.
    monkeypatch.setattr(gpu, "machine_info", lambda *_: info | {"commit": "def"})
    assert "RuntimeError: measured again" in run(tmp_path)[1]["cells"]["a"]["why"]


def test_limit_interrupts_what_catches_exceptions():
    def stubborn():
        while True:
            try:
                time.sleep(10)
            except Exception:  # as compilers do
                continue

    started = time.monotonic()
    with pytest.raises(gpu.OutOfTime), gpu.limit(0.2):
        stubborn()
    assert time.monotonic() - started < 5


def row(contender: str, kind: str, seconds: float, **more: object) -> dict:
    values = {
        "network": "resnet110", "batch": 1, "contender": contender, "kind": kind,
        "seconds": seconds, "host_seconds": None, "images_per_second": 1 / seconds, "flops": 1.0,
        "speedup": 1.0, "flop_bound": 2.0, "share_of_bound": 1.0, "share_of_own_bound": None,
        "block_usage": None, "policies": None, "samples": [seconds], "host_samples": [],
    }  # fmt: skip
    return values | more


def test_requirements_read_the_round_with_torch_compile():
    fast = row("walk-decides", "decides", 50e-6, speedup=9.0, host_seconds=1e-4)
    base = row("cudnn-graph", "baseline", 4e-4)
    slower = fast | {"speedup": 3.0, "seconds": 70e-6}
    results = {"cifar published 1": {"rows": [base, fast], "unavailable": {}}}
    found = {one.text: one for one in gpu.requirements(results)}
    device = found["walk, ResNet-110, one image, device time"]
    assert str(device).startswith("met ")
    assert device.value == pytest.approx(50)
    assert device.remark == "torch.compile not in this round"
    results["cifar published 1 compiled"] = {"rows": [base, slower], "unavailable": {}}
    found = {one.text: one for one in gpu.requirements(results)}
    device = found["walk, ResNet-110, one image, device time"]
    assert (device.value, device.remark) == (pytest.approx(70), "")
    paper = next(one for text, one in found.items() if "the paper's 10.9 ms" in text)
    assert paper.value == pytest.approx(109)


def test_requirements_say_met_missed_or_why_not():
    gather = row("gather-decides", "decides", 1e-3, host_seconds=2e-3, speedup=1.16)
    kept = row("gather-all", "all_kept", 1e-3, speedup=0.9)
    base = row("eager", "baseline", 2e-3, host_seconds=3e-3)
    results = {
        "imagenet published 1": {"rows": [base, gather, kept], "unavailable": {}},
        "imagenet published 64": {"rows": [base, gather], "unavailable": {"gather-all": "odd"}},
        "imagenet memory": {"gather": {"reserved": 12}, "complete, eager": {"reserved": 10}},
        "imagenet crossover": {
            "cells": [{"batch": 1, "keep": 1.0, "seconds": {"dense": 1.0, "auto": 1.1}}]
        },
        "imagenet waits": {"gather-decides": True, "gather-universal": "no kernels"},
        "cifar waits": {"why": "broken", "failed": True},
    }
    lines = "\n".join(str(one) for one in gpu.requirements(results))

    def says(start: str, text: str, end: str = "") -> bool:
        return any(
            line.startswith(start) and text in line and line.rstrip(")").endswith(end)
            for line in lines.splitlines()
        )

    assert says("met", "ten policies, batch 64, over the fastest complete network: 1.16x")
    assert says("met", "one image, host time, over the fastest complete network: 1.5x")
    assert says("missed", "all kept, batch 1, time over the fastest complete network's: 1.11")
    assert says("not measured", "all kept, batch 64", "odd")
    assert says("not measured", "all kept, batch 8", "left out")
    assert says("met", "peak reserved memory over the complete network's: 1.2")
    assert says("missed", "worst cell of the crossover map, time of auto over dense: 1.1")
    assert says("met", "gather, waits for the device in a call (the copy of K counts): 1")
    assert says("not measured", "launch='universal'", "no kernels")
    assert says("not measured", "walk, waits in a call", "broken")


@pytest.mark.slow
def test_needs_nothing_but_what_a_bare_machine_has():
    """The command line's parser, for one, is not installed there."""
    code = (
        "import sys; sys.modules['tyro'] = None; import benchmarks.gpu as g; sys.exit(g.main({}))"
    )
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "gpu-bench: torch finds no GPU here" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", ["gpu-build", "gpu-check", "gpu-bench"])
def test_scripts_say_that_there_is_no_gpu(script):
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    done = subprocess.run(
        [ROOT / ".ci" / script], env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "torch finds no GPU here" in done.stderr
