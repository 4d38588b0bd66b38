"""The comparison of estimators, in seconds on digits: what it writes, and what it does not redo."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import blockdrop_fast as bdf
from benchmarks import estimators
from tests.random_networks import make_cifar_network


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.delenv("BLOCKDROP_DATA", raising=False)
    bdf.save(make_cifar_network((1, 1, 1)), tmp_path / "backbone.safetensors")
    threads = torch.get_num_threads()
    yield estimators.Arguments(
        backbone=tmp_path / "backbone.safetensors",
        minutes=0.01,
        interval=0.004,
        estimators=("rloo",),
        images=50,
        batch_size=16,
        threads=1,
        out=tmp_path / "comparison",
    )
    torch.set_num_threads(threads)


def test_every_estimator_has_options():
    assert tuple(estimators.OPTIONS) == estimators.Estimator.__args__


@pytest.mark.slow
def test_estimators_are_added_and_not_run_again(arguments):
    estimators.main(arguments)
    path = arguments.out.with_suffix(".json")
    first = json.loads(path.read_text())["estimators"]
    estimators.main(replace(arguments, estimators=("rloo", "flips")))
    both = json.loads(path.read_text())["estimators"]
    assert list(both) == ["rloo", "flips"]
    assert both["rloo"] == first["rloo"]
    for run in both.values():
        points = run["points"]
        assert points[0]["minutes"] == points[0]["images"] == 0
        assert points[0]["test_reward"] == first["rloo"]["points"][0]["test_reward"]
        assert points[-1]["minutes"] >= arguments.minutes > points[-2]["minutes"]
        assert points[-1]["images"] > points[1]["images"] > 0
    assert arguments.out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"^out: .*alpha 0\.8 -> 0\.9"):
        estimators.main(replace(arguments, alpha=0.9))
