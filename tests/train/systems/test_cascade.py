"""The stage cascade on a few digits: rules meet budgets, and the saved cascade follows them."""

import json
from dataclasses import replace

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.data.batches import load_digits
from train.images import plain_batches
from train.stages import Stage
from train.systems.cascade import cascade
from train.systems.config import Cascade

SMALL = {"limit": 320, "threads": 1, "held_out": 100}


@pytest.fixture
def networks(pretrained, deep):
    return pretrained / "model.safetensors", deep / "model.safetensors"


@pytest.mark.parametrize("rules", ["learned", "threshold"])
def test_a_cascade(networks, rules, tmp_path):
    config = Cascade(networks=networks, budget=4.0, rules=rules, out=tmp_path, **SMALL)
    stage = Stage("cascade", config)
    assert not stage.complete
    cascade(config)
    stage.check()
    assert stage.complete
    (row,) = json.loads((tmp_path / "metrics.json").read_text())
    assert row["stops"]["blocks"] == [3, 9]
    assert row["held_out_images"] == 100
    reported = row["at_budget"][rules]
    assert 3 <= reported["held_out"]["blocks"] <= 4
    flops = [float(bdf.flops(bdf.load_backbone(path))) for path in networks]
    assert row["stops"]["flops"] == [flops[0], sum(flops)]
    model, test = bdf.load(tmp_path / "model.safetensors").eval(), load_digits().test
    right = ran = 0
    with torch.no_grad():
        for images, labels in plain_batches(model.networks[0], test, 250, 0):
            logits, decisions = model(images)
            right += (logits.argmax(1) == labels).sum().item()
            ran += decisions[:, 1].sum().item()
    assert right / len(test) == pytest.approx(reported["test"]["accuracy"], abs=2 / len(test))
    assert ran / len(test) == pytest.approx(reported["test"]["shares"][1], abs=2 / len(test))


def test_bad_options(networks, tmp_path):
    config = Cascade(networks=networks, out=tmp_path / "run", **SMALL)
    three = tmp_path / "three.safetensors"
    bdf.save(bdf.resnet_cifar(8, num_classes=3), three)
    for options, message in (
        ({"networks": networks[:1]}, "networks: expected two or more, got 1"),
        ({"networks": (*networks, three)}, r"networks: expected of the same classes"),
        ({"networks": networks[::-1]}, "networks: expected from small to large"),
        ({"budget": 2.0}, "budget: expected 3 to 9 blocks, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            cascade(replace(config, **options))
    assert not (tmp_path / "run").exists()
    config.out.mkdir()
    (config.out / "model.safetensors").touch()
    with pytest.raises(FileExistsError, match="name another folder"):
        cascade(config)
