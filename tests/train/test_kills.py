"""A few kills of two stages; `make kills` has ten of each, and all of them."""

import os
import subprocess
import sys

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.networks.checkpoint_files import write_torch
from tests.kills import cases
from tests.kills.contents import contents, differences
from tests.kills.processes import ROOT
from tests.random_networks import CIFAR, make_network


def test_every_stage_has_a_case(monkeypatch):
    cases.check_coverage()
    monkeypatch.setitem(cases.STAGES, "new", None)
    with pytest.raises(AssertionError, match="no case for stage new"):
        cases.check_coverage()


def test_one_bit_is_a_difference():
    whole = {
        "state.pt": {"model": {"a": torch.tensor([0.0, 1.0])}, "epoch": 2},
        "metrics.json": [{"loss": 0.5, "images_per_second": 7.0}],
    }
    same = {
        "state.pt": {"model": {"a": torch.tensor([0.0, 1.0])}, "epoch": 2},
        "metrics.json": [{"loss": 0.5, "images_per_second": 8.0}],
    }
    assert differences(whole, same) == []
    same["state.pt"]["model"]["a"][0] = -0.0
    same["metrics.json"][0]["loss"] = 0.6
    same["more"] = 1
    assert differences(whole, same) == [
        "/state.pt/model/a differs",
        "/metrics.json/0/loss differs",
        "/more is in one alone",
    ]


def test_half_a_file_is_found(tmp_path):
    bdf.save(make_network(CIFAR), tmp_path / "model.safetensors")
    write_torch({"epoch": 1, "config": "{}"}, tmp_path / "state.pt")
    (tmp_path / "metrics.json").write_text('[{"epoch": 1}]')
    (tmp_path / ".state.pt.abcdefgh").write_text("half")
    assert len(contents(tmp_path)) == 3
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(AssertionError, match=r"state\.pt is newer than the metrics"):
        contents(tmp_path)
    for name in ("metrics.json", "state.pt", "model.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-1])
        with pytest.raises(AssertionError, match=f"{name} cannot be read"):
            contents(tmp_path)
        (tmp_path / name).write_bytes(whole)


def kills(*options):
    """The last line of some kills that all went well."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_resume_after_kill_9_continues_to_the_same_result():
    """With this seed, both are first killed at a write after the first checkpoint."""
    line = kills("--kills", "2", "--seed", "11", "--cases", "pretrain", "curriculum")
    assert "'at a write': 2" in line


@pytest.mark.slow
def test_two_processes_continue_to_the_same_result():
    """Killed at a write, under torchrun, and one at a time by who torchrun starts them again."""
    line = kills("--kills", "2", "--cases", "curriculum, by two")
    assert "'at a write': 1" in line
    assert "'under torchrun, all': 1" in line
    assert "restarted by torchrun" in line
