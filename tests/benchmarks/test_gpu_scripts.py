"""The scripts behind `make gpu`, with stand-ins for Python and compute-sanitizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.gpu import cells

ROOT = Path(__file__).resolve().parents[2]
# Notes how it was called, and what time it has; fails with STATUS where that contains FAILS, and
# takes SLOW seconds where it contains "pytest".
PYTHON = """#!/bin/bash
echo "${BLOCKDROP_CLUSTERS:-1} $*" >> "$LOG"
now=$(date +%s)
case "$*" in
  *gpu_extension.py) echo "$ARCH" ;;
  *pytest*)
    echo "$((${BLOCKDROP_GPU_TESTS_UNTIL:-$now} - now))" >> "$LOG.times"
    sleep "${SLOW:-0}" ;;
  *benchmarks.gpu*) echo "$((BLOCKDROP_GPU_BENCH_UNTIL - now))" >> "$LOG.times" ;;
esac
case "$*" in
  *"$FAILS"*) exit "${STATUS:-1}" ;;
esac
"""
SANITIZER = """#!/bin/bash
echo "${BLOCKDROP_CLUSTERS:-1} sanitizer $*" >> "$LOG"
case "${BLOCKDROP_CLUSTERS:-1} $*" in
  *"$SANITIZER_FAILS"*pytest*) exit "${STATUS:-1}" ;;
