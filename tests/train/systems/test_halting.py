"""The stage halting on a few digits: what tau does, what ponder costs, a killed run goes on."""

import json
from dataclasses import replace

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.networks.halting import WeightedOutput
from tests.train.conftest import FEW
from train.systems.config import Halting
from train.systems.halting import halting, ponder_cost

SMALL = FEW | {
    "limit": 192,
    "batch_size": 16,
    "epochs": 5,
    "evaluate_every": 5,
    "routing_images": 50,
    "lr": 0.03,
    "policy_lr": 0.5,
    "bias": -2.0,
}


@pytest.fixture(scope="module")
def backbone(deep):
    return deep / "model.safetensors"


@pytest.fixture(scope="module")
def act(backbone, tmp_path_factory):
    out = tmp_path_factory.mktemp("act")
    halting(Halting(backbone=backbone, tau=0.3, out=out, **SMALL))
    return out


def rows(out):
    return json.loads((out / "metrics.json").read_text())


def test_a_higher_tau_halts_earlier(act, backbone, tmp_path):
    halting(Halting(backbone=backbone, tau=0.0, out=tmp_path, **SMALL))
    cheap, free = rows(act), rows(tmp_path)
    assert cheap[0]["train_loss"] == free[0]["train_loss"]  # the first epoch is free
    assert cheap[-1]["train_ponder"] < free[-1]["train_ponder"] - 0.5
    assert cheap[-1]["test_sparsity"] < free[-1]["test_sparsity"] - 0.5
    assert cheap[-1]["test_flops"] < free[-1]["test_flops"]
    assert cheap[-1]["test_accuracy"] > 0.5
    model = bdf.load(act / "model.safetensors")
    assert isinstance(model.policy, bdf.HaltingPolicy)
    assert not model.policy.hard


def test_hard_goes_on_from_soft(act, backbone, tmp_path):
    config = Halting(model=act / "model.safetensors", hard=True, out=tmp_path, **SMALL)
    halting(replace(config, epochs=2, free_epochs=0, policy_lr=0.02, teacher=backbone))
    row = rows(tmp_path)[-1]
    assert row["train_accuracy"] > 0.4
    assert "test_routing_gain" in row
    before, after = (bdf.load(out / "model.safetensors") for out in (act, tmp_path))
    assert after.policy.hard
    for part in ("backbone", "policy"):
        pairs = zip(*(getattr(one, part).parameters() for one in (before, after)), strict=True)
        assert any((old != new).any() for old, new in pairs)


def test_ponder_cost_by_hand():
    scores = torch.tensor([0.6, 0.7, 0.2], requires_grad=True)
    zero = torch.zeros(())
    # Of segments of 3 and 2 blocks: one image halts at 2 and 2, the other runs 1 and 2 of them.
    weights = torch.stack(
        [
            torch.stack([scores[0], 1 - scores[0], zero, scores[1], 1 - scores[1]]),
            torch.stack([zero + 1, zero, zero, scores[2], 1 - scores[2]]),
        ]
    )
    decisions = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 1]]).bool()
    cost = ponder_cost(WeightedOutput(torch.zeros(2, 10), decisions, weights), (3, 2))
    expected = ((2 + 0.4) + (2 + 0.3) + (1 + 1.0) + (2 + 0.8)) / 2
    assert cost.item() == pytest.approx(expected)
    cost.backward()
    assert scores.grad.tolist() == pytest.approx([-0.5, -0.5, -0.5])


def test_a_killed_run_goes_on_to_the_same_model(act, backbone, killed, tmp_path):
    config = Halting(backbone=backbone, tau=0.3, out=tmp_path, **SMALL)
    killed(halting, config)
    halting(replace(config, resume=True))
    whole, resumed = (bdf.load(out / "model.safetensors").state_dict() for out in (act, tmp_path))
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": None}, "backbone and model: expected one of the two"),
        ({"tau": -0.1}, "tau: expected 0 or more, got -0.1"),
        ({"tau": float("nan")}, "tau: expected 0 or more, got nan"),
        ({"epsilon": 1.0}, "epsilon: expected between 0 and 1, got 1.0"),
        ({"backbone": None, "model": "sequential"}, "model: expected one of this stage"),
    ],
)
def test_bad_options(options, message, backbone, tmp_path):
    if options.get("model"):
        network = bdf.load_backbone(backbone)
        options["model"] = tmp_path / "sequential.safetensors"
        bdf.save(bdf.BlockDrop(network, bdf.SequentialPolicy(network.config)), options["model"])
    config = Halting(backbone=backbone, out=tmp_path / "run", **SMALL)
    with pytest.raises(ValueError, match=message):
        halting(replace(config, **options))
    assert not (tmp_path / "run").exists()
