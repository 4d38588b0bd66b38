"""Every contender gives right logits, and what is read off its samples."""

from __future__ import annotations

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.measure import baselines, timing
from blockdrop_fast.measure.contenders import CONTENDERS, format_rows, measure
from blockdrop_fast.measure.workload import Workload, fit_policy

PACKAGES = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino", "onnx")}


@pytest.mark.parametrize("name", [name for name in CONTENDERS if name != "compile"])
def test_every_contender_gives_right_logits(workload, name):
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package)
    kind, build = CONTENDERS[name]
    for batch in (1, 64):
        batches = timing.chunks(batch, workload.images, workload.decisions)
        try:
            call = build(workload, batches[0][0])
        except baselines.UnavailableError as error:
            pytest.skip(str(error))
        executed = timing.check_contender(
            timing.Contender(name, call, kind),
            batches,
            workload.all_kept,
            workload.at_decisions,
            workload.check_own,
        )
        if kind == "blockdrop":
            assert torch.equal(executed, workload.decisions)
        else:
            assert (executed is None) == (kind != "decides")


def test_measure_reads_its_samples(workload, monkeypatch):
    def unavailable(*_):
        raise baselines.UnavailableError("not here")

    monkeypatch.setitem(CONTENDERS, "openvino", ("baseline", unavailable))
    names = ["eager", "openvino", "gather", "gather-all"]
    measured = measure(workload, 16, names, rounds=3)
    assert measured.unavailable == {"openvino": "not here"}
    rows = {row.contender: row for row in measured.rows}
    assert list(rows) == ["eager", "gather", "gather-all"]
    for row in rows.values():
        assert len(row.samples) == 3
        assert row.seconds == sorted(row.samples)[1]
        assert row.images_per_second == pytest.approx(16 / row.seconds)
        assert row.speedup == pytest.approx(rows["eager"].seconds / row.seconds)
        assert row.share_of_bound == pytest.approx(row.speedup / row.flop_bound)
    complete = float(bdf.flops(workload.model.backbone, image_size=8))
    means = bdf.flops(workload.model, workload.decisions, image_size=8).view(4, 16).mean(1)
    assert rows["eager"].flops == complete
    # Three rounds ran the first three batches, policy network included.
    assert rows["gather"].flops == pytest.approx(float(means[:3].median()))
    assert rows["gather"].flop_bound == pytest.approx(complete / rows["gather"].flops)
    own = rows["gather-all"].seconds / rows["gather"].seconds / rows["gather"].flop_bound
    assert rows["gather"].share_of_own_bound == pytest.approx(own)
    assert rows["eager"].share_of_own_bound is None
    table = format_rows(measured.rows)
    assert all(name in table for name in rows)


def test_a_contender_that_decides_is_read_at_its_own_decisions(workload):
    workload = fit_policy(workload)
    measured = measure(workload, 32, ["eager", "gather-all", "gather-decides"], rounds=2)
    row = measured.rows[-1]
    with torch.no_grad():
        decisions = workload.model(workload.images).decisions
    cost = bdf.flops(workload.model, decisions, image_size=8).view(2, 32).mean(1)
    assert row.flops == pytest.approx(float(cost.mean()))
    assert row.block_usage[0] == pytest.approx(float(decisions.sum(1).double().mean()))
    assert row.policies == len(decisions.unique(dim=0))
    assert row.share_of_own_bound > 0
    assert row.host_seconds is None


def test_a_strategy_that_does_not_serve_a_network_is_unavailable(workload):
    pytest.importorskip("blockdrop_fast._C")
    doubled = Workload(
        "float64", workload.model.double(), workload.images.double(), workload.decisions
    )
    measured = measure(doubled, 64, ["eager", "walk"], rounds=1)
    assert [row.contender for row in measured.rows] == ["eager"]
    assert "supports torch.float32 only" in measured.unavailable["walk"]


def test_measure_needs_a_baseline_and_known_names(workload):
    with pytest.raises(ValueError, match="at least one complete baseline"):
        measure(workload, 64, ["gather"], rounds=1)
    with pytest.raises(ValueError, match=r"contenders: expected names out of .*got 'nothing'"):
        measure(workload, 64, ["nothing"], rounds=1)
