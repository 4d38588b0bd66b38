"""BlockDrop-seq on a few digits: rewards move gates, samples share forced blocks, runs go on."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

import blockdrop_fast as bdf
from tests.random_networks import CIFAR, make_gated_model
from tests.train.conftest import FEW
from train.reward import UsagePrice
from train.systems.config import Sequential
from train.systems.sequential import sequential, train_step

SMALL = FEW | {"epochs": 3, "lr": 0.05, "static_images": 0, "routing_images": 100}


def rows(out):
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def trained(pretrained, tmp_path_factory):
    out = tmp_path_factory.mktemp("sequential")
    sequential(Sequential(backbone=pretrained / "model.safetensors", out=out, samples=2, **SMALL))
    return out


def test_the_curriculum_frees_blocks(trained, pretrained):
    history = rows(trained)
    assert [row["forced_blocks"] for row in history] == [2, 1, 0]
    assert history[0]["test_sparsity"] >= 2
    assert "test_routing_gain" in history[-1]
    assert history[-1]["test_flops"] > 0
    model = bdf.load(trained / "model.safetensors")
    frozen = bdf.load_backbone(pretrained / "model.safetensors").state_dict()
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, frozen[name]), name


@pytest.mark.parametrize("estimator", ["self_critical", "leave_one_out", "rloo"])
def test_gamma_says_how_many_blocks_are_kept(pretrained, tmp_path, estimator):
    """Where wrong predictions cost nothing blocks go, where they cost much they stay."""
    usage = {}
    for penalty in (0.0, 50.0):
        out = tmp_path / str(penalty)
        config = Sequential(
            backbone=pretrained / "model.safetensors",
            out=out,
            penalty=penalty,
            estimator=estimator,
            samples=2,
            entropy=0.0,
            blocks_per_epoch=3.0,
            **SMALL,
        )
        sequential(replace(config, batch_size=16, routing_images=0))
        usage[penalty] = rows(out)[-1]["test_sparsity"]
    assert usage[0.0] < usage[50.0] - 0.5


@pytest.mark.parametrize("joint", [False, True])
def test_a_step_is_the_policy_gradient(joint):
    """The loss against sums written plainly, of decisions drawn block by block."""
    model, images = make_gated_model("sequential", CIFAR)
    model.double(), images.double()
    images, labels = images.double(), torch.arange(len(images)) % 10
    config = Sequential(samples=2, estimator="leave_one_out", penalty=2.0, entropy=0.0, joint=joint)
    generator = torch.Generator().manual_seed(0)
    step = train_step(model, images, labels, config, 2, generator, UsagePrice(config, 5))
    assert step.decisions.shape == (3, len(images), 5)
    assert step.decisions[:, :, :2].all()
    assert (step.decisions[1:, :, 2:].float().mean((0, 1)) - 0.5).abs().max() < 0.25
    rewards, log_probabilities, losses = [], [], []
    for decisions in step.decisions:
        x, gates = model.backbone.stem(images), []
        for k, (block, shortcut) in enumerate(model.backbone.blocks()):
            gates.append(model.policy.gates[k](x.mean((2, 3)))[:, 0])
            kept = torch.relu(shortcut(x) + block(x))
            x = torch.where(decisions[:, k, None, None, None], kept, shortcut(x))
        logits = model.backbone.classifier(x)
        right = (logits.argmax(1) == labels).double()
        usage = decisions.double().mean(1)
        rewards.append(right * (1 - usage**2) - (1 - right) * 2)
        keep = 0.8 * torch.stack(gates, 1).sigmoid() + 0.2 * (1 - torch.stack(gates, 1).sigmoid())
        chosen = torch.where(decisions, keep, 1 - keep)[:, 2:]
        log_probabilities.append(chosen.log().sum(1))
        losses.append(torch.nn.functional.cross_entropy(logits, labels))
    thresholded, first, second = rewards
    expected = torch.stack(
        [
            (first - (second + thresholded) / 2) * log_probabilities[1],
            (second - (first + thresholded) / 2) * log_probabilities[2],
        ]
    )
    expected = -expected.mean()
    if joint:
        expected = expected + (losses[1] + losses[2]) / 2
    torch.testing.assert_close(step.loss, expected, check_dtype=False, rtol=1e-5, atol=1e-6)
    step.loss.backward()
    found = [gate.weight.grad.clone() for gate in model.policy.gates[2:]]
    model.zero_grad()
    expected.backward()
    for one, gate in zip(found, model.policy.gates[2:], strict=True):
        torch.testing.assert_close(one, gate.weight.grad, check_dtype=False, rtol=1e-4, atol=1e-6)
    assert model.policy.gates[0].weight.grad is None or not model.policy.gates[0].weight.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("forced", [0, 3, 5])
def test_copies_behind_forced_blocks(forced):
    model, images = make_gated_model("sequential", CIFAR)
    run = partial(
        model.policy.run_with, model.backbone, images.contiguous(memory_format=torch.channels_last)
    )
    some = torch.rand(5, 2 * len(images)) < 0.5
    logits, decisions, gates = run(lambda k, _: some[k], forced=forced, copies=2)
    for copy, part in enumerate(torch.arange(2 * len(images)).chunk(2)):
        keep = some[:, part].clone()
        keep[:forced] = True
        expected = run(lambda k, _, keep=keep: keep[k])
        for found, one in zip((logits, decisions, gates), expected, strict=True):
            torch.testing.assert_close(found[part], one), copy


def test_joint_trains_the_backbone_too(trained, tmp_path):
    config = Sequential(
        model=trained / "model.safetensors", joint=True, out=tmp_path, samples=2, **SMALL
    )
    sequential(replace(config, lr=0.01, static_images=50))
    history = rows(tmp_path)
    assert [row["forced_blocks"] for row in history] == [0, 0, 0]
    assert "test_static_accuracy" in history[-1]
    before, after = (bdf.load(out / "model.safetensors") for out in (trained, tmp_path))
    assert (after.backbone.conv1.weight != before.backbone.conv1.weight).any()
    assert (after.policy.gates[1].weight != before.policy.gates[1].weight).any()
    assert history[-1]["train_accuracy"] > rows(trained)[-1]["train_accuracy"]


def test_a_killed_run_goes_on_to_the_same_model(trained, pretrained, killed, tmp_path):
    config = Sequential(backbone=pretrained / "model.safetensors", out=tmp_path, samples=2, **SMALL)
    killed(sequential, config)
    sequential(replace(config, resume=True))
    whole, resumed = (
        bdf.load(out / "model.safetensors").state_dict() for out in (trained, tmp_path)
    )
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "arms", "samples": 3}, "estimator: got 'arms', which compares"),
        ({"estimator": "flips"}, "estimator: got 'flips', which compares"),
        ({"estimator": "rloo"}, "samples: expected at least 2"),
        ({"backbone": None}, "backbone: expected a backbone checkpoint alone"),
        ({"joint": True}, "joint: expected --model, a checkpoint of this stage, alone"),
        ({"usage_target": 9.0}, "usage_target: expected 0 to 3 blocks, got 9"),
    ],
)
def test_bad_options(options, message, pretrained, tmp_path):
    config = Sequential(backbone=pretrained / "model.safetensors", out=tmp_path / "run", **SMALL)
    with pytest.raises(ValueError, match=message):
        sequential(replace(config, **options))
    assert not (tmp_path / "run").exists()
