"""The crossover table: reading it, keeping it in a file, and measuring it."""

from __future__ import annotations

import json
import math

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.executors import crossover, measured
from blockdrop_fast.executors.crossover import NEVER, Cell, Crossover

CONFIG = bdf.resnet_cifar(8).config


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Neither the user's tables nor packaged ones reach these tests."""
    monkeypatch.setenv(measured.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "PACKAGED", tmp_path / "gpus")
    return tmp_path / "cache" / crossover.FILE_NAME


def make_cells(batch: int, gather: dict[float, float], walk: float | None = None) -> list[Cell]:
    """Dense takes 1 second, gather as given for each keep rate."""
    more = {} if walk is None else {"walk": walk}
    return [Cell(batch, keep, {"dense": 1.0, "gather": g, **more}) for keep, g in gather.items()]


def table(*cells: Cell) -> Crossover:
    return Crossover(tuple(cells), "test")


@pytest.mark.parametrize(
    ("gather", "expected"),
    [
        ({0.25: 0.3, 0.5: 0.6, 0.75: 0.9, 1.0: 1.2}, NEVER),  # at 1 nothing has to be gathered
        ({1.0: 2.0}, NEVER),
        ({0.25: 0.5, 0.75: 2.0, 1.0: 1.0}, 0.5),  # half as long, twice as long: half way
        ({0.25: 0.5, 0.5: 1.0, 0.75: 2.0}, 0.5),
        ({0.25: 1.5, 0.5: 0.9, 0.75: 1.2}, pytest.approx(0.59, abs=0.01)),
        ({0.25: 1.1, 0.75: 1.2}, 0.25),  # lower keep rates were not measured
    ],
)
def test_dense_from(gather, expected):
    assert table(*make_cells(8, gather)).dense_from(8) == expected


def test_the_nearest_batch_size_counts():
    measured = table(
        *make_cells(1, {0.5: 0.5}, walk=0.4),
        *make_cells(64, {0.5: 2.0}, walk=1.1),
        *make_cells(256, {0.5: 2.0}),
    )
    assert [measured.dense_from(batch) for batch in (1, 7, 9, 64, 1000)] == [
        2.0,
        2.0,
        0.5,
        0.5,
        0.5,
    ]
    assert [measured.walk_wins(batch) for batch in (1, 64, 1000)] == [True, False, None]
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        measured.dense_from(0)


def test_the_walk_has_to_win_at_every_keep_rate():
    cells = make_cells(8, {0.25: 0.2, 0.5: 0.7}, walk=0.5)
    assert table(*cells).walk_wins(8) is False
    assert table(cells[1]).walk_wins(8) is True
    assert table(*cells).walk_loses_somewhere()
    assert not table(cells[1], *make_cells(64, {0.5: 0.1})).walk_loses_somewhere()
    assert table(cells[1]).walk_wins_somewhere()
    assert not table(*cells).walk_wins_somewhere()
    assert not table(*make_cells(64, {0.5: 0.1})).walk_wins_somewhere()


def test_saved_tables_are_merged_and_found(cache):
    assert crossover.load(CONFIG, torch.float32, "cpu") is None
    first = make_cells(1, {0.5: 0.6}) + make_cells(8, {0.5: 0.7})
    assert crossover.save(CONFIG, torch.float32, "cpu", first) == cache
    again = make_cells(8, {0.5: 0.8, 0.75: 1.5})
    crossover.save(CONFIG, torch.float32, "cpu", again)
    other = make_cells(8, {0.5: 0.1})
    crossover.save(CONFIG, torch.bfloat16, "cpu", other)
    found = crossover.load(CONFIG, torch.float32, "cpu")
    assert list(found.cells) == first[:1] + again
    assert str(cache) in found.source
    assert list(crossover.load(CONFIG, torch.bfloat16, "cpu").cells) == other
    # The number of classes does not matter, everything else does.
    classes = bdf.resnet_cifar(8, num_classes=100).config
    assert crossover.load(classes, torch.float32, "cpu") == found
    assert crossover.load(bdf.resnet_cifar(14).config, torch.float32, "cpu") is None
    assert crossover.load(CONFIG, torch.float16, "cpu") is None
    assert json.loads(cache.read_text())["entries"][0]["machine"]["torch"] == torch.__version__


def test_the_number_of_threads_is_part_of_the_device():
    crossover.save(CONFIG, torch.float32, "cpu", make_cells(1, {0.5: 0.6}))
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert crossover.load(CONFIG, torch.float32, "cpu") is None
    finally:
        torch.set_num_threads(before)


def test_the_users_table_precedes_the_packaged_one(cache):
    packaged = make_cells(1, {0.5: 0.6})
    packaged_file = measured.PACKAGED / "some-gpu" / crossover.FILE_NAME
    crossover.save(CONFIG, torch.float32, "cpu", packaged, packaged_file)
    found = crossover.load(CONFIG, torch.float32, "cpu")
    assert list(found.cells) == packaged
    assert str(packaged_file) in found.source
    own = make_cells(1, {0.5: 0.9})
    crossover.save(CONFIG, torch.float32, "cpu", own)
    assert list(crossover.load(CONFIG, torch.float32, "cpu").cells) == own


def spoiled(change) -> str:
    key = crossover._key(CONFIG, torch.float32, torch.device("cpu"))
    cell = {"batch": 1, "keep": 0.5, "seconds": {"dense": 1.0, "gather": 0.5}}
    content = {
        "format": crossover.FORMAT,
        "entries": [{"key": key, "measured": "2026-01-01", "machine": {}, "cells": [cell]}],
    }
    change(content, content["entries"][0], cell)
    return json.dumps(content)


SPOILED = {
    "half": lambda: spoiled(lambda *_: None)[:-20],
    "binary": lambda: "\0\1",
    "list": lambda: "[1, 2]",
    "other json": lambda: '{"name": "something else"}',
    "newer": lambda: spoiled(lambda content, *_: content.update(format="crossover 9")),
    "no cells": lambda: spoiled(lambda _, entry, cell: entry.update(cells=[])),
    "no gather": lambda: spoiled(lambda _, entry, cell: cell["seconds"].pop("gather")),
    "zero": lambda: spoiled(lambda _, entry, cell: cell["seconds"].update(dense=0)),
    "nan": lambda: spoiled(lambda _, entry, cell: cell["seconds"].update(dense=math.nan)),
    "text": lambda: spoiled(lambda _, entry, cell: cell.update(batch="many")),
    "entry": lambda: spoiled(lambda content, *_: content.update(entries=["x"])),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_a_corrupt_or_foreign_file_is_warned_of_and_kept_aside(cache, fault):
    cache.parent.mkdir()
    cache.write_text(SPOILED[fault]())
    with pytest.warns(UserWarning, match=r"crossover\.json is no file of the format"):
        assert crossover.load(CONFIG, torch.float32, "cpu") is None
    cells = make_cells(1, {0.5: 0.6})
    with pytest.warns(UserWarning, match="is no file of"):
        crossover.save(CONFIG, torch.float32, "cpu", cells)
    assert list(crossover.load(CONFIG, torch.float32, "cpu").cells) == cells
    assert cache.with_name("crossover.json.unreadable").read_text() == SPOILED[fault]()


def test_an_unspoiled_file_is_read(cache, recwarn):
    cache.parent.mkdir()
    cache.write_text(spoiled(lambda *_: None))
    assert crossover.load(CONFIG, torch.float32, "cpu").dense_from(1) == NEVER
    assert not recwarn.list
