"""Policy networks that choose from a menu of block sets: prices, budgets, engines, files."""

import json

import pytest
import safetensors.torch
import torch

import blockdrop_fast as bdf
from blockdrop_fast.networks.checkpoints import CheckpointError
from blockdrop_fast.networks.menu import Menu
from blockdrop_fast.networks.policy import PolicyNetwork
from tests.random_networks import (
    CIFAR,
    make_cifar_network,
    make_images,
    make_menu_policy,
    make_model,
    make_network,
)

SETS = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 1], [1, 1, 1, 1, 1]]).bool()


@pytest.fixture(scope="module")
def images():
    return make_images(CIFAR, 64)


@pytest.fixture(scope="module")
def model(images):
    return bdf.BlockDrop(make_network(CIFAR), make_menu_policy(SETS, images)).eval()


def test_chooses_the_set_that_is_worth_its_price():
    logits = torch.tensor([[0.9, 0.91, 0.95, 0.99], [0.1, 0.5, 0.8, 0.95]]).logit()
    menu = Menu(SETS)
    # Blocks: 1, 2, 4, 5. The first image gains 0.09 with 4 blocks more, the second one 0.85.
    assert menu.at_price(logits, 0.0).tolist() == [3, 3]
    assert menu.at_price(logits, 0.05).tolist() == [0, 3]
    assert menu.at_price(logits, 0.2).tolist() == [0, 1]
    assert menu.at_price(logits, 0.5).tolist() == [0, 0]


@pytest.mark.parametrize("budget", [1.5, 2.0, 2.5, 3.25, 4.5])
def test_budgets_are_met_on_the_images_of_the_calibration(images, budget):
    policy = make_menu_policy(SETS, images)
    usage = policy.decide(images, budget).sum(1).float().mean()
    assert abs(usage - budget) <= 4 / 64  # one image that changes from one set to another


def test_the_ends_of_the_range_are_reached(images):
    policy = make_menu_policy(SETS, images)
    for usage in (policy.menu.usages[0], policy.menu.usages[-1]):
        assert policy.decide(images, usage).sum(1).float().mean() == pytest.approx(usage)


def test_a_menu_of_one_set():
    menu = Menu(SETS[1:2])
    menu.calibrate(torch.zeros(3, 1), budget=2.0)
    assert torch.equal(menu.choose(torch.zeros(2, 1)), SETS[1:2].expand(2, -1))


@pytest.mark.parametrize("strategy", ["walk", "gather", "dense"])
def test_in_an_engine(model, images, strategy):
    engine = bdf.compile(model, strategy=strategy)
    with torch.no_grad():
        for budget in (None, 2.0, 4.0):
            expected = model(images, budget)
            logits, decisions = engine(images, budget=budget)
            assert torch.equal(decisions, expected.decisions)
            assert torch.equal(decisions, engine.decide(images, budget=budget))
            torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
        probabilities = engine.probabilities(images)
        assert torch.equal(probabilities, model.policy(images))
        assert torch.equal(probabilities.bool(), engine.decide(images))
    assert engine(images[:0], budget=2.0).decisions.shape == (0, 5)


def test_engine_is_a_snapshot(images):
    model = bdf.BlockDrop(make_network(CIFAR), make_menu_policy(SETS, images)).eval()
    engine = bdf.compile(model)
    before = engine.decide(images)
    model.policy.menu.budget = 4.0
    assert torch.equal(engine.decide(images), before)
    engine.refresh()
    assert engine.decide(images).sum() > before.sum()


def test_files_keep_menu_and_prices(model, images, tmp_path):
    bdf.save(model, tmp_path / "model.safetensors")
    loaded = bdf.load(tmp_path / "model.safetensors").eval()
    assert loaded.policy.menu.budget == 2.5
    with torch.no_grad():
        for budget in (None, 3.0):
            assert torch.equal(loaded(images, budget).logits, model(images, budget).logits)


def _of_two_sets(metadata: dict) -> None:
    metadata["policy"]["menu"]["usages"] = [5.0, 1.0]


def _ascending(metadata: dict) -> None:
    metadata["policy"]["menu"]["usages"].reverse()


def _out_of_reach(metadata: dict) -> None:
    metadata["policy"]["menu"]["budget"] = 9


def _without_prices(metadata: dict) -> None:
    del metadata["policy"]["menu"]["prices"]


@pytest.mark.parametrize("damage", [_of_two_sets, _ascending, _out_of_reach, _without_prices])
def test_damaged_files_are_refused(model, tmp_path, damage):
    path = tmp_path / "model.safetensors"
    bdf.save(model, path)
    with safetensors.safe_open(path, "pt") as file:
        key, text = "blockdrop_fast", file.metadata()["blockdrop_fast"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata = json.loads(text)
    damage(metadata)
    safetensors.torch.save_file(tensors, path, {key: json.dumps(metadata)})
    with pytest.raises(CheckpointError, match=r"model\.safetensors \(policy network\): "):
        bdf.load(path)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("budget", [0.5, 5.5, float("nan"), -1])
def test_budgets_out_of_reach(model, images, budget):
    engine = bdf.compile(model)
    for call in (engine, engine.decide, model):
        with pytest.raises(ValueError, match=r"budget: expected from 1 to 5 blocks, got"):
            call(images, budget=budget)


def test_no_budget_of_its_own(images):
    policy = make_menu_policy(SETS, images, budget=None)
    with pytest.raises(ValueError, match=r"budget: expected from 1 to 5 blocks, got None"):
        policy(images)


def test_not_calibrated():
    with pytest.raises(ValueError, match="budget: the menu was not calibrated"):
        Menu(SETS).choose(torch.zeros(2, 4), 2.0)


def test_budget_of_a_policy_network_without_a_menu(images):
    model, _ = make_model()
    engine = bdf.compile(model)
    for call in (engine, engine.decide, model):
        with pytest.raises(ValueError, match="budget: this policy network decides at one usage"):
            call(images, budget=2.0)
    with pytest.raises(ValueError, match="budget: a bare backbone has no policy network"):
        bdf.compile(model.backbone)(images, budget=2.0)


def test_menu_of_another_size():
    with pytest.raises(ValueError, match=r"menu: expected 5 sets, .* got 4"):
        PolicyNetwork(make_cifar_network((1, 1, 1), num_classes=5), menu=Menu(SETS))
    with pytest.raises(ValueError, match="policy: decides on 5 blocks, but the backbone has 3"):
        bdf.BlockDrop(
            make_cifar_network((1, 1, 1)),
            PolicyNetwork(make_cifar_network((1, 1, 1), num_classes=4), menu=Menu(SETS)),
        )


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (SETS.float(), r"sets: expected shape \(M, K\) bool"),
        (SETS[0], r"sets: expected shape \(M, K\) bool"),
        (SETS[:0], r"sets: expected shape \(M, K\) bool"),
        (SETS[[0, 1, 0]], "sets: expected different ones"),
    ],
)
def test_no_menu(sets, message):
    with pytest.raises(ValueError, match=message):
        Menu(sets)
