"""Policies that decide on the way: their references against an image at a time, written plainly."""

import pytest
import torch
import torch.nn.functional as F

import blockdrop_fast as bdf
from blockdrop_fast.networks.exits import confidence_features
from blockdrop_fast.networks.halting import run_weighted
from blockdrop_fast.networks.resnet import ResNetConfig
from tests.random_networks import (
    BOTTLENECK,
    CIFAR,
    CUSTOM,
    GATED,
    make_gated_model,
    make_images,
    make_network,
    random_decisions,
)

CONFIGS = {"cifar": CIFAR, "bottleneck": BOTTLENECK, "one segment": CUSTOM["one segment"]}


@pytest.fixture(scope="module", params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def in_float64(kind, config):
    model, images = make_gated_model(kind, config)
    return model.double(), images.double()


def varied(decisions):
    return len(decisions.unique(dim=0)) > 1


@torch.no_grad()
def test_sequential(config):
    model, images = in_float64("sequential", config)
    logits, decisions = model(images)
    for image in range(8):
        x = model.backbone.stem(images[image : image + 1])
        for k, (block, shortcut) in enumerate(model.backbone.blocks()):
            gate = model.policy.gates[k]
            keep = (gate.weight[0] @ x[0].mean((1, 2)) + gate.bias).item() >= 0
            assert keep == decisions[image, k]
            x = F.relu(shortcut(x) + block(x)) if keep else shortcut(x)
        torch.testing.assert_close(model.backbone.classifier(x)[0], logits[image])
    assert varied(decisions)
    torch.testing.assert_close(model.backbone(images, decisions), logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["halting", "halting hard"])
def test_halting(kind, config):
    model, images = in_float64(kind, config)
    output = model(images)
    for image in range(8):
        x, k = model.backbone.stem(images[image : image + 1]), 0
        for segment, shortcut in zip(
            model.backbone.segments, model.backbone.shortcuts, strict=True
        ):
            outputs, weights = [], []
            for index, block in enumerate(segment):
                x = F.relu((x if index else shortcut(x)) + block(x))
                outputs.append(x)
                halts = index == len(segment) - 1
                if not halts:
                    score = torch.sigmoid(model.policy.heads[k + index](x.mean((2, 3)))).item()
                    halts = sum(weights) + score >= 0.99
                weights.append(1 - sum(weights) if halts else score)
                if halts:
                    break
            expected = [True] * len(outputs) + [False] * (len(segment) - len(outputs))
            assert output.decisions[image, k : k + len(segment)].tolist() == expected
            if kind == "halting":
                x = sum(w * one for w, one in zip(weights, outputs, strict=True))
                found = output.weights[image, k : k + len(outputs)]
                torch.testing.assert_close(found, torch.tensor(weights).double())
                assert not output.weights[image, k + len(outputs) : k + len(segment)].any()
            k += len(segment)
        torch.testing.assert_close(model.backbone.classifier(x)[0], output.logits[image])
    assert varied(output.decisions)


@torch.no_grad()
@pytest.mark.parametrize("kind", GATED)
def test_replays(kind, config):
    model, images = in_float64(kind, config)
    output = model(images)
    replayed = model.policy.replay(model.backbone, images, output)
    torch.testing.assert_close(replayed, output.logits)


@torch.no_grad()
def test_weights_of_one_are_plain_decisions_of_one_block_a_segment():
    network, images = make_network(CIFAR).double(), make_images(CIFAR, 4).double()
    decisions = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
    decisions = decisions.bool()
    weighted = run_weighted(network, images, decisions, torch.ones(4, 5).double())
    torch.testing.assert_close(weighted, network(images, decisions))


@torch.no_grad()
def test_exits(config):
    model, images = in_float64("exits", config)
    logits, decisions = model(images)
    for image in range(8):
        x, left = model.backbone.stem(images[image : image + 1]), None
        for k, (block, shortcut) in enumerate(model.backbone.blocks(), start=1):
            x = F.relu(shortcut(x) + block(x))
            if k in model.policy.exits:
                exit = model.policy.exits.index(k)
                found = model.policy.heads[exit](x.mean((2, 3)))
                features = confidence_features(found)[0]
                rule = model.policy.rules[exit]
                if (features @ rule[:5] + rule[5]).item() >= 0:
                    left = found
                    break
        left = model.backbone.classifier(x) if left is None else left
        torch.testing.assert_close(left[0], logits[image])
        assert decisions[image].tolist() == [True] * k + [False] * (model.backbone.num_blocks - k)
    assert varied(decisions)


def test_confidence_features():
    [features] = confidence_features(torch.tensor([[2.0, 1.0, 4.0, 3.0]]))
    p = torch.tensor([4.0, 3.0, 2.0, 1.0]).softmax(0)
    entropy = -(p * p.log()).sum()
    torch.testing.assert_close(features, torch.stack([*p[:3], p[0] - p[1], entropy]))
    [features] = confidence_features(torch.tensor([[0.0, 1000.0]]))
    assert features.tolist() == [1, 0, 0, 1, 0]


@torch.no_grad()
def test_cascade():
    small, large = make_network(CIFAR), make_network(CIFAR, 1)
    images = make_images(CIFAR, 64)
    cascade = bdf.Cascade([small, large]).eval()
    sure = small(images).softmax(1).max(1).values
    threshold = sure.quantile(0.4).item()
    cascade.set_thresholds([threshold])
    logits, decisions = cascade(images)
    stays = sure >= threshold
    assert torch.equal(decisions, torch.stack([torch.ones_like(stays), ~stays], 1))
    torch.testing.assert_close(logits, torch.where(stays[:, None], small(images), large(images)))
    output = cascade(images)
    torch.testing.assert_close(cascade.replay(images, output), output.logits)
    cascade.set_thresholds([0.0])
    assert cascade(images).decisions.sum() == 64


@pytest.mark.parametrize("kind", GATED)
def test_gradients_reach_gates_and_backbone(kind):
    model, images = make_gated_model(kind)
    if kind == "sequential":
        logits, _, gate_logits = model.policy.run_with(
            model.backbone, images, lambda _, logit: logit >= 0, active_only=True
        )
        loss = logits.square().sum() + gate_logits.square().sum()
    elif kind == "exits":
        loss = model.policy.logits_of(model.backbone, images).square().sum()
    else:
        output = model.policy.run_with(model.backbone, images, active_only=True)
        loss = output.logits.square().sum()
    loss.backward()
    without = [name for name, one in model.named_parameters() if one.grad is None]
    assert without == []


@torch.no_grad()
def test_active_images_only_is_the_same():
    for kind in ("sequential", "halting"):
        model, images = in_float64(kind, CIFAR)
        if kind == "sequential":
            run = [
                model.policy.run_with(model.backbone, images, lambda _, x: x >= 0, active_only=some)
                for some in (False, True)
            ]
        else:
            run = [
                model.policy.run_with(model.backbone, images, active_only=some)
                for some in (False, True)
            ]
        for masked, active in zip(*run, strict=True):
            torch.testing.assert_close(masked, active)


OTHER = ResNetConfig("basic", (2, 2, 1), (16, 32, 64), "cifar", "average_pool", 10)
CLASSES = ResNetConfig("basic", (2, 1, 2), (16, 32, 64), "cifar", "average_pool", 9)


def test_bad_input():
    network = make_network(CIFAR)
    for policy in (bdf.SequentialPolicy(OTHER), bdf.HaltingPolicy(OTHER), bdf.Exits(OTHER, [1])):
        with pytest.raises(ValueError, match=r"gates are for a backbone of layers \(2, 2, 1\)"):
            bdf.BlockDrop(network, policy)
    with pytest.raises(ValueError, match="exits tell 9 classes, the backbone 10"):
        bdf.BlockDrop(network, bdf.Exits(CLASSES, [1]))
    for exits in ([], [0], [5], [2, 1], [1, 1]):
        with pytest.raises(ValueError, match="exits: expected ascending blocks out of 1 to 4"):
            bdf.Exits(CIFAR, exits)
    policy = bdf.Exits(CIFAR, [1, 2])
    for thresholds in ([0.5], [0.5, 1.5], [0.5, float("nan")]):
        with pytest.raises(ValueError, match="thresholds: expected 2 from 0 to 1"):
            policy.set_thresholds(thresholds)
    with pytest.raises(ValueError, match="rules: expected finite"):
        policy.set_rules(torch.full((2, 6), torch.nan))
    with pytest.raises(ValueError, match="epsilon: expected between 0 and 1"):
        bdf.HaltingPolicy(CIFAR, epsilon=1.0)
    with pytest.raises(ValueError, match="same classes"):
        bdf.Cascade([network, make_network(CLASSES)])
    with pytest.raises(ValueError, match="two or more"):
        bdf.Cascade([network])
    model = bdf.BlockDrop(network, policy)
    images = make_images(CIFAR, 2)
    with pytest.raises(ValueError, match="budget"):
        model(images, 3.0)
    with pytest.raises(TypeError, match="no logits before"):
        model.policy_logits(images)
    decisions = random_decisions(torch.Generator().manual_seed(0), 2, 5)
    decisions[0] = torch.tensor([0, 1, 1, 0, 0])
    with pytest.raises(ValueError, match="the first 1, 2 or all 5 blocks"):
        policy.replay(network, images, bdf.Output(None, decisions))
