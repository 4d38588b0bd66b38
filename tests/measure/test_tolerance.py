"""The rule that says which logits are right."""

from __future__ import annotations

import pytest
import torch

from blockdrop_fast.measure import tolerance
from blockdrop_fast.measure.tolerance import make_reference


def test_reference_in_chunks(workload, monkeypatch):
    whole = make_reference(
        workload.model.backbone, workload.images, workload.decisions, torch.float32
    )
    monkeypatch.setattr(tolerance, "REFERENCE_CHUNK", 24)
    split = make_reference(
        workload.model.backbone, workload.images, workload.decisions, torch.float32
    )
    torch.testing.assert_close(split.logits, whole.logits, rtol=1e-12, atol=1e-12)
    assert split.tolerance == pytest.approx(whole.tolerance, rel=0.5)


def test_tolerance_follows_the_rule(workload):
    reference = workload.at_decisions
    backbone, images, keep = workload.model.backbone, workload.images, workload.decisions
    eager = backbone(images, keep)
    exact = backbone.double()(images.double(), keep)
    error = float((eager.double() - exact).abs().max())
    eps = torch.finfo(torch.float32).eps
    assert torch.allclose(reference.logits, exact, rtol=1e-12, atol=1e-12)
    assert reference.tolerance == pytest.approx(
        2 * error + 4 * eps * float(exact.abs().max()), rel=1e-6
    )
