"""Every CUDA source compiles without warnings and within the limits written in it.

Needs nvcc, not a GPU: CPU-only torch has the headers, too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = ["80", "90a"]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME')}/bin")
# Takes compiled code apart; Triton brings one.
TRITON = util.find_spec("triton")
CUOBJDUMP = shutil.which("cuobjdump") or shutil.which(
    "cuobjdump", path=TRITON and Path(TRITON.origin).parent / "backends" / "nvidia" / "bin"
)
LIMITS = re.compile(
    r"^// limits: (\w+) (\d+) registers, (\d+) bytes spilled, (\d+) bytes static shared memory$",
    re.MULTILINE,
)
MOST_INSTRUCTIONS = re.compile(r"^// limits: (\w+) (\d+) instructions$", re.MULTILINE)
# What ptxas -v says of a kernel; shared memory is not mentioned where there is none.
COMPILED = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="there is no nvcc here"),
]


@pytest.fixture(scope="module")
def headers(tmp_path_factory) -> list[str]:
    """Flags for torch's headers, with the one that CPU-only builds of torch leave out."""
    folder = tmp_path_factory.mktemp("include")
    missing = folder / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    missing.parent.mkdir(parents=True)
    missing.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    found = [*cpp_extension.include_paths(), str(folder)]
    return [part for path in found for part in ("-isystem", path)]


def count_instructions(compiled: Path) -> Iterator[tuple[str, int]]:
    """Each kernel's symbol, and its instructions, once an architecture."""
    path = f"{Path(CUOBJDUMP).parent}:{os.environ['PATH']}"  # for nvdisasm
    done = subprocess.run(
        [CUOBJDUMP, "-sass", compiled],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    for function in done.stdout.split("Function : ")[1:]:
        yield (
            function.split()[0],
            len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", function, re.MULTILINE)),
        )


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_within_limits(source, headers, tmp_path):
    limits = {
        name: tuple(map(int, numbers)) for name, *numbers in LIMITS.findall(source.read_text())
    }
    command = [
        *(NVCC, "-c", "-std=c++17", "-O3", "--expt-relaxed-constexpr"),
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS),
        *("-Werror", "all-warnings", "-Xptxas", "-v"),
        *(f"-I{ROOT / 'csrc'}", *headers, str(source), "-o", str(tmp_path / "kernel.o")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    kernels = list(COMPILED.finditer(done.stderr))
    seen = []
    for kernel in kernels:
        names = [one for one in limits if one in kernel["name"]]
        assert len(names) == 1, f"{source.name}: not one line of limits for {kernel['name']}"
        (name,) = names
        seen.append(name)
        registers, spilled, shared = limits[name]
        found_shared = re.search(r"(\d+) bytes smem", kernel["rest"])
        assert int(kernel["registers"]) <= registers, kernel[0]
        assert max(int(kernel["stores"]), int(kernel["loads"])) <= spilled, kernel[0]
        assert int(found_shared[1] if found_shared else 0) <= shared, kernel[0]
    assert set(seen) == set(limits), done.stderr
    assert all(seen.count(name) % len(ARCHS) == 0 for name in limits), done.stderr
    most = MOST_INSTRUCTIONS.findall(source.read_text())
    if most and CUOBJDUMP is not None:
        for symbol, instructions in count_instructions(tmp_path / "kernel.o"):
            limit = next(int(limit) for name, limit in most if name in symbol)
            assert instructions <= limit, symbol
