"""Compiles the CUDA kernels' own device code for the CPU: ``cuda/simt.cuh`` runs it there.

One fiber is a CUDA thread. The shim also fails (aborts) on races between barriers, on accesses out
of bounds, and poisons shared memory with NaN.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SIMT = Path(__file__).parent
CSRC = SIMT.parents[1] / "csrc"
CXX = shlex.split(os.environ.get("CXX", "g++"))

_no_shim = pytest.mark.skipif(
    shutil.which(CXX[0]) is None or sys.platform != "linux",
    reason=f"the shim needs Linux and a C++ compiler, and there is no {CXX[0]}"
    if shutil.which(CXX[0]) is None
    else "the shim needs Linux",
)


def needs_compiler(test):
    """For tests of device code: the walk compiles for 15 seconds, and is no quick simulation."""
    return pytest.mark.slow(_no_shim(test))


def compile_for_cpu(source: str, output: Path, *flags: str) -> Path:
    """Compile a source in this folder to a program, or a library if the flags say so."""
    command = [
        *CXX,
        *("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
        *(f"-I{SIMT}", f"-I{CSRC}", *flags, str(SIMT / source), "-o", str(output)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return output
