"""Commands of the trainer in two processes that train together, some or all of which are killed."""

from __future__ import annotations

import math
import os
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.kills.processes import LIMIT, Attempt, Processes
from tests.train.processes import environment, free_port

COUNT = 2
# --timeout of forks, all of which it takes where one is lost before they have met; and how much
# longer that may take on a busy machine.
TIMEOUT, SLACK = 15, 60


class Group:
    """Runs commands in two processes, and kills one of them or both.

    Of one that is left, it sees to it that it ends, says why, and fails.

    Args:
        processes: with which it starts them.
        folder: for what they print.
        seed: of which processes are killed.
    """

    def __init__(self, processes: Processes, folder: Path, seed: str):
        self.processes = processes
        self._rng = random.Random(seed)
        self._logs = [folder / f"log{rank}" for rank in range(COUNT)]

    def run(
        self,
        words: list[str],
        after: float | None = None,
        anew: bool = False,
        write: tuple[int, bool] | None = None,
        look: Callable[[float], None] | None = None,
    ) -> Attempt:
        """See ``Processes.run``; ``anew``: under torchrun, whose process is killed, too."""
        if anew:
            return self.launch(words, after)
        port, started = free_port(), time.monotonic()
        pids = [
            self.processes.start(
                [*words, "--timeout", str(TIMEOUT)],
                write=write if rank == 0 else None,
                log=log,
                environment=environment(rank, COUNT, port),
            )
            for rank, log in enumerate(self._logs)
        ]
        found: dict[int, int] = {}
        seconds, limit = 0.0, LIMIT if after is None else after
        while len(found) < COUNT and seconds < limit and -signal.SIGKILL not in found.values():
            for pid in set(pids) - found.keys():
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    found[pid] = os.waitstatus_to_exitcode(status)
            if look is not None:
                look(seconds)
            time.sleep(0.01)
            seconds = time.monotonic() - started
        where = "at a write"
        if not found:
            victims = self._rng.choice([[0], [1], [0, 1]])
            where = self.processes.place(pids[victims[0]])
            where += ", both" if len(victims) == COUNT else ", one"
            for rank in victims:
                os.kill(pids[rank], signal.SIGKILL)
        self._wait(pids, found)
        statuses = [found[pid] for pid in pids]
        self.processes.log.write_text("".join(log.read_text() for log in self._logs))
        if -signal.SIGKILL not in statuses:
            return Attempt(max(statuses, key=abs), where, seconds)
        for status, log in zip(statuses, self._logs, strict=True):
            if status == 1:
                said = log.read_text().strip().splitlines()[-1]
                expected = rf"{words[1]}: process \d of {COUNT} has lost another one \("
                assert re.match(expected, said), f"one that is left says {said!r}"
            else:  # the last thing that they do together may have been done
                assert status in (0, -signal.SIGKILL), f"status {status} of one that is left"
        return Attempt(-signal.SIGKILL, where, seconds)

    def _wait(self, pids: list[int], found: dict[int, int]) -> None:
        end = time.monotonic() + TIMEOUT + SLACK
        for pid in set(pids) - found.keys():
            while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
                if time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    raise AssertionError("one that is left does not end")
                time.sleep(0.01)
            found[pid] = os.waitstatus_to_exitcode(ended[1])

    def launch(
        self, words: list[str], after: float | None = None, kills: Sequence[float] = ()
    ) -> Attempt:
        """Run a command under torchrun.

        Args:
            words: "train", the stage, options.
            after: seconds until torchrun and what it has started are killed at once; None: not.
            kills: seconds until one of its processes is killed, from the start of the ones that run
                then; torchrun starts them again.
        """
        options = ["--standalone", "--nproc-per-node", str(COUNT)]
        options += ["--max-restarts", str(len(kills)), "-m", *words]
        started = time.monotonic()
        pid = self.processes.start(["torch.distributed.run", *options], anew=True)
        seconds, due, rounds = 0.0, math.inf, 0
        while seconds < (LIMIT if after is None else after):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(status)
                return Attempt(status, "under torchrun", seconds, rounds - 1)
            seconds, workers = time.monotonic() - started, _children(pid)
            if len(workers) == COUNT and not workers & {*self.processes.started}:
                self.processes.started += workers
                due = seconds + kills[rounds] if rounds < len(kills) else math.inf
                rounds += 1
            if workers and seconds >= due:
                os.kill(self._rng.choice([*workers]), signal.SIGKILL)
                due = math.inf
            time.sleep(0.02)
        os.kill(pid, signal.SIGSTOP)  # or it would start more meanwhile
        workers = _children(pid)
        self.processes.started += workers
        for one in (pid, *workers):
            os.kill(one, signal.SIGKILL)
        os.waitpid(pid, 0)
        return Attempt(-signal.SIGKILL, "under torchrun, all", seconds)


def _children(parent: int) -> set[int]:
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, of = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            except OSError:  # it has just ended
                continue
            if int(of) == parent and state != "Z":
                found.add(int(folder.name))
    return found
