"""Wrong command lines of ``python -m train``: one line, before any work, that names what it is."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import blockdrop_fast as bdf
from train import __main__ as command_line
from train.ranges import check_ranges
from train.stages import PRESETS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    bdf.save(bdf.resnet_cifar(8), folder / "backbone.safetensors")
    bdf.save(bdf.resnet_cifar(8, num_classes=3), folder / "three.safetensors")
    cascade = bdf.Cascade([bdf.resnet_cifar(8), bdf.resnet_cifar(14)])
    cascade.set_thresholds([0.5])
    bdf.save(cascade, folder / "cascade.safetensors")
    return folder


WRONG = [
    ("pretrain --epochs 0", "epochs: expected at least 1, got 0"),
    ("pretrain --batch-size 0", "batch_size: expected at least 1, got 0"),
    ("pretrain --limit -5", "limit: expected at least 1, got -5"),
    ("pretrain --threads 0", "threads: expected at least 1, got 0"),
    ("pretrain --workers -1", "workers: expected at least 0, got -1"),
    ("pretrain --checkpoint-every 0", "checkpoint_every: expected at least 1, got 0"),
    ("pretrain --lr nan", "lr: expected at least 0, got nan"),
    ("pretrain --drop-rate 3", "drop_rate: expected 0 to 1, got 3.0"),
    ("pretrain --temperature 0", "temperature: expected more than 0, got 0.0"),
    ("pretrain --device tpu", "device: expected cpu, cuda, … or auto, got 'tpu'"),
    ("pretrain --device cuda", "device: 'cuda', but torch finds no GPU"),
    ("curriculum --backbone F/backbone.safetensors --alpha 7", "alpha: expected 0 to 1, got 7.0"),
    ("curriculum --backbone F/three.safetensors", "data: digits has 10 classes, but the network"),
    ("exits --backbone F/three.safetensors --held-out 9", "data: digits has 10 classes, but"),
    ("expert --backbone F/backbone.safetensors --budget 9", "budget: expected from 0 to 3 blocks"),
    ("heuristics --model F/cascade.safetensors --keep 1", "cascade.safetensors runs until an imag"),
    ("recipe --preset quick --budget 16", "budget: expected from 0 to 15 blocks, got 16"),
    ("recipe --preset quick --budget -3", "budget: expected from 0 to 15 blocks, got -3"),
    ("recipe --preset quick --budget 4 --init F/backbone.safetensors", "from 0 to 3 blocks, got 4"),
    ("reproduce --preset quick --rounds 0", "rounds: expected at least 1, got 0"),
    ("demo --batches 1 0", r"batches: expected at least 1, got (1, 0)"),
    ("demo --budget 99", "budget: expected from 0 to 15 blocks, got 99"),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_one_line_before_any_work(line, message, files, tmp_path, monkeypatch, capsys):
    if "--device cuda" in line and torch.cuda.is_available():
        pytest.skip("there is one")
    words = line.replace("F/", f"{files}/").split()
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["train", *words, "--out", str(out)])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    said = str(stopped.value)
    assert said.startswith(f"{words[0]}: ")
    assert message in said
    assert "\n" not in said
    assert "epoch" not in capsys.readouterr().out.replace("epochs", "")
    assert not list(out.rglob("*.safetensors"))


def test_an_unknown_stage_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "pretrian"])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().out.startswith("train: unknown stage 'pretrian'\nusage: ")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_in_range(preset):
    for config in PRESETS[preset].values():
        check_ranges(config)


@pytest.mark.slow
def test_an_interrupted_run_says_how_it_goes_on(tmp_path):
    """Ctrl-C behind the first checkpoint, in a process as a user has it."""
    out, words = tmp_path / "out", ["pretrain", "--arch", "resnet8", "--batch-size", "64"]
    command = [sys.executable, "-m", "train", *words, "--threads", "1", "--limit", "128"]
    command += ["--out", str(out), "--epochs"]
    run = subprocess.Popen(
        [*command, "10000"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not (out / "state.pt").exists():
        assert run.poll() is None
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=300)[1]
    assert run.returncode == 130
    assert "Traceback" not in said
    goes_on = f"--resume goes on from the last checkpoint in {out}, if there is one"
    assert said.splitlines()[-1] == f"pretrain: interrupted; {goes_on}"
    assert torch.load(out / "state.pt", weights_only=True)["epoch"] >= 1
    assert not list(out.glob(".*"))
