"""Threads that walk images together, under ThreadSanitizer and without torch (`make tsan`)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU = ROOT / "csrc" / "cpu"
COMPILER = shutil.which("c++")
FLAGS = ["-std=c++20", "-O1", "-g", "-pthread", "-fsanitize=thread"]
PROGRAMS = {
    "walk_queue": [],
    "walk_threads": [CPU / f"walk_{one}.cpp" for one in ("program", "gated", "portable")],
}
# Planted: the program that has to meet it, the header, and what there becomes what.
RACES = {
    "a part is done before it is": (
        "walk_queue",
        "walk_queue.h",
        "step.done.fetch_add(1, std::memory_order_release);",
        "step.done.fetch_add(1, std::memory_order_relaxed);",
    ),
    "a whole layer is done before it is": (
        "walk_queue",
        "walk_queue.h",
        "step.done.store(num_parts, std::memory_order_release);",
        "step.done.store(num_parts, std::memory_order_relaxed);",
    ),
    "who waits does not see what was done": (
        "walk_queue",
        "walk_queue.h",
        "step.done.load(std::memory_order_acquire)",
        "step.done.load(std::memory_order_relaxed)",
    ),
    "helpers do not see which image it is": (
        "walk_queue",
        "walk_queue.h",
        "own.state.store(together ? State::kWalkingTogether : State::kWalking);",
        "own.state.store(together ? State::kWalkingTogether : State::kWalking,\n"
        "                std::memory_order_relaxed);",
    ),
    "every thread decides": (
        "walk_threads",
        "walk_program.h",
        "step([&] {\n    const int segment",
        "[](const auto& decide_now) { decide_now(); }([&] {\n    const int segment",
    ),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler here"),
]


def run(name: str, folder: Path) -> subprocess.CompletedProcess:
    """A program's run, with the headers that are in the folder instead of those of csrc."""
    sources = [ROOT / "tests" / "tsan" / f"{name}.cpp", *PROGRAMS[name]]
    includes = [f"-I{one}" for one in (folder, ROOT / "tests" / "standins", ROOT / "csrc")]
    command = [COMPILER, *FLAGS, *includes, *sources, "-o", folder / name]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if "tsan" in built.stderr:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    options = {"env": {"TSAN_OPTIONS": "halt_on_error=1"}, "timeout": 300}
    done = subprocess.run([folder / name], capture_output=True, text=True, check=False, **options)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run with this kernel's layout of memory")
    return done


@pytest.mark.parametrize("name", PROGRAMS)
def test_threads_do_not_race(name, tmp_path):
    done = run(name, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("race", RACES)
def test_a_planted_race_is_reported(race, tmp_path):
    name, header, right, wrong = RACES[race]
    text = (CPU / header).read_text()
    assert text.count(right) == 1
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / header).write_text(text.replace(right, wrong))
    done = run(name, tmp_path)
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr, done.stdout + done.stderr
