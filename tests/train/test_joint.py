"""Joint finetuning of a menu model: what each image runs, what learns, and the static control."""

import json
from dataclasses import replace

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.networks.menu import Menu
from tests.random_networks import CIFAR, make_look_model, make_network
from train.config import Joint
from train.expert import outcomes
from train.joint import _draw, _prices, joint

FEW = {"limit": 300, "batch_size": 32, "threads": 1, "held_out": 100, "epochs": 1}
SETS = torch.tensor([[1, 0, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
PLACES = [(s, b) for s, layers in enumerate(CIFAR.layers) for b in range(layers)]
NORMALIZED = bdf.data.image_sets.NO_NORMALIZATION


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    torch.manual_seed(0)
    backbone = make_network(CIFAR)
    backbone.normalization = NORMALIZED
    policy = bdf.policy_resnet8(len(SETS))
    model = bdf.BlockDrop(backbone, bdf.PolicyNetwork(policy.network, 1, Menu(SETS)))
    path = tmp_path_factory.mktemp("joint") / "model.safetensors"
    bdf.save(model, path)
    return path


@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory):
    backbone = make_network(CIFAR)
    backbone.normalization = NORMALIZED
    path = tmp_path_factory.mktemp("joint") / "backbone.safetensors"
    bdf.save(backbone, path)
    return path


def changed(before, after):
    return {name for name, value in after.state_dict().items() if (before[name] != value).any()}


def test_a_policy_that_looks(tmp_path):
    """Its loss reaches the blocks that it looks at, and prices follow the backbone."""
    model, _ = make_look_model(sets=SETS)
    model.backbone.normalization = NORMALIZED
    path = tmp_path / "model.safetensors"
    bdf.save(model, path)
    joint(Joint(model=path, budget=2.5, policy_lr=0.01, out=tmp_path / "run", **FEW))
    after = bdf.load(tmp_path / "run" / "model.safetensors")
    names = changed(model.state_dict(), after)
    assert {"policy.fc.weight", "backbone.segments.0.0.conv1.weight"} <= names
    assert after.policy.after == 1
    assert after.policy.menu.budget == 2.5


@pytest.mark.parametrize("policy_lr", [0.0, 0.01], ids=["frozen", "learning"])
def test_the_backbone_learns_and_the_policy_only_if_asked(model_file, tmp_path, policy_lr):
    joint(Joint(model=model_file, budget=1.5, policy_lr=policy_lr, out=tmp_path / "run", **FEW))
    before, after = bdf.load(model_file), bdf.load(tmp_path / "run" / "model.safetensors")
    names = changed(before.state_dict(), after)
    assert any(name.startswith("backbone.segments") for name in names)
    assert any(name.startswith("policy.network") for name in names) == bool(policy_lr)
    assert after.policy.menu.budget == 1.5
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())[-1]
    assert 1 <= metrics["test_sparsity"] <= 5
    assert metrics["train_loss"] > 1.5  # untrained, of ten classes


def test_the_control_trains_one_set(backbone_file, tmp_path):
    joint(Joint(backbone=backbone_file, static=3, out=tmp_path / "run", **FEW))
    after = bdf.load(tmp_path / "run" / "model.safetensors")
    keep = after.policy.keep.tolist()
    assert sum(keep) == 3
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())[-1]
    assert metrics["test_sparsity"] == metrics["train_sparsity"] == 3
    again = Joint(model=tmp_path / "run" / "model.safetensors", out=tmp_path / "again", **FEW)
    joint(again)
    assert bdf.load(tmp_path / "again" / "model.safetensors").policy.keep.tolist() == keep
    with pytest.raises(ValueError, match="has one set for all images"):
        joint(replace(again, budget=2.0, out=tmp_path / "other"))
    before = bdf.load_backbone(backbone_file)
    trained = {
        k
        for k, ((block, _), (old, _)) in enumerate(
            zip(after.backbone.blocks(), before.blocks(), strict=True)
        )
        if changed(old.state_dict(), block)
    }
    assert trained == {k for k, kept in enumerate(keep) if kept}


@pytest.mark.parametrize(
    ("static_set", "keep"),
    [
        ("first_k", [True, True, True, False, False]),
        ("distribute_k", [True, False, True, True, False]),
        ("random_k", bdf.heuristics.random_k(3, CIFAR.layers, 1, seed=4)[0].tolist()),
    ],
)
def test_the_papers_baselines(static_set, keep, backbone_file, tmp_path):
    options = FEW | {"seed": 4}
    joint(Joint(backbone=backbone_file, static=3, static_set=static_set, out=tmp_path, **options))
    after = bdf.load(tmp_path / "model.safetensors")
    assert after.policy.keep.tolist() == keep
    names = changed(bdf.load_backbone(backbone_file).state_dict(), after.backbone)
    ran = [any(name.startswith(f"segments.{s}.{b}") for name in names) for s, b in PLACES]
    assert ran == keep


