"""Who walks which image with whom: the walks' queue under ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CROSS = Path(__file__).parents[1] / "cross"
COMPILER = shutil.which("c++")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler here")
def test_every_part_is_run_once_and_in_order(tmp_path):
    program = tmp_path / "program"
    includes = [f"-I{CROSS / 'stubs'}", f"-I{CROSS.parents[1] / 'csrc'}"]
    flags = ["-std=c++20", "-O1", "-g", "-pthread", "-fsanitize=thread"]
    command = [COMPILER, *flags, *includes, CROSS / "walk_queue.cpp", "-o", program]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if "tsan" in built.stderr:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
