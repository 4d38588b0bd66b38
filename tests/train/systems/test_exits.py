"""The stage exits on a few digits: classifiers learn, rules meet budgets, a killed run goes on."""

import json
from dataclasses import replace

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.data.batches import load_digits
from tests.train.conftest import FEW
from train.images import plain_batches
from train.systems.config import Exits
from train.systems.exits import exits

SMALL = FEW | {"held_out": 100, "epochs": 4, "batch_size": 16, "lr": 0.05, "head_lr": 2.0}


def last_row(out):
    return json.loads((out / "metrics.json").read_text())[-1]


@pytest.fixture(scope="module")
def trained(pretrained, tmp_path_factory):
    out = tmp_path_factory.mktemp("exits")
    exits(
        Exits(backbone=pretrained / "model.safetensors", after=(1, 2), budget=2.0, out=out, **SMALL)
    )
    return out


def test_exits_learn(trained):
    row = last_row(trained)
    assert row["held_out_images"] == 100
    assert row["stops"]["blocks"] == [1, 2, 3]
    assert row["stops"]["flops"] == sorted(row["stops"]["flops"])
    assert min(row["stops"]["test_accuracies"]) > 0.3
    for kind in ("learned", "threshold"):
        assert 1 <= row["at_budget"][kind]["held_out"]["blocks"] <= 2
        assert row[f"{kind}_test_accuracy"] == row["at_budget"][kind]["test"]["accuracy"]
        assert len(row["sweep"][kind]) > 20


def test_the_model_has_the_rules(trained):
    """The saved model does on test images what metrics.json says of it."""
    model, test = bdf.load(trained / "model.safetensors").eval(), load_digits().test
    found = bdf.evaluate(bdf.compile(model), plain_batches(model, test, 250, 0), shuffles=0)
    reported = last_row(trained)["at_budget"]["learned"]["test"]
    assert found.accuracy == pytest.approx(reported["accuracy"], abs=2 / len(test))
    assert found.block_usage == pytest.approx(reported["blocks"], abs=4 / len(test))
    assert found.flops == pytest.approx(reported["flops"], rel=0.02)


def test_frozen_backbones_stay(pretrained, trained, tmp_path):
    backbone = pretrained / "model.safetensors"
    exits(Exits(backbone=backbone, frozen=True, budget=2.5, out=tmp_path, **SMALL))
    before, after = bdf.load_backbone(backbone), bdf.load(tmp_path / "model.safetensors")
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.backbone.state_dict()[name]), name
    joint = bdf.load(trained / "model.safetensors").backbone
    assert not torch.equal(joint.conv1.weight, before.conv1.weight)
    assert after.policy.exits == (1, 2)
    assert (
        last_row(tmp_path)["learned_held_out_blocks"] > last_row(trained)["learned_held_out_blocks"]
    )


def test_a_teacher(pretrained, tmp_path):
    backbone = pretrained / "model.safetensors"
    exits(Exits(backbone=backbone, teacher=backbone, out=tmp_path, **SMALL | {"epochs": 1}))
    assert last_row(tmp_path)["budget"] == 1.5


def test_a_killed_run_goes_on_to_the_same_model(pretrained, trained, killed, tmp_path):
    config = Exits(
        backbone=pretrained / "model.safetensors", after=(1, 2), budget=2.0, out=tmp_path, **SMALL
    )
    killed(exits, config)
    with pytest.raises(FileExistsError, match="--resume"):
        exits(config)
    exits(replace(config, resume=True))
    whole, resumed = (
        bdf.load(out / "model.safetensors").state_dict() for out in (trained, tmp_path)
    )
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": None}, "backbone: a backbone checkpoint is required"),
        ({"after": (1, 3)}, "exits: expected ascending blocks out of 1 to 2"),
        ({"budget": 0.5}, "budget: expected 1 to 3 blocks, got 0.5"),
        ({"held_out": 320}, "held_out: expected 1 to 319, got 320"),
    ],
)
def test_bad_options(options, message, pretrained, tmp_path):
    config = Exits(backbone=pretrained / "model.safetensors", out=tmp_path / "run", **SMALL)
    with pytest.raises(ValueError, match=message):
        exits(replace(config, **options))
    assert not (tmp_path / "run").exists()