def test_random_blocks_of_each_image(backbone_file, killed, tmp_path):
    config = Joint(
        backbone=backbone_file, static=3, static_set="random_k_per_image", static_images=0, **FEW
    )
    config = replace(config, epochs=2)
    joint(replace(config, out=tmp_path / "whole"))
    after = bdf.load_backbone(tmp_path / "whole" / "model.safetensors")
    names = changed(bdf.load_backbone(backbone_file).state_dict(), after)
    assert all(any(name.startswith(f"segments.{s}.{b}") for name in names) for s, b in PLACES)
    rows = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert rows[-1]["test_sparsity"] == rows[-1]["train_sparsity"] == 3
    assert rows[-1]["train_unique_policies"] == 10
    assert rows[-1]["test_unique_policies"] == 10
    killed(joint, replace(config, out=tmp_path / "killed"))
    joint(replace(config, out=tmp_path / "killed", resume=True))
    again = bdf.load_backbone(tmp_path / "killed" / "model.safetensors")
    assert not changed(after.state_dict(), again)
    assert (
        json.loads((tmp_path / "killed" / "metrics.json").read_text())[-1]["test_accuracy"]
        == rows[-1]["test_accuracy"]
    )


def test_a_share_of_the_images_runs_at_other_budgets():
    menu = Menu(SETS)
    menu.calibrate(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), 2.0)
    prices = _prices(menu, Joint(budgets=(1.0, 1.5)))
    assert prices[0] == pytest.approx(menu.price())
    assert (prices[1:] >= menu.price(1.5) - 1e-6).all()
    drawn = _draw(prices, 10_000, 0.25, torch.Generator().manual_seed(0))
    assert drawn.shape == (10_000, 1)
    assert (drawn != prices[0]).double().mean() == pytest.approx(0.25, abs=0.02)


def test_each_image_has_its_own_price():
    menu = Menu(SETS)
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(2, -1)
    assert menu.at_price(logits, torch.tensor([[0.0], [1.0]])).tolist() == [2, 0]


def test_outcomes_are_half_right_half_probable():
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    right = outcomes(logits, torch.tensor([1, 0]))
    assert right.tolist() == pytest.approx([0.25, 0.94040], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "model: expected"),
        ({"static": 3}, "static: expected --backbone"),
        ({"static": 3, "backbone": "b", "policy_lr": 0.1}, "static: expected no --policy-lr"),
        ({"static": 9, "backbone": "b"}, "static: expected 0 to 5 blocks, got 9"),
        ({"static_set": "first_k", "model": "m"}, "static_set: expected with --static"),
        ({"model": "m", "backbone": "b"}, "model: expected"),
        ({"model": "m", "budget": 9.0}, "budget: expected from"),
        ({"model": "m", "spread": 1.5}, "spread: expected 0 to 1, got 1.5"),
    ],
)
def test_bad_options(options, message, model_file, backbone_file, tmp_path):
    files = {"m": model_file, "b": backbone_file}
    options = {name: files.get(value, value) for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        joint(replace(Joint(out=tmp_path / "run", **FEW), **options))


def test_a_policy_without_a_menu_is_refused(tmp_path):
    model = bdf.BlockDrop(make_network(CIFAR), bdf.policy_resnet8(5))
    bdf.save(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="with a menu, of the stage expert"):
        joint(Joint(model=tmp_path / "model.safetensors", out=tmp_path / "run", **FEW))


def test_what_a_frozen_head_looks_through_is_frozen(tmp_path):
    backbone = make_network(CIFAR)
    backbone.normalization = NORMALIZED
    menu = Menu(SETS)
    bdf.save(
        bdf.BlockDrop(backbone, bdf.LookPolicy(backbone.config, 1, menu)),
        tmp_path / "model.safetensors",
    )
    before = bdf.load(tmp_path / "model.safetensors").state_dict()
    options = Joint(model=tmp_path / "model.safetensors", budget=2.0, **FEW)
    first = ("backbone.conv1", "backbone.bn1", "backbone.segments.0.0", "policy.convs")
    for policy_lr in (0.0, 0.01):
        joint(replace(options, policy_lr=policy_lr, out=tmp_path / str(policy_lr)))
        names = changed(before, bdf.load(tmp_path / str(policy_lr) / "model.safetensors"))
        assert any(name.startswith("backbone.segments.") for name in names)
        assert any(name.startswith(first) for name in names) == bool(policy_lr)
