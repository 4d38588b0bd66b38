"""Eight threads on one engine, and on eight engines: the same bits, and memory that stays flat.

    python -m tests.load --minutes 20

Tiny networks, which meet in the queue most often, and real ones with a policy network, through
``auto``: ResNet-110 on 32x32 pixels and ResNet-50 on 224x224, at about half of their blocks.

Memory is the process's resident set, after a tenth of the time and at
the end; it may grow by GROWTH.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.measure.workload import fit_policy, random_workload
from tests.random_networks import BOTTLENECK, CIFAR, make_images, make_model

THREADS = 8
GROWTH = 32 << 20  # bytes, which the allocators of eight threads may keep
BATCHES = (1, 2, 5, 8, 13)
LARGE_BATCHES = (1, 2, 3, 4)  # of images of 224x224

Load = tuple[bdf.BlockDrop, list[Tensor]]  # a model, and batches of images


def resident() -> int:
    """Bytes of the process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def tiny(config: bdf.ResNetConfig) -> Load:
    """A network of the tests."""
    return make_model(config)[0], [make_images(config, batch, batch) for batch in BATCHES]


def real(build: Callable[[], bdf.ResNet], size: int, batches: Sequence[int]) -> Load:
    """A network of the size that users have, whose policy network keeps half of the blocks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = build()
        decisions = torch.rand(sum(batches), backbone.num_blocks) < 0.5
        workload = fit_policy(random_workload(build.__name__, backbone, decisions, size))
    return workload.model, list(workload.images.split(list(batches)))


LOADS: dict[str, Callable[[], Load]] = {
    "tiny CIFAR": lambda: tiny(CIFAR),
    "tiny ImageNet": lambda: tiny(BOTTLENECK),
    "ResNet-110": lambda: real(bdf.resnet110, 32, BATCHES),
    "ResNet-50": lambda: real(bdf.resnet50, 224, LARGE_BATCHES),
}


def run(
    engines: Sequence[bdf.Engine], batches: Sequence[Tensor], seconds: float
) -> tuple[int, int]:
    """Call engines from ``THREADS`` threads; thread i has engine i, or the only one.

    Returns:
        Calls, and bytes by which memory grew after the first tenth.

    Raises:
        AssertionError: a call gave other bits than alone, or raised.
    """
    alone = [engines[0](images) for images in batches]
    end, calls, wrong = time.monotonic() + seconds, [0] * THREADS, []

    def work(thread: int) -> None:
        engine, number = engines[thread % len(engines)], thread
        try:
            while time.monotonic() < end and not wrong:
                number += 1
                which = number % len(batches)
                output = engine(batches[which])
                if number % 3 == 0:
                    output = bdf.Output(engine.run(batches[which], output[1]), output[1])
                for found, expected in zip(output, alone[which], strict=True):
                    assert torch.equal(found, expected), "other bits beside other threads"
                calls[thread] += 1
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(THREADS)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 10)
    before = resident()
    for thread in threads:
        thread.join()
    if wrong:
        raise AssertionError(f"a call under load failed: {wrong[0]!r}") from wrong[0]
    return sum(calls), resident() - before


def main() -> None:
    """Run the load, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20, help="in all")
    given = parser.parse_args()
    counts = (1, THREADS)
    grown = False
    for name, make in LOADS.items():
        model, batches = make()
        for count in counts:
            engines = [bdf.compile(model) for _ in range(count)]
            seconds = 60 * given.minutes / (len(LOADS) * len(counts))
            calls, growth = run(engines, batches, seconds)
            kept = torch.cat([engines[0].decide(images) for images in batches]).double().mean()
            print(
                f"{THREADS} threads on {count} engines ({name}, {engines[0].strategy}, "
                f"{kept:.0%} of the blocks): {calls} calls, memory {growth / 1e6:+.1f} MB",
                flush=True,
            )
            grown |= growth > GROWTH
    sys.exit("memory grew" if grown else 0)


if __name__ == "__main__":
    main()
