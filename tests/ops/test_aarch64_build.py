"""The CPU sources compile for aarch64 without warnings, and the walk's kernels compute there.

Needs a cross compiler (Debian: g++-aarch64-linux-gnu), and an emulator (qemu-user) to run them.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    if not path.stem.endswith(("_avx2", "_avx512"))
]
COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="there is no aarch64-linux-gnu-g++ here"),
]


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles(source):
    headers = [part for path in cpp_extension.include_paths() for part in ("-isystem", path)]
    run(COMPILER, *FLAGS, *headers, "-fsyntax-only", source)


@pytest.mark.skipif(EMULATOR is None, reason="there is no qemu-aarch64 here")
def test_kernels_compute(tmp_path):
    program = tmp_path / "program"
    source = ROOT / "tests" / "cross" / "walk_imagenet_kernels.cpp"
    run(COMPILER, *FLAGS, "-static", source, "-o", program)
    assert "Winograd" in run(EMULATOR, program)
