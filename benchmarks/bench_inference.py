"""BlockDrop against the complete ResNet, policy network included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from blockdrop_fast.commands.benchmark import BATCHES, plan_runs
from blockdrop_fast.measure.contenders import CONTENDERS, contender_names, measure
from blockdrop_fast.measure.published import PUBLISHED
from blockdrop_fast.measure.workload import make_workload

DECISIONS = Path(__file__).with_name("decisions")


def committed_decisions(network: str) -> torch.Tensor:
    """(1024, K) bool, from benchmarks/decisions/."""
    packed = np.load(DECISIONS / f"{network}.npy")
    bits = np.unpackbits(packed, axis=1, count=PUBLISHED[network].num_blocks)
    return torch.from_numpy(bits).bool()


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("network", PUBLISHED)
def test_inference(network, batch, contender, quick, once, report, benchmark):
    benchmark.group = f"{network} batch {batch}"
    names = contender_names(quick)
    run = plan_runs([network], (), quick)[0]
    if contender not in names or batch not in run.batches:
        pytest.skip("not in this form of the benchmark")
    workload = once(
        network, lambda: make_workload(network, run.images, committed_decisions(network))
    )
    measurement = once(
        (network, batch),
        lambda: measure(workload, batch, names, rounds=run.rounds, min_seconds=run.min_seconds),
    )
    if contender in measurement.unavailable:
        pytest.skip(measurement.unavailable[contender])
    row = next(row for row in measurement.rows if row.contender == contender)
    usage = workload.decisions.sum(1).double()
    report(
        row.samples,
        images_per_second=row.images_per_second,
        flops=row.flops,
        speedup_over_fastest_baseline=row.speedup,
        flop_bound=row.flop_bound,
        share_of_bound=row.share_of_bound,
        share_of_own_bound=row.share_of_own_bound,
        block_usage=[float(usage.mean()), float(usage.std(correction=0))],
        decisions=f"benchmarks/decisions/{network}.npy",
    )
