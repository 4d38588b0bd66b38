"""Stages lccl and sact on a few digits: they learn, their weights dial what is computed."""

import json
from dataclasses import replace

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.data.batches import load_digits
from tests.train.conftest import FEW
from train.config import Pretrain
from train.images import plain_batches
from train.pretrain import pretrain
from train.systems.config import Lccl, Sact
from train.systems.lccl import lccl
from train.systems.pixels import evaluate_pixels
from train.systems.sact import sact

SMALL = FEW | {"epochs": 3, "batch_size": 16, "lr": 0.02, "policy_lr": 0.03}
STAGES = {
    "lccl": (lccl, Lccl(sparsity=2.0, **SMALL | {"policy_lr": 0.05})),
    "sact": (sact, Sact(tau=0.1, **SMALL)),
}


def last_row(out):
    return json.loads((out / "metrics.json").read_text())[-1]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """Of two blocks a segment, so that positions can leave one out."""
    out = tmp_path_factory.mktemp("backbone")
    pretrain(Pretrain(arch="resnet14", epochs=4, out=out, lr=0.1, **FEW))
    return out / "model.safetensors"


@pytest.fixture(scope="module", params=STAGES)
def trained(request, backbone, tmp_path_factory):
    stage, config = STAGES[request.param]
    out = tmp_path_factory.mktemp(request.param)
    config = replace(config, model=backbone, out=out)
    if stage is sact:  # from near halting, as there are few steps
        config = replace(config, bias=4.0)
    stage(config)
    return stage, config


def test_it_learns_and_counts(trained, backbone):
    _, config = trained
    row, complete = last_row(config.out), float(bdf.flops(bdf.load_backbone(backbone)))
    assert row["test_accuracy"] > 0.5
    assert 0 < row["test_flops"] < 0.95 * complete
    assert row["test_flops_std"] > 0
    assert 0 < row["test_sparsity"] <= 6
    assert len(row["test_densities"]) == 6
    model, test = bdf.load(config.out / "model.safetensors").eval(), load_digits().test
    found, report = evaluate_pixels(model, plain_batches(model, test, 250, 0))
    assert found["flops"] == row["test_flops"]
    assert found["accuracy"] == row["test_accuracy"]
    assert report["test_densities"] == row["test_densities"]


@pytest.mark.slow
def test_the_weight_dials_what_is_computed(trained, tmp_path):
    stage, config = trained
    name = "sparsity" if stage is lccl else "tau"
    going_on = replace(config, model=config.out / "model.safetensors", out=tmp_path, epochs=2)
    flops = []
    for weight in (0.0, 50.0):
        stage(replace(going_on, out=tmp_path / str(weight), **{name: weight}))
        flops.append(last_row(tmp_path / str(weight))["test_flops"])
    assert flops[1] < 0.95 * flops[0]


def test_a_killed_run_goes_on_to_the_same_model(trained, killed, tmp_path):
    stage, config = trained
    config = replace(config, out=tmp_path)
    killed(stage, config)
    with pytest.raises(FileExistsError, match="--resume"):
        stage(config)
    stage(replace(config, resume=True))
    whole, resumed = (
        bdf.load(out / "model.safetensors").state_dict() for out in (trained[1].out, tmp_path)
    )
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("lccl", {"model": None}, "model: a backbone checkpoint, or one of this stage"),
        ("lccl", {"sparsity": -1.0}, "sparsity: expected 0 or more, got -1.0"),
        ("sact", {"tau": -1.0}, "tau: expected 0 or more, got -1.0"),
        ("sact", {"free_epochs": -1}, "free_epochs: expected 0 or more, got -1"),
        ("sact", {"epsilon": 2.0}, "epsilon: expected between 0 and 1, got 2"),
        ("lccl", {"model": "policy"}, "expected a backbone, or a checkpoint of this stage"),
    ],
)
def test_bad_options(stage, options, message, pretrained, tmp_path):
    path = pretrained / "model.safetensors"
    if options.get("model") == "policy":
        options = {"model": tmp_path / "policy.safetensors"}
        bdf.save(bdf.BlockDrop(bdf.load_backbone(path), bdf.policy_resnet8(3)), options["model"])
    function, config = STAGES[stage]
    config = replace(config, **{"model": path, "out": tmp_path / "run"} | options)
    with pytest.raises(ValueError, match=message):
        function(config)
    assert not (tmp_path / "run").exists()
