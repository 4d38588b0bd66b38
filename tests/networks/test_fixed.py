"""A policy of one set: decisions, engines, FLOPs, checkpoints, and what it refuses."""

import pytest
import torch

import blockdrop_fast as bdf
from tests.random_networks import CIFAR, make_images, make_network

KEEP = torch.tensor([True, False, True, True, False])


@pytest.fixture(scope="module")
def model():
    return bdf.BlockDrop(make_network(CIFAR), bdf.FixedPolicy(KEEP)).eval()


@pytest.mark.parametrize("strategy", ["walk", "gather", "dense"])
def test_every_image_runs_the_set_in_every_engine(model, strategy):
    images = make_images(CIFAR, 3)
    engine = bdf.compile(model, strategy=strategy)
    logits, decisions = engine(images)
    assert torch.equal(decisions, KEEP.expand(3, -1))
    assert torch.equal(engine.decide(images), decisions)
    assert torch.equal(engine.probabilities(images) >= 0.5, decisions)
    with torch.no_grad():
        expected = model(images)
    assert torch.equal(expected.decisions, decisions)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_it_costs_nothing(model):
    decisions = KEEP.expand(2, -1)
    assert torch.equal(bdf.flops(model, decisions), bdf.flops(model.backbone, decisions))


def test_it_is_saved(model, tmp_path):
    bdf.save(model, tmp_path / "model.safetensors")
    loaded = bdf.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded.policy.keep, KEEP)


def test_bad_input(model):
    with pytest.raises(ValueError, match=r"keep: expected shape \(K,\) bool"):
        bdf.FixedPolicy(KEEP.float())
    with pytest.raises(TypeError, match=r"keep: expected a torch.Tensor, got list"):
        bdf.FixedPolicy(KEEP.tolist())
    with pytest.raises(ValueError, match="policy: decides on 4 blocks"):
        bdf.BlockDrop(model.backbone, bdf.FixedPolicy(KEEP[:4]))
    with pytest.raises(ValueError, match="budget: this policy network decides at one usage only"):
        bdf.compile(model)(make_images(CIFAR, 1), budget=2.0)
