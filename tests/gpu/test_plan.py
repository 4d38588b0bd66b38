"""The plan's CUDA kernel on a GPU: `make gpu-check`. Everywhere else these tests are skipped."""

from __future__ import annotations

import pytest
import torch

from blockdrop_fast.ops import plan, plan_reference
from tests.gpu.conditions import on_gpu
from tests.random_networks import random_decisions

pytestmark = on_gpu
SANITIZED = [(1, 1), (33, 54)]
CASES = [pytest.param(*case, marks=pytest.mark.sanitizer) for case in SANITIZED]
CASES += [(1500, 54), (70, 11000)]


@pytest.mark.parametrize(("batch", "blocks"), CASES)
def test_small_plan_like_reference(batch, blocks):
    decisions = random_decisions(torch.Generator().manual_seed(0), batch, blocks).cuda()
    for result, expected in zip(plan(decisions), plan_reference(decisions.cpu()), strict=True):
        assert torch.equal(result.cpu(), expected)
