"""Workloads, and policy networks that decide as wanted."""

from __future__ import annotations

import torch

from blockdrop_fast.measure.contenders import CONTENDERS, build
from blockdrop_fast.measure.workload import fit_policy


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


def test_workloads_share_engines_and_what_is_slow_to_build(workload, monkeypatch):
    built = []
    slow = ("baseline", lambda *_: built.append(1) or len(built))
    monkeypatch.setitem(CONTENDERS, "compile", slow)
    images = workload.images[:8]
    assert build("compile", workload, images) == build("compile", workload.first(8), images) == 1
    assert build("compile", workload, images[:4]) == 2
    assert workload.engine("gather") is workload.at(~workload.decisions).engine("gather")
    assert workload.first(8).images.shape == workload.images[:8].shape
