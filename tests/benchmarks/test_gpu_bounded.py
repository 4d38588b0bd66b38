"""Tests in bounded time (tests/gpu/bounded.py), on a CPU: a pytest of its own for each run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu import bounded

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CONFTEST = """
import os
from pathlib import Path

from tests.gpu import bounded

here = Path(__file__).parent
bounded.passed_file = lambda: here / "passed" / "file.txt"
bounded.is_lost = lambda: (here / f"lost-{os.getpid()}").exists()


def pytest_configure(config):
    bounded.configure(config)
"""
TESTS = """
import os, time
from pathlib import Path

import pytest

here = Path(__file__).parent


def test_first():
    print("first runs")


@pytest.mark.parametrize("i", range(3))
def test_others(i):
    assert i != 1 or (here / "mended").exists()


def test_last():
    if (here / "lose").exists():
        (here / f"lost-{os.getpid()}").touch()
        assert False, "illegal access"
    if (here / "hang").exists():
        (here / "hangs").touch()
        time.sleep(600)
"""
SERIAL, PARALLEL = [], ["-n", "2", "--dist", "load", "--maxschedchunk", "1"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    return tmp_path


def start(folder: Path, *options: str, seconds: float = 600) -> subprocess.Popen:
    until = str(time.time() + seconds)
    command = [sys.executable, "-m", "pytest", "-q", "-rP", "-p", "no:cacheprovider", *options]
    return subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT), bounded.UNTIL: until},
    )  # fmt: skip


def run(folder: Path, *options: str, seconds: float = 600) -> tuple[int, str, set[str]]:
    """Exit status, output, and what is written down as passed."""
    process = start(folder, *options, seconds=seconds)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output, passed(folder)


def passed(folder: Path) -> set[str]:
    path = folder / "passed" / "file.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    assert len(lines) == len(set(lines))
    return {line.removeprefix("test_it.py::") for line in lines}


ALL = {"test_first", "test_others[0]", "test_others[1]", "test_others[2]", "test_last"}


@pytest.mark.parametrize("options", [SERIAL, PARALLEL], ids=["one process", "two"])
def test_what_has_passed_is_not_run_again(folder, options):
    status, output, found = run(folder, *options)
    assert (status, found) == (1, ALL - {"test_others[1]"}), output
    (folder / "mended").touch()
    status, output, found = run(folder, *options)
    assert (status, found) == (0, ALL), output
    assert "1 passed" in output
    status, output, found = run(folder, *options)
    assert (status, found) == (0, ALL), output
    assert "first runs" not in output


@pytest.mark.parametrize("options", [SERIAL, PARALLEL], ids=["one process", "two"])
def test_no_test_begins_when_the_time_is_up(folder, options):
    status, output, found = run(folder, *options, seconds=-1)
    assert (status, found) == (bounded.UNFINISHED, set()), output
    assert "no time left for 5" in output
    (folder / "mended").touch()
    assert run(folder, *options)[::2] == (0, ALL)


@pytest.mark.parametrize("options", [SERIAL, PARALLEL], ids=["one process", "two"])
def test_a_hang_loses_nothing_of_the_others(folder, options):
    (folder / "hang").touch()
    process = start(folder, *options)
    until = time.monotonic() + 300
    while not (folder / "hangs").exists() or len(passed(folder)) < 3:
        assert time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert passed(folder) == ALL - {"test_others[1]", "test_last"}
    assert "test_others[1]" in output  # which had failed before


def test_a_lost_gpu_costs_its_process_only(folder):
    (folder / "lose").touch()
    (folder / "test_it.py").write_text(TESTS + "\n\ndef test_behind():\n    pass\n")
    status, output, found = run(folder, *SERIAL)
    assert (status, found) == (1, ALL - {"test_others[1]", "test_last"}), output
    assert "the GPU is lost to this process since test_it.py::test_last" in output
    (folder / "mended").touch()
    status, output, found = run(folder, "-n", "1", "--dist", "load", "--maxschedchunk", "1")
    assert (status, found) == (1, ALL - {"test_last"} | {"test_behind"}), output
    assert "illegal access" in output
