"""`make gpu-bench` rehearsed on a CPU with tiny networks, and how its figures are read."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import blockdrop_fast as bdf
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import bench, cells, report
from blockdrop_fast.machine import machine_info
from blockdrop_fast.measure import baselines, contenders, tolerance

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_compiler(monkeypatch):
    """torch.compile takes half a minute for these networks: eager stands in for it."""
    eager = ("baseline", lambda workload, _: baselines.torch_eager(workload.folded))
    monkeypatch.setitem(contenders.CONTENDERS, "compile", eager)


@pytest.fixture
def in_process(monkeypatch):
    """Cells are run here: a process each takes seconds to begin."""

    def run(cell, folder, scratch, without, seconds, environ):
        setting = bench.Bench(bench.scale_here(environ), folder, frozenset(without))
        return cells.run(cell, setting), "", ""

    monkeypatch.setattr(gpu, "_run", run)


def run(folder: Path, stage: str = "bench", seconds: float = 1000) -> tuple[int, dict, str]:
    environ = {"BLOCKDROP_GPU_BENCH_DEVICE": "cpu", "BLOCKDROP_GPU_BENCH_OUT": str(folder)}
    status = gpu.main([stage], environ | {"BLOCKDROP_GPU_BENCH_UNTIL": str(time.time() + seconds)})
    return status, json.loads((folder / "gpu.json").read_text()), (folder / "gpu.txt").read_text()


def stage(monkeypatch, *some: cells.Cell) -> None:
    monkeypatch.setattr(cells, "STAGES", {"bench": some})


@pytest.mark.slow
def test_rehearsal(tmp_path, no_compiler, in_process, capsys):
    for name in cells.STAGES:
        status, content, text = run(tmp_path, name)
        assert status == 0
    assert content["rehearsal"]
    assert content["left_out"] == []
    assert content["machine"]["torch"] == torch.__version__
    found = content["cells"]
    assert list(found) == [cell.name for cell in (*cells.BENCH, *cells.DECIDE)]
    # What only a GPU can show says so, and the rest was measured.
    without = {name for name, cell in found.items() if "why" in cell}
    only_on_gpu = {"cifar waits", "imagenet waits", "imagenet memory", "imagenet tune"}
    assert without == only_on_gpu | {"imagenet tune, the rest"}
    rows = {row["contender"]: row for row in found["imagenet published 64"]["rows"]}
    assert set(rows) >= {"eager", "authors", "dense", "gather-decides", "gather-all"}
    assert all(len(row["samples"]) == 2 for row in rows.values())
    assert "needs a GPU" in found["imagenet published 64"]["unavailable"]["cudnn-graph"]
    assert found["imagenet published 64"]["engines"]["gather counts"].startswith(
        "gather, asked for"
    )
    assert "engine gather counts: gather, asked for" in text
    assert found[report.WITH_CLUSTERS]["batches"] == [1, 2, 4, 16, 64]
    assert found["imagenet crossover"]["cells"]
    assert (tmp_path / "crossover.json").exists()
    claims = [line for line in text.splitlines() if line.startswith("rehearsal, no claim: ")]
    assert len(claims) == len(report.requirements({}))
    assert any("all kept, batch 64" in line and "not measured" not in line for line in claims)
    assert text in capsys.readouterr().out


def test_a_cell_is_a_process(tmp_path, monkeypatch):
    stage(monkeypatch, cells.ALL["cifar published 1"])
    status, content, text = run(tmp_path)
    assert status == 0, text
    (cell,) = content["cells"].values()
    assert {"eager", "authors", "gather-decides"} <= {row["contender"] for row in cell["rows"]}
    assert "REHEARSAL" in text


def test_clusters_are_off_in_the_process_of_their_cell(tmp_path, monkeypatch):
    assert cells.ALL[report.WITHOUT_CLUSTERS].environ == {"BLOCKDROP_CLUSTERS": "0"}
    assert not cells.ALL[report.WITH_CLUSTERS].environ
    code = "import json, os, sys; open(sys.argv[1], 'w').write(json.dumps({'is': os.environ[%r]}))"
    pretend(monkeypatch, code % "BLOCKDROP_CLUSTERS")
    result = gpu.measure_cell(cells.ALL[report.WITHOUT_CLUSTERS], tmp_path, 60, {})
    assert result["is"] == "0"


# ------------------------------------------------------------------ processes that fail


def pretend(monkeypatch, code: str) -> None:
    """Cells run this instead; its arguments: result file, progress file, contenders left out."""

    def command(cell, folder, scratch, without):
        files = (str(scratch / "result"), str(scratch / "progress"))
        return [sys.executable, "-c", code, *files, *without]

    monkeypatch.setattr(gpu, "command_of", command)


FAILS_AT = """
import sys, time
result, progress, *without = sys.argv[1:]
for name in ("eager", "{name}"):
    if name not in without:
        open(progress, "w").write(name)
        if name == "{name}":
            {how}
