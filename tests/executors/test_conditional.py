"""Switch nodes in CUDA graphs, without a GPU: the C++ that builds them, and the Python that asks.

``tests/graphs`` has a CUDA runtime that knows of graphs only, refuses what CUDA does not allow, and
runs what was built.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from blockdrop_fast._extension import extension_status
from blockdrop_fast.executors import recording
from blockdrop_fast.executors.recording import Switches, why_no_switches

ROOT = Path(__file__).parents[2]
GRAPHS = ROOT / "tests" / "graphs"
CXX = shlex.split(os.environ.get("CXX", "g++"))

no_compiler = pytest.mark.skipif(
    shutil.which(CXX[0]) is None, reason=f"there is no C++ compiler {CXX[0]}"
)


def needs_compiler(test):
    return pytest.mark.slow(no_compiler(test))


def build(folder: Path, cuda_version: int) -> Path:
    output = folder / f"graphs{cuda_version}"
    command = [
        *CXX,
        *("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread"),
        *(f"-DCUDART_VERSION={cuda_version}", f"-I{GRAPHS}", f"-I{ROOT / 'csrc'}"),
        *(str(GRAPHS / "conditional_on_cpu.cpp"), "-o", str(output)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module", params=[12080, 13000])
def program(request, tmp_path_factory) -> Path:
    """The builder against the functions of CUDA 12.8, and of CUDA 13."""
    return build(tmp_path_factory.mktemp("graphs"), request.param)


def run(program: Path, *words: object) -> subprocess.CompletedProcess:
    command = [str(program), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@needs_compiler
def test_structure(program):
    """One kernel sets all switches; each comes after what was launched, and before what is next."""
    done = run(program, "graph", 4, 1, 4)
    *nodes, _ = done.stdout.splitlines()
    assert nodes == [
        "stem <-",
        "set <- [stem]",
        "shortcut 0 <- [set]",
        "switch 0 <- [shortcut 0]",
        "  some 0 <-",
        "  some 0 last <- [some 0]",
        "  all 0 <-",
        "  all 0 last <- [all 0]",
        "shortcut 1 <- [switch 0]",
        "switch 1 <- [shortcut 1]",
        "  some 1 <-",
        "  some 1 last <- [some 1]",
        "  all 1 <-",
        "  all 1 last <- [all 1]",
        "classifier <- [switch 1]",
    ]


@needs_compiler
@pytest.mark.parametrize("blocks", [1, 64, 65, 200])
def test_launches_choose_by_the_counts_of_then(program, blocks):
    """One graph, launched with other counts: bodies 0 and 1, or none, at every block."""
    all_from = 5
    generator = torch.Generator().manual_seed(blocks)
    launches = torch.randint(0, 9, (4, blocks), generator=generator)
    launches[:, 0] = torch.tensor([0, 1, 4, 5])
    words = " / ".join(" ".join(map(str, counts.tolist())) for counts in launches).split()
    lines = run(program, "graph", all_from, *words).stdout.splitlines()
    assert sum(line.startswith("set ") for line in lines) == -(-blocks // 64)
    ran = [re.findall(r"\[(.*?)\]", line) for line in lines if line.startswith("ran ")]
    for names, counts in zip(ran, launches.tolist(), strict=True):
        expected = ["stem"]
        for k, count in enumerate(counts):
            expected.append(f"shortcut {k}")
            if count > 0:
                body = f"{'all' if count >= all_from else 'some'} {k}"
                expected += [body, f"{body} last"]
        assert names == [*expected, "classifier"]


@needs_compiler
@pytest.mark.parametrize(
    ("mistake", "error"),
    {
        "not capturing": "expected a stream that is capturing a CUDA graph",
        "switch while not capturing": "expected a stream that is capturing a CUDA graph",
        "old driver": "need a driver for CUDA 12.8, this one is for 12.4",
        "no driver": "no driver of CUDA is installed",
        "no switch": "cudaErrorInvalidValue",
        "handle of another graph": "cudaErrorInvalidValue",
        "two switches": "cudaErrorInvalidValue",
        "capturing already": "cudaErrorIllegalState",
        "ended on another stream": "cudaErrorStreamCaptureUnmatched",
        "ended by another thread": "cudaErrorStreamCaptureWrongThread",
        "destroyed while capturing": "cudaErrorIllegalState",
        "body captured twice": "cudaErrorInvalidValue",
        "set too late": "cudaErrorInvalidValue",
    }.items(),
)
def test_mistakes_are_errors(program, mistake, error):
    done = run(program, mistake)
    assert done.returncode == 1
    assert error in done.stderr


@needs_compiler
def test_older_cuda_compiles_and_says_so(tmp_path):
    done = run(build(tmp_path, 12060), "graph", 4, 1)
    assert done.returncode == 1
    assert "need CUDA 12.8, the extension was built with 12.6" in done.stderr


class Bodies:
    """Two bodies that note the count they are given."""

    def __init__(self):
        self.ran: list[tuple[str, int]] = []

    def some(self, count):
        self.ran.append(("some", int(count)))

    def everyone(self, count):
        self.ran.append(("everyone", int(count)))


def test_host_chooses_outside_of_a_capture():
    """After each body has run for nobody, so that it is compiled when it comes to a capture."""
    switches = Switches(torch.device("cpu"))
    counts = torch.tensor([0, 1, 3, 4, 5], dtype=torch.int32)
    switches.set(counts, torch.tensor([4], dtype=torch.int32))
    chosen = [[], [("some", 1)], [("some", 3)], [("everyone", 4)], [("everyone", 5)]]
    for k, expected in enumerate(chosen):
        bodies = Bodies()
        switches.run(k, bodies.some, bodies.everyone)
        assert bodies.ran == [("some", 0), ("everyone", 0), *expected]


class FakeCuda:
    """Stands in for torch.cuda and the extension while a graph is captured; notes what is asked."""

    def __init__(self, monkeypatch):
        self.asked: list[tuple] = []
        self.stream, self.pools = 7, []  # current ones
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(cuda, "MemPool", lambda: "pool")
        monkeypatch.setattr(cuda, "use_mem_pool", self._use_mem_pool)
        monkeypatch.setattr(cuda, "device", self._nothing)
        monkeypatch.setattr(cuda, "stream", self._stream)
        monkeypatch.setattr(cuda, "current_stream", lambda device: self._wrap(self.stream))
        monkeypatch.setattr(cuda, "ExternalStream", lambda stream, device: self._wrap(stream))
        monkeypatch.setattr(recording, "_conditional", lambda: self)

    def _wrap(self, stream):
        return SimpleNamespace(cuda_stream=stream)

    @contextmanager
    def _nothing(self, device):
        yield

    @contextmanager
    def _stream(self, stream):
        before, self.stream = self.stream, stream.cuda_stream
        yield
        self.stream = before

    @contextmanager
    def _use_mem_pool(self, pool, device):
        self.pools.append(pool)
        yield
        self.pools.pop()

    def make_stream(self):
        return 8

    def destroy_stream(self, stream):
        self.asked.append(("destroy", stream))

    def set_handles(self, stream, counts, all_from, number):
        self.asked.append(("set", stream, counts, all_from, number))
        return [100 + k for k in range(number)]

    def add_switch(self, stream, handle):
        self.asked.append(("switch", stream, handle))
        return [10 * handle, 10 * handle + 1]

    def begin_body(self, stream, graph):
        self.asked.append(("begin", stream, graph))

    def end_body(self, stream):
        self.asked.append(("end", stream))

    def body(self, name):
        def body(count):
            self.asked.append((name, self.stream, tuple(self.pools), count.data_ptr()))

        return body


def test_device_chooses_in_a_capture(monkeypatch):
    """Bodies are captured on a stream and in memory of their own, the rest on the current one."""
    cuda = FakeCuda(monkeypatch)
    switches = Switches(torch.device("cuda"))
    counts, all_from = torch.zeros(3, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    switches.set(counts, all_from)
    for k in range(2):
        switches.run(k, cuda.body("some"), cuda.body("everyone"))
    expected = [("set", 7, counts.data_ptr(), all_from.data_ptr(), 3)]
    for k, handle in enumerate((100, 101)):
        expected.append(("switch", 7, handle))
        for number, name in enumerate(("some", "everyone")):
            expected += [
                ("begin", 8, 10 * handle + number),
                (name, 8, ("pool",), counts[k:].data_ptr()),
                ("end", 8),
            ]
    assert cuda.asked == expected
    assert (cuda.stream, cuda.pools) == (7, [])
    del switches
    assert cuda.asked[-1] == ("destroy", 8)


def test_capture_of_a_body_ends_when_it_fails(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    switches = Switches(torch.device("cuda"))
    switches.set(torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))

    def broken(count):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        switches.run(0, broken, cuda.body("everyone"))
    assert cuda.asked[-1] == ("end", 8)


@pytest.mark.skipif(
    extension_status().build_info.get("cuda") is not None, reason="there are CUDA kernels"
)
def test_says_what_is_missing():
    assert re.search("need the (compiled extension|extension's CUDA part): .", why_no_switches())
