"""Every kind of policy on a GPU: `make gpu-check`. Everywhere else these tests are skipped."""

from __future__ import annotations

import copy

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.measure.tolerance import make_reference
from blockdrop_fast.networks.fixed import FixedPolicy
from tests.gpu.conditions import on_gpu
from tests.random_networks import (
    BOTTLENECK,
    CIFAR,
    GROUPED,
    make_look_model,
    make_menu_policy,
    make_network,
    random_images,
)

pytestmark = on_gpu
SETS = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 1, 1]]).bool()
KINDS = ["look", "look menu", "menu", "fixed"]
CALLS = 5  # first runs, captures and replays are different code


def make_model(kind: str, config) -> tuple[bdf.BlockDrop, torch.Tensor]:
    """A model of that kind and images of 32x32, on which it does not decide alike for all."""
    images = random_images(64, torch.float32)
    if kind.startswith("look"):
        model, _ = make_look_model(config, 1, SETS if "menu" in kind else None)
        with torch.no_grad():
            logits = model.policy_logits(images)
            if model.policy.menu is None:
                model.policy.fc.bias -= logits.quantile(0.5, 0)
            else:
                model.policy.fc.bias -= logits.mean(0) - torch.linspace(-1, 2, len(SETS))
                model.policy.menu.calibrate(model.policy_logits(images), 2.5)
        return model, images
    policy = FixedPolicy(SETS[1]) if kind == "fixed" else make_menu_policy(SETS, images)
    return bdf.BlockDrop(make_network(config), policy).eval(), images


def check_model(kind: str, config, strategy: str) -> None:
    model, images = make_model(kind, config)
    expected = copy.deepcopy(model).double().decide(images.double())
    model, images = model.cuda(), images.to("cuda", torch.bfloat16)
    engine = bdf.compile(model, dtype=torch.bfloat16, strategy=strategy)
    assert engine.strategy == strategy
    for _ in range(CALLS):
        logits, decisions = engine(images)
        make_reference(model.backbone, images, decisions, torch.bfloat16).check(kind, logits)
        # Rounding to 16 bits decides near-ties.
        assert (decisions.cpu() == expected).double().mean() > 0.9
        assert torch.equal(decisions, engine.decide(images))
        assert engine(images[:1]).logits.isfinite().all()
    if "menu" in kind:
        few, many = (engine(images, budget=budget).decisions for budget in (1.5, 4.0))
        assert few.sum() < many.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_models_walk(kind):
    check_model(kind, CIFAR, "walk")


# It goes on by plain PyTorch where its graphs fail, and warns of that.
@pytest.mark.filterwarnings("error:strategy 'gather'")
@pytest.mark.parametrize(
    "config", [CIFAR, BOTTLENECK, GROUPED], ids=["basic", "bottleneck", "grouped"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_models_gather(kind, config):
    check_model(kind, config, "gather")