esac
"""
RECORD = "1 - "


@dataclass
class Done:
    status: int
    output: str
    calls: list[str]
    times: list[int]

    @property
    def record(self) -> list[str]:
        """Whose tests were written down as passed."""
        (call,) = [call for call in self.calls if call.startswith(RECORD)]
        return call.removeprefix(RECORD).split()


@pytest.fixture
def check(tmp_path):
    """Runs gpu-check, or another command; the stand-ins fail as told."""
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"

    def run(command=(ROOT / ".ci" / "gpu-check",), **environ: str) -> Done:
        log.write_text("")
        times = tmp_path / "log.times"
        times.write_text("")
        variables = {
            **os.environ, "PYTHON": str(tmp_path / "python"), "LOG": str(log), "ARCH": "9.0a",
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "FAILS": "nothing at all", "SANITIZER_FAILS": "nothing at all", **environ,
        }  # fmt: skip
        done = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60
        )
        # The record's "- walk" has nothing behind the dash if nothing passed.
        calls = [line if line != "1 -" else RECORD for line in log.read_text().splitlines()]
        built = next(i for i, call in enumerate(calls) if "gpu_extension.py" in call)
        seconds = [int(line) for line in times.read_text().split()]
        return Done(done.returncode, done.stdout + done.stderr, calls[built:], seconds)

    return run


def test_the_simplest_first_and_the_record_last(check):
    done = check()
    assert done.status == 0, done.output
    steps = [
        "setup.py", "small_walk or small_plan", "test_walk_half.py", "test_gather.py",
        "--tool memcheck", RECORD,
    ]  # fmt: skip
    found = [next(i for i, call in enumerate(done.calls) if step in call) for step in steps]
    assert found == sorted(found)
    assert done.record == ["walk", "gather"]
    assert "passed: walk gather" in done.output
    for tool in ("sanitizer --error-exitcode", "0 sanitizer --tool racecheck"):
        assert any(tool in call for call in done.calls)
    files = {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert all(any(name in call for call in done.calls) for name in files)


@pytest.mark.parametrize(
    ("fails", "passed"),
    [("test_gather.py", ["walk"]), ("test_walk_half.py", ["gather"]), ("tests/gpu", [])],
)
def test_only_what_passes_is_written_down(check, fails, passed):
    done = check(FAILS=fails)
    assert done.status == 1
    assert done.record == passed


def test_a_first_failure_is_looked_at_without_clusters(check):
    done = check(FAILS="small_walk")
    assert [call[0] for call in done.calls if "small_walk" in call] == ["1", "0"]
    assert "without clusters they pass" not in done.output
    assert done.record == ["gather"]


def test_tests_that_hang_have_not_passed(check):
    done = check(FAILS="test_walk_half.py", STATUS="124")
    assert done.status == 1
    assert done.record == ["gather"]


def test_findings_of_the_sanitizer_count(check):
    done = check(SANITIZER_FAILS="memcheck")
    assert done.status == 1
    assert "memcheck: FINDINGS" in done.output
    assert done.record == []


def test_what_fits_is_not_compiled(check):
    assert any("setup.py" in call for call in check().calls)
    done = check(ARCH="")
    assert done.record == ["walk", "gather"]
    assert not any("setup.py" in call for call in done.calls)


def test_without_cuda_kernels_nothing_has_passed(check):
    done = check(FAILS="no CUDA kernels")
    assert done.status == 1
    assert "gpu-check: no extension" in done.output
    assert not any("pytest" in call for call in done.calls)


def test_what_the_time_was_not_enough_for_has_neither_passed_nor_failed(check):
    done = check(FAILS="test_gather.py", STATUS="75")
    assert done.status == 0
    assert "run again to go on" in done.output
    assert done.record == ["walk"]


LATE = 60  # seconds that a busy machine may take for what takes none


def test_steps_share_the_time(check):
    """Until when tests may begin, in seconds from then: the first kernels, the walk, gather."""
    first, walk, gather = check(BLOCKDROP_GPU_SECONDS="615").times
    assert 45 - LATE <= first <= 45
    assert 300 - LATE <= walk <= 300  # half of 600
    assert 510 - LATE <= gather <= 510
    # What one leaves is the next one's.
    first, walk, gather = check(BLOCKDROP_GPU_SECONDS="615", SLOW="2").times
    assert 298 - LATE <= walk <= 298
    assert 506 - LATE <= gather <= 506


def test_all_of_it_in_one_time(check):
    done = check(command=("make", "gpu", "MINUTES=11"))
    assert done.status == 0, done.output
    _, walk, gather, bench, decide = done.times
    checked = 660 * 45 // 100 - 15
    assert checked // 2 - LATE <= walk <= checked // 2
    assert checked * 85 // 100 - LATE <= gather <= checked * 85 // 100
    assert 660 * 80 // 100 - 20 - LATE <= bench <= 660 * 80 // 100 - 20
    assert 660 - 20 - LATE <= decide <= 660 - 20


@pytest.mark.parametrize("status", ["124", "137"])
def test_a_sanitizer_that_is_not_finished_is_no_failure(check, status):
    done = check(SANITIZER_FAILS="check", STATUS=status)
    assert done.status == 0
    assert "memcheck: not finished in its time" in done.output
    assert done.record == ["walk", "gather"]


def test_racecheck_with_clusters_does_not_count(check):
    done = check(SANITIZER_FAILS="1 --tool racecheck")
    assert done.status == 0, done.output
    assert "known for false reports, not counted: FINDINGS" in done.output
    assert done.record == ["walk", "gather"]
    assert check(SANITIZER_FAILS="0 --tool racecheck").record == []


def test_a_failed_check_costs_no_figures(check):
    done = check(command=("make", "gpu"), FAILS="test_walk_half.py")
    assert done.status != 0
    figures = [call for call in done.calls if "benchmarks.gpu" in call]
    assert figures == ["1 -u -m benchmarks.gpu", "1 -u -m benchmarks.gpu decide"]


@pytest.mark.slow
def test_the_walk_is_profiled_where_there_is_a_profiler(tmp_path):
    ncu = tmp_path / "ncu"
    ncu.write_text('#!/bin/bash\necho "$@"\nwhile [ "$1" != "$PYTHON" ]; do shift; done\n"$@"\n')
    ncu.chmod(0o755)
    environ = {
        **os.environ, "PYTHON": sys.executable, "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "BLOCKDROP_GPU_BENCH_DEVICE": "cpu", "BLOCKDROP_GPU_BENCH_OUT": str(tmp_path / "out"),
    }  # fmt: skip
    script = ROOT / ".ci" / "gpu-profile"
    done = subprocess.run([script], env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    text = (tmp_path / "out" / "ncu.txt").read_text()
    assert "--section=SchedulerStats" in text
    assert '{"launches": 2}' in text
    ncu.write_text("#!/bin/bash\necho ERR_NVGPUCTRPERM\nexit 1\n")
    done = subprocess.run([script], env=environ, capture_output=True, text=True, timeout=120)
    assert "ncu does not work here:\nERR_NVGPUCTRPERM" in done.stdout


@pytest.mark.slow
def test_figures_are_rehearsed_in_a_given_time(tmp_path):
    environ = {
        **os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
        "BLOCKDROP_GPU_BENCH_DEVICE": "cpu", "BLOCKDROP_GPU_BENCH_OUT": str(tmp_path),
        "BLOCKDROP_GPU_SECONDS": "90",
    }  # fmt: skip
    started = time.monotonic()
    done = subprocess.run(
        [ROOT / ".ci" / "gpu-bench"], env=environ, capture_output=True, text=True, timeout=150
    )
    # Files are complete even if it has to be stopped, as where the machine is very busy.
    assert done.returncode in (0, 124), done.stdout + done.stderr
    assert time.monotonic() - started < 110
    content = json.loads((tmp_path / "gpu.json").read_text())
    names = [cell.name for cell in cells.BENCH]
    # How many of them there is time for is up to the machine.
    assert set(content["cells"]) | set(content["left_out"]) == set(names)
    assert "left out, run again to go on" in (tmp_path / "gpu.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["gpu-build", "gpu-check", "gpu-bench"])
def test_scripts_say_that_there_is_no_gpu(script):
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    done = subprocess.run(
        [ROOT / ".ci" / script], env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "torch finds no GPU here" in done.stderr
