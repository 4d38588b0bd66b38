"""The decisions of the published block usage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.measure.published import PUBLISHED, fits, published_decisions

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("network", PUBLISHED)
def test_committed_decisions_have_the_published_usage(network):
    usage, decisions = PUBLISHED[network], published_decisions(network)
    packed = np.load(ROOT / "benchmarks" / "decisions" / f"{network}.npy")
    committed = np.unpackbits(packed, axis=1, count=usage.num_blocks)
    assert (torch.from_numpy(committed).bool() == decisions).all()
    assert decisions.shape == (1024, usage.num_blocks)
    assert fits(usage, decisions)


def test_published_numbers_of_policies_and_flops():
    different = {name: len(published_decisions(name).unique(dim=0)) for name in PUBLISHED}
    assert different["resnet101"] == 10
    assert 300 <= different["resnet110"] <= 469
    # Table 3 with the policy network: 1.81e8; at equal usage the blocks kept matter by a few
    # per cent, as a segment's first block is cheaper.
    model = bdf.BlockDrop(bdf.resnet110(), bdf.policy_resnet8(54))
    mean = float(bdf.flops(model, published_decisions("resnet110")).mean())
    assert mean == pytest.approx(1.81e8, rel=0.05)


def test_published_decisions_of_an_unknown_network():
    with pytest.raises(ValueError, match=r"network: expected one of resnet32.*got 'resnet7'"):
        published_decisions("resnet7")
