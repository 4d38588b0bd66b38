"""Public calls with random arguments, right and wrong ones, each checked against float64.

    python -m tests.fuzz --cases 10000 [--first N]

Allowed: the right result, TypeError, ValueError; OSError of paths; RuntimeError where the
documentation promises one, or where PyTorch refuses a call of an operator before any code of ours
runs (``operators.REFUSED``). What is right: logits within the tolerance of docs/architecture.md
from the float64 reference at the decisions that were returned. A case is a function of its number,
so ``--first N --cases 1`` is case N again.
"""

from __future__ import annotations

import argparse
import faulthandler
import resource
import sys
import traceback
from collections import Counter

from tests.fuzz.cases import run
from tests.fuzz.right import Wrong

MEMORY = 12 << 30  # bytes of address space: what a wrong number asks for fails at once
SECONDS = 900  # a case that takes longer hangs


def main() -> None:
    """Run the cases, and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--trace", action="store_true", help="print where errors come from")
    given = parser.parse_args()
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    counts, failures = Counter(), []
    for number in range(given.first, given.first + given.cases):
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            counts[run(number)] += 1
        except Wrong as error:
            failures.append(str(error)[:500])
            print(failures[-1], flush=True)
            if given.trace:
                traceback.print_exc()
    faulthandler.cancel_dump_traceback_later()
    for name, count in sorted(counts.items()):
        print(f"{count:6} {name}")
    print(f"{counts.total()} cases as allowed, {len(failures)} not")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
