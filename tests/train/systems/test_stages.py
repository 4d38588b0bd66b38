"""The systems are stages of ``python -m train``, in every preset."""

import sys

import pytest

from train import __main__ as command
from train.systems import config


def test_presets_have_all_systems():
    for name, options in config.PRESETS.items():
        assert options.keys() == config.SYSTEMS.keys() <= command.STAGES.keys()
        assert command.PRESETS[name].keys() == command.STAGES.keys()
        for stage, kind in config.SYSTEMS.items():
            assert type(options[stage]) is kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cascade"], "cascade: networks: expected two or more, got 0"),
        (["exits"], "exits: backbone: a backbone checkpoint is required"),
        (["halting", "--tau", "0.1"], "halting: backbone and model: expected one of the two"),
        (["sequential", "--joint"], "sequential: joint: expected --model, a checkpoint of"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", *arguments, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert str(stopped.value).startswith(message)
    assert "\n" not in str(stopped.value)
