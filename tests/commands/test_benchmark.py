"""``blockdrop benchmark``."""

from __future__ import annotations

import json

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.commands import benchmark, cli
from blockdrop_fast.commands.benchmark import plan_runs
from blockdrop_fast.executors import crossover, measured
from blockdrop_fast.measure.contenders import contender_names
from tests.random_networks import make_gated_model, make_model


@pytest.fixture
def model() -> bdf.BlockDrop:
    return make_model()[0]


def test_quick_form_leaves_the_slow_cases_out():
    assert "compile" in contender_names(quick=False)
    assert "compile" not in contender_names(quick=True)
    assert "cudnn-graph" not in contender_names(quick=False)
    on_gpu = contender_names(quick=False, on_gpu=True)
    assert {"cudnn-graph", "walk-decides", "gather-decides", "compile"} < set(on_gpu)
    assert "openvino" not in on_gpu
    (run,) = plan_runs(["resnet101"], (), quick=True, on_gpu=True)
    assert (run.batches, run.images) == ((1, 8, 64, 256), 256)
    small, large = plan_runs(["resnet110", "resnet101"], (), quick=True)
    assert small.batches == (1, 8, 64)
    assert large.batches == (1, 8)
    full = plan_runs(["resnet110", "resnet101"], (), quick=False)
    assert [run.batches for run in full] == [(1, 8, 64, 256), (1, 8, 64)]
    for network in ("wide_resnet50_2", "resnext101_64x4d"):
        for quick in (False, True):
            (like,), (run,) = (plan_runs([one], (), quick) for one in ("resnet101", network))
            assert (run.batches, run.images) == (like.batches, like.images)
    for run in (small, large, *full, *plan_runs(["resnet32"], (3, 100), quick=False)):
        assert all(run.images % batch == 0 for batch in run.batches)


@pytest.mark.slow
def test_command_on_a_checkpoint(model, tmp_path, capsys):
    torch.manual_seed(0)
    path = tmp_path / "small.safetensors"
    bdf.save(model, path)
    out = tmp_path / "out.json"
    benchmark.command(str(path), batch=(32,), quick=True, contenders=("eager", "gather"), json=out)
    printed = capsys.readouterr().out
    assert "small" in printed
    assert "gather" in printed
    written = json.loads(out.read_text())
    assert [row["contender"] for row in written["rows"]] == ["eager", "gather"]
    assert written["machine"]["torch"] == torch.__version__


@pytest.mark.slow
def test_command_at_a_density(model, tmp_path, capsys):
    path, out = tmp_path / "small.safetensors", tmp_path / "out.json"
    bdf.save(model, path)
    names = ("eager", "gather")
    benchmark.command(str(path), (32,), True, names, json=out, density=0.5)
    kept = round(model.backbone.num_blocks / 2)
    assert f"random blocks, density 0.5; 64 images, {kept}.0" in capsys.readouterr().out
    (_, row) = json.loads(out.read_text())["rows"]
    assert row["block_usage"] == [kept, 0]


def test_bad_density():
    with pytest.raises(ValueError, match=r"density: expected 0 to 1, got 1.5"):
        benchmark.command("resnet32", density=1.5)
    with pytest.raises(ValueError, match="density: --calibrate has its own"):
        benchmark.command("resnet32", density=0.5, calibrate=True)


def test_command_refuses_other_models(model, tmp_path):
    path = tmp_path / "backbone.safetensors"
    bdf.save(model.backbone, path)
    with pytest.raises(ValueError, match="holds no policy network"):
        benchmark.command(str(path), batch=(1,))
    bdf.save(make_gated_model("exits")[0], path)
    with pytest.raises(ValueError, match="this model decides on the way"):
        benchmark.command(str(path), batch=(1,))
    with pytest.raises(ValueError, match="batch: expected positive"):
        benchmark.command("resnet32", batch=(0,))
    with pytest.raises(FileNotFoundError, match=r"json: the folder '.*no' does not exist"):
        benchmark.command("resnet32", json=tmp_path / "no" / "times.json")


def test_command_refuses_devices_that_are_not_here(monkeypatch):
    for device in ("abacus", "meta"):
        with pytest.raises(ValueError, match=f"device: expected cpu or cuda, got '{device}'"):
            benchmark.command("resnet32", device=device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device: torch .* finds no GPU here, got 'cuda'"):
        benchmark.command("resnet32", device="cuda")


@pytest.mark.slow
def test_command_line_knows_the_options(model, tmp_path, capsys):
    path = tmp_path / "small.safetensors"
    bdf.save(model, path)
    call = ["benchmark", "--model", str(path), "--batch", "16", "--quick", "--dtype", "bfloat16"]
    assert cli.main([*call, "--device", "cpu", "--contenders", "eager", "gather"]) == 0
    assert "gather" in capsys.readouterr().out


@pytest.mark.slow
def test_calibrate_remembers_what_it_measures(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(measured.CACHE_VARIABLE, str(tmp_path / "cache"))
    path, copy = tmp_path / "small.safetensors", tmp_path / "copy.json"
    bdf.save(model, path)
    benchmark.command(str(path), batch=(16,), quick=True, calibrate=True, json=copy)
    printed = capsys.readouterr().out
    assert "slower than dense by more than 3 %" in printed
    assert str(copy) in printed
    assert "strategy='auto' is now " in printed
    found = crossover.load(model.backbone.config, torch.float32, "cpu")
    assert {cell.batch for cell in found.cells} == {16}
    assert (
        json.loads(copy.read_text())["entries"]
        == json.loads(crossover.user_file().read_text())["entries"]
    )
    with pytest.raises(ValueError, match="contenders: --calibrate has its own"):
        benchmark.command(str(path), calibrate=True, contenders=("eager",))
