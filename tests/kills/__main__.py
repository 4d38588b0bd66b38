"""Every stage of ``python -m train``, killed at random moments, comes to the bits of a whole run.

    OMP_NUM_THREADS=1 python -m tests.kills --kills 10 [--stages NAME ...] [--seed 0]

A case is a stage with options under which it takes seconds, on the embedded digits or on files of
images. Its command runs undisturbed. In another folder it is killed with SIGKILL, repeated with
``--resume``, killed again, so many times, and then runs to its end. Moments are drawn so that they
spread over the run: start, training, evaluation and saves; one is that of a write, which are short.
Processes are forks of this one, in which everything is imported; but the last one of each case, and
one that is killed while it imports or soon after, are new.

Cases of two processes, which train together over Gloo, have one of them killed or both. One that is
left ends with its line, within the timeout. New ones are torchrun's: it is killed with both, and
starts them again in a last run in which it loses one now and then.

After each kill:

- each file with its final name, of the run and of what it reads, can be read, verified where it has
  checksums, and metrics are not older than the state beside them.

At the end, against the undisturbed run:

- there are the same files, and none that was only begun;
- tensors and metadata of models and states, those of optimizers and schedulers among them, are the
  same bit for bit;
- so are metrics, evaluations and tables, but for what is measured in seconds, and TensorBoard shows
  the same values, one an epoch;
- no process is left;
- the command once more, of a complete run, changes nothing.

A stage of the trainer without a case is an error.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from blockdrop_fast.data.batches import load_digits
from blockdrop_fast.networks.checkpoint_files import read_torch
from tests.kills.cases import CASES, check_coverage
from tests.kills.contents import age_events, contents, differences, files_of, shown_values
from tests.kills.groups import Group
from tests.kills.processes import ROOT, Attempt, Processes
from train.run_files import MODEL_FILE, STATE_FILE
from train.stages import STAGES, function_of

RESTARTS = 2  # by torchrun, where there is one


class Progress:
    """How far a run has come, in seconds of the undisturbed one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seconds: dict[tuple[str, int], float] = {}

    def look(self, seconds: float) -> None:
        """Remember what there is at that time."""
        for mark in self._marks(self.folder):
            self.seconds.setdefault(mark, seconds)

    def of(self, folder: Path) -> float:
        """When the undisturbed run had come to where another is."""
        return max((self.seconds.get(mark, 0.0) for mark in self._marks(folder)), default=0.0)

    def _marks(self, folder: Path) -> set[tuple[str, int]]:
        marks = set()
        for path in files_of(folder):
            is_state = path.name == STATE_FILE
            size = read_torch(path)["epoch"] if is_state else path.stat().st_size
            marks.add((str(path.relative_to(folder)), size))
        return marks


@dataclass
class Reference:
    """An undisturbed run.

    Attributes:
        folder: of it.
        contents: what it left.
        progress: its course.
        again: seconds of the command once more.
        seconds: of all of it.
    """

    folder: Path
    contents: dict[str, object]
    progress: Progress
    again: float
    seconds: float

    def left(self, out: Path) -> float:
        """Seconds from where another run is to the end."""
        return self.seconds - self.progress.of(out)