open(result, "w").write('{{"rows": 1}}')
"""


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("sys.exit(3)", "its process ended with status 3"),
        ("import os; os.abort()", "its process ended with status -6"),
        ("open(progress, 'a').write('\\nillegal access'); sys.exit(1)", "illegal access"),
        ("time.sleep(60)", "stopped after 1 s"),
    ],
)
def test_a_contender_that_takes_its_process_with_it_is_dropped(tmp_path, monkeypatch, how, why):
    pretend(monkeypatch, FAILS_AT.format(name="walk-all", how=how))
    result = gpu.measure_cell(cells.Cell("a", 0.2, None), tmp_path, 60, {})
    assert result["rows"] == 1
    assert result["dropped"] == {"walk-all": why}


def test_without_the_compiler_its_round_is_not_measured_again(tmp_path, monkeypatch):
    pretend(monkeypatch, FAILS_AT.format(name="compile", how="sys.exit(1)"))
    result = gpu.measure_cell(cells.Cell("a", 1, None), tmp_path, 60, {})
    assert result["failed"]
    assert result["why"] == "compile: its process ended with status 1"


@pytest.mark.parametrize("measured", [True, False])
def test_what_was_measured_when_the_time_is_up_is_kept(tmp_path, monkeypatch, measured):
    part = {"rows": [1], "incomplete": "batch 64 left"}
    code = f"import sys, time; {measured} and open(sys.argv[1], 'w').write({json.dumps(part)!r}); "
    pretend(monkeypatch, code + "open(sys.argv[2], 'w').write('eager'); time.sleep(60)")
    result = gpu.measure_cell(cells.Cell("a", 60, None), tmp_path, 2, {})
    assert result.pop("took_seconds") < 10
    # The contender has not failed, nor has the cell: both may only have been short of time.
    assert result == (part if measured else {"why": "the time was up, at eager"})


def test_goes_on_with_what_is_incomplete(tmp_path, monkeypatch, in_process, capsys):
    part = {"rows": [], "unavailable": {}, "engines": {}, "incomplete": "batch 64 left"}
    stage(monkeypatch, *make_cells({"a": part}))
    assert run(tmp_path)[0] == 0
    stage(monkeypatch, *make_cells({"a": RuntimeError("worse")}))
    assert "the time was up: batch 64 left" in run(tmp_path)[2]
    stage(monkeypatch, *make_cells({"a": {"batch": 3}}))
    assert run(tmp_path)[1]["cells"]["a"]["batch"] == 3


def test_batch_sizes_are_saved_one_by_one(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(bench, "write_json", lambda _, found: saved.append({**found}))
    scale = bench.scale_here({"BLOCKDROP_GPU_BENCH_DEVICE": "cpu"})
    setting = bench.Bench(scale, tmp_path, result=tmp_path / "result")
    result = setting.times("cifar", (1, 64, 1024), "published", ("eager",))
    assert [one["incomplete"] for one in saved] == ["batch 4, 64 left", "batch 64 left"]
    assert {row["batch"] for row in result["rows"]} == {1, 4, 64}
    assert "incomplete" not in result


def test_what_hangs_is_stopped_with_all_its_processes(tmp_path, monkeypatch):
    marker = tmp_path / "still there"
    child = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    pretend(monkeypatch, code)
    result = gpu.measure_cell(cells.Cell("a", 0.1, None), tmp_path, 60, {})
    assert result["why"] == "stopped after 1 s"
    time.sleep(3)
    assert not marker.exists()


def test_a_failed_cell_does_not_stop_the_others(tmp_path, monkeypatch, in_process, capsys):
    wrong = tolerance.WrongLogitsError("walk: logits are off")
    gone = baselines.UnavailableError("not here")
    stage(monkeypatch, *make_cells({"a": wrong, "b": gone, "c": {"batch": 3}}))
    status, content, text = run(tmp_path)
    assert status == 1
    found = content["cells"]
    assert found["a"]["why"] == "WrongLogitsError: walk: logits are off"
    assert found["a"]["failed"]
    assert found["b"]["why"] == "not here"
    assert found["c"]["batch"] == 3
    assert "logits are off" in text


def make_cells(outcomes: dict[str, object]) -> list[cells.Cell]:
    def run(outcome):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return [cells.Cell(name, 1, lambda _, o=outcome: run(o)) for name, outcome in outcomes.items()]


def test_a_contender_that_raises_is_dropped(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no kernel image\nand much more")

    monkeypatch.setitem(contenders.CONTENDERS, "gather-decides", ("decides", broken))
    setting = bench.Bench(bench.scale_here({"BLOCKDROP_GPU_BENCH_DEVICE": "cpu"}), tmp_path)
    cell = cells._times(1, "cifar", (1, 1024), ("eager", "gather-decides", "gather-all"))
    result = cells.run(cell, setting)
    assert result["dropped"] == {"gather-decides": "RuntimeError: no kernel image"}
    timed = [(row["batch"], row["contender"]) for row in result["rows"]]
    assert timed == [(1, "eager"), (1, "gather-all"), (64, "eager"), (64, "gather-all")]


def test_an_engine_that_fell_back_to_plain_pytorch_is_dropped(tmp_path, capsys):
    setting = bench.Bench(bench.scale_here({"BLOCKDROP_GPU_BENCH_DEVICE": "cpu"}), tmp_path)
    with setting.attempt("gather-all"):
        warnings.warn("something else", RuntimeWarning, stacklevel=1)
        warnings.warn("strategy 'gather'; by plain PyTorch since ...", RuntimeWarning, stacklevel=1)
    assert "by plain PyTorch" in setting.dropped["gather-all"]


def test_a_contender_that_loses_the_device_ends_the_process(tmp_path, monkeypatch, capsys):
    progress = tmp_path / "progress"
    scale = bench.scale_here({"BLOCKDROP_GPU_BENCH_DEVICE": "cpu"})
    setting = bench.Bench(scale, tmp_path, progress=progress)
    with setting.attempt("eager"):
        assert progress.read_text() == "eager"
    assert progress.read_text() == ""
    monkeypatch.setattr(setting, "_is_lost", lambda: True)

    def lose(_):
        with setting.attempt("walk-all"):
            raise RuntimeError("illegal memory access")

    with pytest.raises(bench.LostDeviceError):
        cells.run(cells.Cell("a", 1, lose), setting)
    assert progress.read_text() == "walk-all\nRuntimeError: illegal memory access"


# ------------------------------------------------------------------ time, and going on


def test_without_time_everything_is_left_out(tmp_path):
    status, content, text = run(tmp_path, seconds=1)
    assert status == 0
    assert content["cells"] == {}
    names = [cell.name for cell in cells.BENCH]
    assert content["left_out"] == names
    assert f"left out, run again to go on: {names[0]}" in text


def test_goes_on_where_it_stopped(tmp_path, monkeypatch, in_process, capsys):
    monkeypatch.setattr(gpu, "code_hash", lambda: "abc")
    stage(monkeypatch, *make_cells({"a": {"batch": 1}, "b": RuntimeError("once")}))
    assert run(tmp_path)[0] == 1
    stage(monkeypatch, *make_cells({"a": RuntimeError("measured again"), "b": {"batch": 2}}))
    status, content, _ = run(tmp_path)
    assert status == 0
    assert [cell["batch"] for cell in content["cells"].values()] == [1, 2]
    # Other code, and another GPU, are measured afresh.
    monkeypatch.setattr(gpu, "code_hash", lambda: "def")
    assert "RuntimeError: measured again" in run(tmp_path)[1]["cells"]["a"]["why"]
    machine = machine_info() | {"gpu": "other"}
    monkeypatch.setattr(gpu, "machine_info", lambda *_: machine)
    assert "RuntimeError: measured again" in run(tmp_path)[1]["cells"]["a"]["why"]


def test_code_is_named_by_its_content():
    assert gpu.code_hash() == gpu.code_hash()
    assert len(gpu.code_hash()) == 64


def test_convolutions_are_tuned_in_the_order_of_their_arithmetic(tmp_path):
    shapes = bench._shapes(bdf.resnet_cifar(14), torch.randn(1, 3, 32, 32))
    assert [(one.c_in, one.c_out, one.stride, one.height) for one in shapes] == [
        (16, 16, 1, 32), (32, 32, 1, 16), (64, 64, 1, 8), (16, 32, 2, 32), (32, 64, 2, 16)
    ]  # fmt: skip


# ------------------------------------------------------------------ what has to be shown


def row(contender: str, kind: str, seconds: float, **more: object) -> dict:
    values = {
        "network": "resnet110", "batch": 1, "contender": contender, "kind": kind,
        "seconds": seconds, "host_seconds": None, "images_per_second": 1 / seconds, "flops": 1.0,
        "speedup": 1.0, "flop_bound": 2.0, "share_of_bound": 1.0, "share_of_own_bound": None,
        "block_usage": None, "policies": None, "samples": [seconds], "host_samples": [],
    }  # fmt: skip
    return values | more


def values(results: dict) -> dict[str, report.Requirement]:
    return {f"{one.strategy}, {one.text}": one for one in report.requirements(results)}


def test_requirements_read_the_round_with_torch_compile():
    fast = row("walk-decides", "decides", 50e-6, speedup=9.0, host_seconds=1e-4)
    base, compiled = row("cudnn-graph", "baseline", 4e-4), row("compile", "baseline", 4e-4)
    slower = fast | {"speedup": 3.0, "seconds": 70e-6}
    results = {"cifar published 1": {"rows": [base, fast], "unavailable": {}}}
    device = values(results)["walk, ResNet-110, one image, device time"]
    assert str(device).startswith("met ")
    assert device.value == pytest.approx(50)
    assert device.remark == "torch.compile not in this round"
    rounds = {"rows": [base, slower, compiled], "unavailable": {}}
    results["cifar published 1 compiled"] = rounds
    device = values(results)["walk, ResNet-110, one image, device time"]
    assert (device.value, device.remark) == (pytest.approx(70), "")
    # Where torch.compile failed, its round says so as well.
    results["cifar published 1 compiled"] = {"rows": [base, slower], "unavailable": {}}
    device = values(results)["walk, ResNet-110, one image, device time"]
    assert device.remark == "torch.compile not in this round"


def test_requirements_say_met_missed_or_why_not():
    gather = row("gather-decides", "decides", 1e-3, host_seconds=2e-3, speedup=1.16)
    kept = row("gather-all", "all_kept", 1e-3, speedup=0.9)
    base = row("eager", "baseline", 2e-3, host_seconds=3e-3)
    results = {
        "imagenet published 1": {"rows": [base, gather, kept], "unavailable": {}},
        "imagenet published 64": {"rows": [base, gather], "unavailable": {"gather-all": "odd"}},
        "imagenet published 8": {
            "rows": [base],
            "unavailable": {},
            "dropped": {"gather-all": "off"},
        },
        "imagenet memory": {"gather": {"reserved": 12}, "complete, eager": {"reserved": 10}},
        "imagenet crossover": {
            "cells": [{"batch": 1, "keep": 1.0, "seconds": {"dense": 1.0, "auto": 1.1}}]
        },
        "imagenet waits": {
            "gather-decides": {"waits": True, "hidden": 2},
            "gather-universal": {"waits": True, "hidden": 0},
        },
        "cifar waits": {"why": "broken", "failed": True},
        report.WITH_CLUSTERS: {"rows": [row("walk-decides", "decides", 3e-5)]},
        report.WITHOUT_CLUSTERS: {"rows": [row("walk-decides", "decides", 2e-5)]},
    }
    lines = [str(one) for one in report.requirements(results)]

    def says(start: str, text: str, end: str = "") -> bool:
        return any(
            line.startswith(start) and text in line and line.rstrip(")").endswith(end)
            for line in lines
        )

    assert says("met", "ten policies, batch 64, over the fastest complete network: 1.16x")
    assert says("met", "one image, host time, over the fastest complete network: 1.5x")
    assert says("missed", "all kept, batch 1, time over the fastest complete network's: 1.11")
    assert says("not measured", "all kept, batch 64", "odd")
    assert says("not measured", "all kept, batch 8", "off")
    assert says("not measured", "ResNet-101, all kept, batch 256", "left out")
    assert says("met", "peak reserved memory over the complete network's: 1.2")
    assert says(
        "missed", "ResNet-101, worst cell of the crossover map, time of auto over dense: 1.1"
    )
    # That it waits once is as it should be; that torch knows of more is not.
    assert says("missed", "gather-decides, waits that torch knows of in a call: 2")
    assert not any("gather-decides, waits for the device" in line for line in lines)
    assert says("missed", "gather-universal, waits for the device in a call: 1")
    assert says("not measured", "walk-decides, waits for the device in a call", "broken")
    assert says("missed", "batch 1, time by clusters over the time without: 1.5")
    assert says("not measured", "batch 8, time by clusters", "left out")


def test_figures_are_marked_where_no_check_has_passed(monkeypatch, tmp_path):
    content = {
        "machine": {"gpu": "NVIDIA H200"}, "rehearsal": False, "checked": ["walk"],
        "check": "walk passed (a file)", "cells": {"imagenet memory": {"why": "no", "batch": 1}},
        "left_out": [],
    }  # fmt: skip
    text = report.describe(content)
    assert "UNCHECKED figures of gather: walk passed (a file)." in text
    lines = [line for line in text.splitlines() if "not measured" in line]
    assert all(line.startswith("unchecked: ") == (" gather, " in line) for line in lines)
    assert any(line.startswith("not measured  walk, ") for line in lines)
    assert "unchecked" not in report.describe(content | {"checked": ["gather", "walk"]}).lower()


# ------------------------------------------------------------------ where there is no GPU


def test_there_has_to_be_a_gpu_and_a_stage(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([], {}) == 2
    assert "gpu-bench: torch finds no GPU here" in capsys.readouterr().err
    assert gpu.main(["everything"], {}) == 2
    assert "gpu-bench: expected one of bench, decide" in capsys.readouterr().err


@pytest.mark.slow
def test_needs_nothing_but_what_a_bare_machine_has():
    """The command line's parser, for one, is not installed there."""
    code = "import sys; sys.modules['tyro'] = None; import benchmarks.gpu.__main__"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
