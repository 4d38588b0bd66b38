"""Commands of the trainer in processes that are killed at a moment of one's choice."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from train.__main__ import main as train

ROOT = Path(__file__).parents[2]
LIMIT = 900  # seconds, for a run that hangs


@dataclass
class Attempt:
    """A process that ran a command.

    Attributes:
        status: its exit status; negative: the signal that ended it.
        where: the kill met it.
        seconds: it ran.
        restarts: of its processes, by torchrun.
    """

    status: int
    where: str
    seconds: float
    restarts: int = 0


# What a function on the stack, or its file, says of what was going on; the first that fits.
PLACES = {
    "saving": r"/files\.py|/events\.py|(^| )(_save|save|write_torch|savefig|_write)( |$)",
    "timing": r"/timing\.py|/contenders\.py|/times\.py",
    "evaluating": r"/evaluation\.py|/static_line\.py|/rules\.py|/heuristics\.py"
    r"|(^| )(evaluate\w*|stops_of|make_examples|calibrate|recalibrate)( |$)",
    "training": r"(^| )(descend|batches|compute|backward|step|zero_grad|finish_epoch)( |$)"
    r"|train_policy",
}


class Processes:
    """Starts commands and kills them.

    Args:
        folder: for what they print.
    """

    def __init__(self, folder: Path):
        self.log = folder / "log"
        self.started: list[int] = []
        # Where a process is when it is asked; forks inherit handler and file.
        self._stack = os.open(folder / "stack", os.O_RDWR | os.O_CREAT)
        faulthandler.register(signal.SIGUSR1, file=self._stack, all_threads=False)

    def run(
        self,
        words: list[str],
        after: float | None = None,
        anew: bool = False,
        write: tuple[int, bool] | None = None,
        look: Callable[[float], None] | None = None,
    ) -> Attempt:
        """Run ``python -m WORDS``, and kill it after so many seconds.

        Args:
            words: "train", the stage, options.
            after: None: it runs to its end.
            anew: in a new interpreter; else in a fork of this process.
            write: it is killed at its write of this number, 0 the first: when it has written, and
                the old file is still there, or (True) just replaced.
            look: is called with the seconds since the start, again and again.
        """
        started = time.monotonic()
        pid = self.start(words, anew, write)
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            seconds = time.monotonic() - started
            if ended:
                return Attempt(os.waitstatus_to_exitcode(status), "at a write", seconds)
            if seconds >= (LIMIT if after is None else after):
                break
            if look is not None:
                look(seconds)
            time.sleep(min(0.01, LIMIT if after is None else after - seconds))
        where = "new process" if anew else self.place(pid)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        return Attempt(os.waitstatus_to_exitcode(status), where, seconds)

    def start(
        self,
        words: list[str],
        anew: bool = False,
        write: tuple[int, bool] | None = None,
        log: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> int:
        """Start ``python -m WORDS``, see ``run``.

        Args:
            log: for what it prints.
            environment: beside this process's.

        Returns:
            The process's id.
        """
        assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
        os.ftruncate(self._stack, 0)
        os.lseek(self._stack, 0, os.SEEK_SET)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.environ.update(environment or {})
            self._become(words, anew, write, log or self.log)
        self.started.append(pid)
        return pid

    def _become(
        self, words: list[str], anew: bool, write: tuple[int, bool] | None, log: Path
    ) -> None:
        code = 1
        try:
            os.setsid()
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if anew:
                os.execv(sys.executable, [sys.executable, "-m", *words])
            sys.argv = words
            if write is not None:
                os.replace = _dying_replace(*write)
            train()
            code = 0
        except SystemExit as stopped:
            print(stopped, flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def place(self, pid: int) -> str:
        """What a fork is doing, one of ``PLACES``."""
        os.kill(pid, signal.SIGUSR1)
        end = time.monotonic() + 1
        while not os.fstat(self._stack).st_size and time.monotonic() < end:
            time.sleep(0.0005)
        time.sleep(0.001)  # until all of it is there
        stack = os.pread(self._stack, 1 << 16, 0).decode()
        frames = re.findall(r'File "(.*)", line \d+ in (.*)', stack)
        text = " ".join(f"{file} {function}" for file, function in frames)
        for place, pattern in PLACES.items():
            if re.search(pattern, text):
                return place
        return "starting" if stack else "unknown"

    def left(self) -> list[str]:
        """Commands of processes that killed ones have started, and that do not end."""
        end = time.monotonic() + 15  # workers of a DataLoader look for their parent now and then
        while found := _of_sessions(set(self.started)):
            if time.monotonic() > end:
                break
            time.sleep(0.2)
        return found


def _dying_replace(number: int, done: bool) -> Callable[[Path, Path], None]:
    replace, calls = os.replace, count()

    def replace_or_die(source: Path, target: Path) -> None:
        dies = next(calls) == number
        if dies and not done:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)

    return replace_or_die


def _of_sessions(sessions: set[int]) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            state, _, _, session = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            if int(session) in sessions and state != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has just ended
            continue
    return found
