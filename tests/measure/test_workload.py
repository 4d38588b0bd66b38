"""Workloads, and policy networks that decide as wanted."""

from __future__ import annotations

import pytest
import torch

from blockdrop_fast.measure.contenders import CONTENDERS, build
from blockdrop_fast.measure.published import PUBLISHED, published_decisions, scaled_decisions
from blockdrop_fast.measure.workload import fit_policy, make_workload


def test_fitted_policy_keeps_each_block_as_often(workload):
    fitted = fit_policy(workload)
    with torch.no_grad():
        own = fitted.model(fitted.images).decisions
        before = workload.model(workload.images).decisions
    given = fitted.decisions
    assert torch.equal(given, workload.decisions)
    # An image's logit may be on the threshold.
    assert (own.sum(0) - given.sum(0)).abs().max() <= 1
    assert (own == given).double().mean() > (before == given).double().mean() + 0.1


def test_fitted_policy_meets_few_policies_exactly(workload):
    pool = torch.tensor([[0, 0, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1]]).bool()
    fitted = fit_policy(workload.at(pool[torch.arange(64) % 4]))
    with torch.no_grad():
        assert torch.equal(fitted.model(fitted.images).decisions, fitted.decisions)


def test_a_network_without_published_usage_keeps_another_ones_share():
    few = make_workload("resnet20", 64)
    assert few.decisions.shape == (64, 9)
    share = PUBLISHED["resnet110"].mean / 54
    assert few.decisions.double().mean() == pytest.approx(share, abs=0.05)
    with pytest.raises(ValueError, match="images: expected at most 3, got 4"):
        make_workload("resnet20", 4, few.decisions[:3])
    with pytest.raises(ValueError, match=r"arch: expected resnet18, .* got 'vgg16'"):
        make_workload("vgg16", 4)


@pytest.mark.parametrize("num_blocks", [8, 16, 50])
def test_scaled_decisions(num_blocks):
    decisions = scaled_decisions("resnet101", num_blocks)
    assert decisions.shape == (1024, num_blocks)
    assert len(decisions.unique(dim=0)) <= 10
    share = PUBLISHED["resnet101"].mean / 33
    assert decisions.double().mean() == pytest.approx(share, abs=0.5 / num_blocks)
    assert torch.equal(scaled_decisions("resnet101", 33), published_decisions("resnet101"))


def test_workloads_share_engines_and_what_is_slow_to_build(workload, monkeypatch):
    built = []
    slow = ("baseline", lambda *_: built.append(1) or len(built))
    monkeypatch.setitem(CONTENDERS, "compile", slow)
    images = workload.images[:8]
    assert build("compile", workload, images) == build("compile", workload.first(8), images) == 1
    assert build("compile", workload, images[:4]) == 2
    assert workload.engine("gather") is workload.at(~workload.decisions).engine("gather")
    assert workload.first(8).images.shape == workload.images[:8].shape
