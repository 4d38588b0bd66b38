"""Measuring the crossover table."""

from __future__ import annotations

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.executors.crossover import Cell, Crossover
from blockdrop_fast.measure import calibration, timing
from blockdrop_fast.measure.workload import random_workload


@pytest.fixture
def subject() -> calibration.Subject:
    torch.manual_seed(0)
    keep = torch.rand(64, 3) < 0.5
    return calibration.subject_of(random_workload("resnet8", bdf.resnet_cifar(8), keep, 8))


@pytest.mark.slow
def test_calibrate_measures_every_cell(subject):
    lines = []
    cells = calibration.calibrate(
        subject, (1, 16), keep_rates=(0.34, 0.67, 1.0), rounds=2, say=lines.append
    )
    assert [(cell.batch, cell.keep) for cell in cells] == [
        (batch, keep) for batch in (1, 16) for keep in (0.34, 0.67, 1.0)
    ]
    expected = {"dense", "gather", "auto"} | ({"walk"} if subject.walk else set())
    for cell in cells:
        assert set(cell.seconds) == expected
        assert all(value > 0 for value in cell.seconds.values())
    assert len(lines) == 1 + len(cells)
    assert Crossover(tuple(cells), "test").walk_wins(16) is (
        None if subject.walk is None else cells_won(cells, 16)
    )


def cells_won(cells, batch):
    return all(
        cell.seconds["walk"] <= min(cell.seconds["dense"], cell.seconds["gather"])
        for cell in cells
        if cell.batch == batch
    )


@pytest.mark.parametrize("slow", ["gather", "dense"])
def test_auto_is_measured_where_dense_wins_somewhere(subject, monkeypatch, slow):
    """Times are made up here: only which strategies are asked for, and what becomes of them."""
    asked = []

    def fake(contenders, *_, **__):
        names = [contender.name for contender in contenders]
        asked.append(names)
        seconds = {name: 2.0 if name == slow else 1.0 for name in names}
        return timing_of(seconds)

    def timing_of(seconds):
        samples = {name: [value] for name, value in seconds.items()}
        return timing.Timed(samples, {}, {})

    monkeypatch.setattr(timing, "time_contenders", fake)
    without_walk = calibration.Subject(subject.backbone, subject.folded, subject.images, None)
    cells = calibration.calibrate(
        without_walk, (8,), keep_rates=(0.5, 1.0), rounds=1, say=lambda _: None
    )
    first = [["dense", "gather"]] * 2
    assert asked == first + ([["dense", "auto"]] * 2 if slow == "gather" else [])
    assert [cell.seconds["auto"] for cell in cells] == [1.0, 1.0]


def test_verdict_names_the_worst_cell():
    cells = [
        Cell(1, 0.5, {"dense": 1.0, "gather": 0.5, "auto": 0.5}),
        Cell(8, 1.0, {"dense": 2.0, "gather": 2.1, "auto": 2.1}),
    ]
    assert calibration.verdict(cells[:1]).startswith("no cell is slower")
    assert "a cell is slower" in calibration.verdict(cells)
    assert "1.050 of its time (batch 8, keep rate 1.000)" in calibration.verdict(cells)