class Checker:
    """Runs cases in a folder.

    Args:
        folder: for all runs.
        kills: of each case.
        seed: of their moments.
    """

    def __init__(self, folder: Path, kills: int, seed: int):
        self.folder, self.kills, self.seed = folder, kills, seed
        self.processes = Processes(folder)
        self.references: dict[str, Reference] = {}
        self.imports = self.processes.run(["train", "pretrain", "--help"], anew=True).seconds

    def check(self, name: str) -> Counter[str]:
        """Kill a case, let it come to its end, and compare.

        Returns:
            Where the kills met it.

        Raises:
            AssertionError: something is not as it should be.
        """
        reference, rng = self.reference(name), random.Random(f"{self.seed} {name}")
        case, folder = CASES[name], self._prepare(name, "killed")
        run = self._runner(name).run
        out, places, ended, resume = folder / "out", Counter(), 0, False
        speed, (anew, at_write) = 1.0, rng.sample(range(max(2, self.kills)), 2)
        while (killed := places.total()) < self.kills:
            words = case.words(folder, resume)
            left = min(reference.seconds, reference.left(out) + reference.again) * speed
            if killed == at_write:
                write = (rng.randrange(6), rng.random() < 0.5)
                attempt = run(words, write=write)
            elif killed == anew:
                # Under torchrun two import at a time, after it has.
                imports = self.imports * (1 if case.processes == 1 else 3)
                after = rng.uniform(0, imports + min(left, reference.again))
                attempt = run(words, after, anew=True)
            else:  # as far apart as so many moments in the whole run would be
                share = min(1.0, 2 / (self.kills - killed + 1))
                attempt = run(words, rng.uniform(0, share * left))
            contents(out), contents(folder / "given")
            age_events(out)
            resume = True
            if attempt.status == -signal.SIGKILL:
                places[attempt.where] += 1
                continue
            self._succeeded(attempt)
            self._compare(reference, out)
            ended += 1
            assert ended < 5 * self.kills, "it always ends before it is killed"
            speed = min(speed, speed * attempt.seconds / left)
            if killed == at_write or rng.random() < 0.5:  # else the complete run is killed
                shutil.rmtree(out)
                resume = False
        self._succeeded(run(case.words(folder, True), anew=True))
        self._compare(reference, out)
        if case.processes > 1:
            places += self._restarted(name, folder, rng)
        left = self.processes.left()
        assert not left, f"processes are left: {left}"
        return places

    def reference(self, name: str) -> Reference:
        """The undisturbed run of a case."""
        if name not in self.references:
            folder, case = self._prepare(name, "whole"), CASES[name]
            progress, runner = Progress(folder / "out"), self._runner(name)
            run = runner.run(case.words(folder, False), look=progress.look)
            self._succeeded(run)
            found = contents(folder / "out") | shown_values(folder / "out")
            age_events(folder / "out")
            again = runner.run(case.words(folder, True))
            self._succeeded(again)
            self.references[name] = reference = Reference(
                folder, found, progress, again.seconds, run.seconds
            )
            self._compare(reference, folder / "out")
        return self.references[name]

    def _runner(self, name: str) -> Processes | Group:
        if CASES[name].processes == 1:
            return self.processes
        return Group(self.processes, self.folder, f"{self.seed} {name}")

    def _restarted(self, name: str, folder: Path, rng: random.Random) -> Counter[str]:
        """A run whose processes are killed one at a time, and started again by torchrun."""
        reference = self.reference(name)
        shutil.rmtree(folder / "out")
        # From when they import on; sooner than they can have ended.
        longest = self.imports + reference.seconds / 2
        kills = [rng.uniform(0, longest) for _ in range(RESTARTS)]
        attempt = self._runner(name).launch(CASES[name].words(folder, True), kills=kills)
        self._succeeded(attempt)
        self._compare(reference, folder / "out")
        return Counter({"restarted by torchrun": attempt.restarts})

    def _prepare(self, name: str, which: str) -> Path:
        """A folder with what a case takes."""
        folder, case = self.folder / name.replace(", ", "-").replace(" ", "-") / which, CASES[name]
        for other in case.needs:
            given = folder / "given" / other
            given.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.reference(other).folder / "out" / MODEL_FILE, given)
        if case.data is not None:
            case.data(folder / "given" / "data")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _succeeded(self, attempt: Attempt) -> None:
        text = self.processes.log.read_text().strip()
        assert attempt.status == 0, f"exit status {attempt.status}: {text[-6000:]}"

    def _compare(self, reference: Reference, out: Path) -> None:
        found = contents(out) | shown_values(out)
        differ = differences(reference.contents, found)
        assert not differ, "; ".join(differ[:8])
        begun = [path.name for path in out.parent.rglob(".*")]
        assert not begun, f"begun and left: {begun}"


def main() -> None:
    """Run the cases, and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="of each case")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: those of --stages")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    check_coverage()
    os.environ.pop("BLOCKDROP_DATA", None)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of what it purges
    # All that a run imports on its way.
    load_digits()
    torch.optim.SGD([torch.zeros(1)], lr=0.1)
    for stage in STAGES:
        function_of(stage)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    checker, failures, total = Checker(folder, given.kills, given.seed), [], Counter()
    names = given.cases or [name for name, case in CASES.items() if case.stage in given.stages]
    began = time.monotonic()
    for name in names:
        started = time.monotonic()
        try:
            places = checker.check(name)
        except AssertionError as error:
            failures.append(f"{name}: {error}")
            print(failures[-1], flush=True)
            continue
        total += places
        print(f"{name:20} {dict(places)}, {time.monotonic() - started:.0f} s", flush=True)
    computed = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{'all':20} {dict(total)}, {time.monotonic() - began:.0f} s, of which a core computed "
        f"{computed.ru_utime + computed.ru_stime:.0f} s; {len(failures)} failures"
    )
    if failures:
        sys.exit(f"runs are left in {folder}\n" + "\n".join(failures))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
