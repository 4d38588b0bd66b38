"""GPU tests in bounded time: `make gpu-check` sets until when tests may begin.

What passes is written down at once, in build/gpu-tests/, and not run again by the same code on the
same machine; so a run that is cut off loses nothing, and the next one goes on. Several processes
run tests at once where pytest-xdist is there, as most of the time is compilation.
"""

from __future__ import annotations

import functools
import hashlib
import os
import signal
import time
from pathlib import Path

import pytest

UNTIL = "BLOCKDROP_GPU_TESTS_UNTIL"  # seconds since the epoch; unset: none of this
# The exit status if nothing failed, but the time was not enough for all.
UNFINISHED = 75
NO_TIME = "the time is up"
ROOT = Path(__file__).parents[2]
SOURCES = (
    *("blockdrop_fast/**/*.py", "csrc/**/*.*"),
    *("tests/*.py", "tests/gpu/*.py", "tests/ops/*_cases.py"),
)
CONDITIONS = ("CUDA_LAUNCH_BLOCKING", "BLOCKDROP_CLUSTERS")
MOST_PROCESSES = 8
GIGABYTES_OF_A_PROCESS = 6


@functools.cache
def passed_file() -> Path:
    """A line for each test that has passed; named by all that this depends on."""
    import torch

    found = hashlib.sha256(torch.__version__.encode())
    if torch.cuda.is_available():
        found.update(torch.cuda.get_device_name().encode())
    found.update(repr([os.environ.get(name) for name in CONDITIONS]).encode())
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return ROOT / "build" / "gpu-tests" / f"{found.hexdigest()[:16]}.txt"


class Bounded:
    """The plugin; in pytest-xdist's processes, too, where it only looks at the time.

    Attributes:
        until: seconds since the epoch.
        path: where passed tests are written to; None in such a process.
        known: those that an earlier run has written down, the same in all processes.
        left: those that there was no time for.
    """

    def __init__(self, until: float, path: Path | None, known: list[str]):
        self.until, self.path, self.known = until, path, known
        self.left: list[str] = []
        self._ok: set[str] = set()
        self._lost = False

    def pytest_collection_modifyitems(self, config, items) -> None:
        known = set(self.known)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in known])
        items[:] = [item for item in items if item.nodeid not in known]

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node) -> None:
        node.workerinput["known"] = self.known

    def pytest_runtest_setup(self, item) -> None:
        if time.time() > self.until:
            pytest.skip(NO_TIME)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and is_lost():
            self._lost = True
        if self.path is None:
            return
        if report.skipped and NO_TIME in str(report.longrepr):
            self.left.append(report.nodeid)
        if report.when == "call" and report.passed:
            self._ok.add(report.nodeid)
        if report.when == "teardown" and report.passed and report.nodeid in self._ok:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                print(report.nodeid, file=file)

    def pytest_runtest_logfinish(self, nodeid, location) -> None:
        """Nothing can be computed in a process whose context is lost: xdist begins another."""
        if self._lost and self.path is None:
            os._exit(1)
        if self._lost:
            pytest.exit(f"the GPU is lost to this process since {nodeid}", returncode=1)

    def pytest_sessionfinish(self, session) -> None:
        if self.path is None:
            return
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.known:
            session.exitstatus = pytest.ExitCode.OK
        if session.exitstatus == pytest.ExitCode.OK and self.left:
            session.exitstatus = UNFINISHED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.left:
            terminalreporter.line(f"no time left for {len(self.left)}, the first {self.left[0]}")


def is_lost() -> bool:
    """Whether this process's context is: an illegal access, for one, is raised ever after."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def num_processes() -> int:
    """How many the cores and the GPU's memory are enough for; each has a context of its own."""
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    room = memory // (GIGABYTES_OF_A_PROCESS << 30)
    return max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2, room))


def configure(config) -> None:
    """Register the plugin if there is a bound."""
    if UNTIL not in os.environ:
        return
    path, known = None, getattr(config, "workerinput", {}).get("known")
    if known is None:
        # As by Ctrl+C: what has failed is told, whatever else hangs.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        path = passed_file()
        known = path.read_text().splitlines() if path.exists() else []
    config.pluginmanager.register(Bounded(float(os.environ[UNTIL]), path, known))
