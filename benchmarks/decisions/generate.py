"""Write the decisions files: ``python benchmarks/decisions/generate.py``.

Each is a NumPy array (1024, ceil(K / 8)) uint8, ``numpy.packbits`` of the (1024, K) decisions
that ``blockdrop_fast.measure.published`` draws. The same bytes on every machine.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from blockdrop_fast.measure.published import PUBLISHED, fits, published_decisions


def main() -> None:
    """Write one file a network beside this script."""
    for network, usage in PUBLISHED.items():
        decisions = published_decisions(network)
        if not fits(usage, decisions):
            raise SystemExit(f"{network}: seed {usage.seed} misses the published block usage")
        path = Path(__file__).with_name(f"{network}.npy")
        np.save(path, np.packbits(decisions.numpy(), axis=1))
        kept = decisions.sum(1).double()
        print(
            f"{path.name}: {float(kept.mean()):.2f} ± {float(kept.std()):.2f} of "
            f"{usage.num_blocks} blocks, {len(decisions.unique(dim=0))} different policies"
        )


if __name__ == "__main__":
    main()
