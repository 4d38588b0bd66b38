"""benchmarks/guard.py: ratios are recorded, and a fall is found."""

import json

import pytest

from benchmarks import guard
from benchmarks.guard import CASES, RECORD, Arguments
from blockdrop_fast.machine import cpu_model


def test_a_fall_of_more_than_a_fifth_fails(tmp_path, capsys):
    file = tmp_path / "guard.json"
    cases = {"one": lambda: 5.0, "two": lambda: 2.0}
    assert guard.run(Arguments(record=True, file=file), cases) == []
    assert json.loads(file.read_text())[cpu_model()]["ratios"] == {"one": 5.0, "two": 2.0}
    assert guard.run(Arguments(file=file), cases | {"one": lambda: 4.01}) == []
    lines = guard.run(Arguments(file=file), cases | {"one": lambda: 3.99})
    assert lines == ["one: 3.99x, 5.00x was recorded"]
    assert "two: 2.00x, recorded 2.00x" in capsys.readouterr().out
    assert guard.run(Arguments(file=file, only=("two",)), cases | {"one": lambda: 1.0}) == []


def test_recording_some_cases_keeps_the_others(tmp_path):
    file = tmp_path / "guard.json"
    file.write_text(json.dumps({cpu_model(): {"ratios": {"one": 5.0, "two": 2.0}}}))
    guard.run(Arguments(record=True, file=file, only=("one",)), {"one": lambda: 6.0})
    assert json.loads(file.read_text())[cpu_model()]["ratios"] == {"one": 6.0, "two": 2.0}


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', '{"a": {"ratios": 1}}'])
def test_other_files_are_refused_and_stay(tmp_path, content):
    file = tmp_path / "guard.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="was not written by this benchmark"):
        guard.run(Arguments(record=True, file=file), {"one": lambda: 1.0})
    assert file.read_text() == content


def test_without_a_record_it_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="--record"):
        guard.run(Arguments(file=tmp_path / "guard.json"), {"one": lambda: 1.0})
    with pytest.raises(ValueError, match="only: no case of one"):
        guard.run(Arguments(only=("three",)), {"one": lambda: 1.0})


def test_the_command_fails_where_something_has_fallen(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "run", lambda arguments: ["one: 1.00x, 2.00x was recorded"])
    with pytest.raises(SystemExit, match="slower by more than 20%"):
        guard.main(Arguments(file=tmp_path / "guard.json"))


@pytest.mark.slow
def test_a_case_measures():
    assert CASES["resnet32, batch 1, walk over eager"]() > 0


def test_what_is_recorded_are_cases():
    records = json.loads(RECORD.read_text())
    assert records
    for recorded in records.values():
        assert recorded["ratios"].keys() == CASES.keys()
