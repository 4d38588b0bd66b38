"""Statistics counted anew: what they are, what they leave alone, and what they are good for."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import blockdrop_fast as bdf
from blockdrop_fast.data.batches import load_digits
from tests.random_networks import CIFAR, make_network
from tests.train.conftest import FEW
from train.batch_statistics import count_backbone, count_policy
from train.config import Curriculum, Finetune
from train.curriculum import curriculum
from train.finetune import finetune
from train.images import plain_batches


@pytest.fixture
def model():
    torch.manual_seed(0)
    backbone = make_network(CIFAR)
    return bdf.BlockDrop(backbone, bdf.policy_resnet8(backbone.num_blocks)).train()


def buffers(network):
    return {name: value.clone() for name, value in network.named_buffers()}


def test_they_are_means_over_equal_batches(model, monkeypatch):
    """As many of 70 images as go into equal batches of at most 32: three of 23."""
    monkeypatch.setattr("train.batch_statistics.EVALUATION_BATCH", 32)
    digits, config = load_digits().train, Curriculum(statistics_images=70, seed=3)
    backbone = buffers(model.backbone)
    count_policy(model, digits, config)
    batches = [one for one, _ in plain_batches(model, digits.subset(69, seed=3), 23, 1)]
    assert [len(one) for one in batches] == [23, 23, 23]
    network = model.policy.network
    outputs = torch.stack([network.conv1(one).detach() for one in batches]).double()
    by_channel = outputs.movedim(2, 0).flatten(2)  # (C, batches, the rest)
    mean, variance = by_channel.mean((1, 2)), by_channel.var(2).mean(1)
    torch.testing.assert_close(network.bn1.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.bn1.running_var.double(), variance, rtol=1e-4, atol=1e-5)
    layers = [one for one in model.policy.modules() if isinstance(one, nn.BatchNorm2d)]
    assert all(one.training and one.momentum == 0.1 for one in layers)
    assert all(
        torch.equal(value, backbone[name]) for name, value in buffers(model.backbone).items()
    )


def test_what_does_not_train_keeps_its_own(model):
    digits = load_digits().train
    before = buffers(model)
    count_policy(model, digits, Curriculum(statistics_images=0))
    model.policy.eval()
    count_policy(model, digits, Curriculum(statistics_images=50))
    assert all(torch.equal(value, before[name]) for name, value in buffers(model).items())
    assert not model.policy.training


def test_each_block_is_counted_on_images_that_are_drawn(model):
    """The policy keeps no block, but a fifth of the images keep each all the same."""
    torch.nn.init.constant_(model.policy.fc.bias, -100.0)
    torch.nn.init.zeros_(model.policy.fc.weight)
    before, tracked = buffers(model), model.backbone.bn1.num_batches_tracked.clone()
    digits, config = load_digits().train, Curriculum(statistics_images=50)
    found = []
    for active_only in (True, True, False):
        count_backbone(model, digits, config, active_only)
        found.append(buffers(model.backbone))
    first, again, of_all = found
    assert all(torch.equal(value, first[name]) for name, value in again.items())
    for name, value in first.items():
        if "running" in name:
            assert not torch.allclose(value, before[f"backbone.{name}"]), name
            same = torch.allclose(value, of_all[name])
            assert same == name.startswith("bn1."), name  # the stem runs for all
    after = buffers(model.policy)
    assert all(torch.equal(value, before[f"policy.{name}"]) for name, value in after.items())
    assert model.backbone.bn1.num_batches_tracked == tracked
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("stage", ["curriculum", "finetune"])
def test_training_goes_on_as_it_would(pretrained, tmp_path, stage):
    """The same weights, bit for bit; a file's statistics are those of its weights.

    So they are with fewer checkpoints and evaluations.
    """
    options = FEW | {"limit": 128, "epochs": 2, "lr": 1e-2, "static_images": 0}
    if stage == "curriculum":
        run, config = curriculum, Curriculum(backbone=pretrained / "model.safetensors", **options)
    else:
        torch.manual_seed(0)
        backbone = bdf.load_backbone(pretrained / "model.safetensors")
        start = bdf.BlockDrop(backbone, bdf.policy_resnet8(backbone.num_blocks))
        bdf.save(start, tmp_path / "start.safetensors")
        run, config = finetune, Finetune(model=tmp_path / "start.safetensors", bn="all", **options)
    found = {}
    for name, others in {
        "counted": {},
        "running": {"statistics_images": 0},
        "seldom": {"checkpoint_every": 2, "evaluate_every": 2},
    }.items():
        run(replace(config, out=tmp_path / name, **others))
        found[name] = bdf.load(tmp_path / name / "model.safetensors")
    for name, weight in found["running"].named_parameters():
        assert torch.equal(weight, found["counted"].get_parameter(name)), name
    for name, value in found["seldom"].state_dict().items():
        assert torch.equal(value, found["counted"].state_dict()[name]), name
    for name in ("counted", "running"):
        before, model = buffers(found[name]), found[name].train()
        images = load_digits().train.subset(128)
        count_policy(model, images, config)
        if stage == "finetune":
            count_backbone(model, images, config, active_only=False)
        after = {key: value for key, value in buffers(model).items() if "running" in key}
        assert all(torch.equal(value, before[key]) for key, value in after.items()) == (
            name == "counted"
        )
