"""Eight threads on one engine, and on eight engines: the same bits, and memory that stays flat.

    python -m tests.load --minutes 5

Memory is the process's resident set, after a tenth of the time and at
the end; it may grow by GROWTH.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import blockdrop_fast as bdf
from tests.random_networks import BOTTLENECK, CIFAR, make_images, make_model

THREADS = 8
GROWTH = 32 << 20  # bytes, which the allocators of eight threads may keep


def resident() -> int:
    """Bytes of the process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


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
    parser.add_argument("--minutes", type=float, default=5)
    given = parser.parse_args()
    kinds = [(config, count) for config in (CIFAR, BOTTLENECK) for count in (1, THREADS)]
    grown = False
    for config, count in kinds:
        model, _ = make_model(config)
        engines = [bdf.compile(model) for _ in range(count)]
        batches = [make_images(config, batch, batch) for batch in (1, 2, 5, 8, 13)]
        calls, growth = run(engines, batches, 60 * given.minutes / len(kinds))
        print(
            f"{THREADS} threads on {count} engines ({engines[0].strategy}, {config.stem}): "
            f"{calls} calls, memory {growth / 1e6:+.1f} MB",
            flush=True,
        )
        grown |= growth > GROWTH
    sys.exit("memory grew" if grown else 0)


if __name__ == "__main__":
    main()
