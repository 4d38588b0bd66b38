"""A cascade's engine against the cascade."""

import copy

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.measure.tolerance import make_output_reference
from tests.random_networks import BOTTLENECK, CIFAR, IMAGES, make_images, make_network


def make_cascade(config=CIFAR, thresholds=True):
    """A network whose classifier is sure of some images, and two others; images."""
    networks, images = (
        [make_network(config, seed) for seed in range(3)],
        make_images(config, IMAGES),
    )
    cascade = bdf.Cascade(networks).eval()
    if thresholds:
        with torch.no_grad():
            sure = [network(images).softmax(1).max(1).values for network in networks[:2]]
        cascade.set_thresholds([one.quantile(0.6).item() for one in sure])
    return cascade, images


@torch.no_grad()
def check(engine, output, images):
    reference = make_output_reference(engine.model, images, output, engine.dtype)
    reference.check(engine.strategy, output.logits)
    expected = copy.deepcopy(engine.model).double()(images.double()).decisions
    same = (output.decisions == expected).all(1).float().mean()
    assert same >= (0.95 if engine.dtype == torch.float32 else 0.6)


@pytest.mark.parametrize("strategy", ["auto", "walk", "gather", "dense"])
def test_strategies(strategy):
    cascade, images = make_cascade()
    engine = bdf.compile(cascade, strategy=strategy)
    assert strategy in ("auto", engine.strategy)
    assert engine.strategy_reason == engine.engines[0].strategy_reason
    for batch in (1, 9, 64):
        parts = [engine(part) for part in images.split(batch)]
        output = bdf.Output(*map(torch.cat, zip(*parts, strict=True)))
        check(engine, output, images)
    assert len(output.decisions.unique(dim=0)) == 3
    assert torch.equal(engine.decide(images), output.decisions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precisions(dtype):
    cascade, images = make_cascade(BOTTLENECK)
    engine = bdf.compile(cascade, dtype=dtype)
    assert (engine.dtype, engine.device) == (dtype, torch.device("cpu"))
    images = images.to(dtype)
    check(engine, engine(images), images)


@torch.no_grad()
def test_replay_takes_decisions_of_any_dtype():
    cascade, images = make_cascade()
    output = cascade(images)
    for dtype in (torch.bool, torch.int64, torch.float16):
        given = output._replace(decisions=output.decisions.to(dtype))
        torch.testing.assert_close(cascade.replay(images, given), output.logits)


def test_rules_that_let_nobody_or_everybody_stay():
    cascade, images = make_cascade(thresholds=False)
    engine = bdf.compile(cascade)
    assert engine(images).decisions.all()
    cascade.set_thresholds([0, 0])
    assert engine(images).decisions.all()  # a snapshot
    engine.refresh()
    output = engine(images)
    assert output.decisions.sum() == IMAGES
    check(engine, output, images)


@torch.no_grad()
def test_sets_of_blocks_before_a_network(tmp_path):
    """A cascade whose first networks are one set of blocks each: engine, file, FLOPs."""
    keep = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 0, 1, 1]]).bool()
    backbones = [make_network(CIFAR, seed) for seed in range(3)]
    small = [
        bdf.BlockDrop(one, bdf.FixedPolicy(few)) for one, few in zip(backbones, keep, strict=False)
    ]
    cascade, images = bdf.Cascade([*small, backbones[2]]).eval(), make_images(CIFAR, IMAGES)
    sure = [one(images).logits.softmax(1).max(1).values.quantile(0.6).item() for one in small]
    cascade.set_thresholds(sure)
    engine = bdf.compile(cascade)
    output = engine(images)
    check(engine, output, images)
    assert len(output.decisions.unique(dim=0)) == 3
    alone = [
        bdf.flops(one, few[None], image_size=(8, 12)) for one, few in zip(small, keep, strict=True)
    ]
    alone.append(bdf.flops(backbones[2], image_size=(8, 12)))
    expected = output.decisions.double() @ torch.cat(alone)
    torch.testing.assert_close(bdf.flops(cascade, output.decisions, image_size=(8, 12)), expected)
    bdf.save(cascade, tmp_path / "cascade.safetensors")
    loaded = bdf.load(tmp_path / "cascade.safetensors").eval()
    for found, one in zip(bdf.compile(loaded)(images), output, strict=True):
        assert torch.equal(found, one)


def test_other_members():
    network = make_network(CIFAR)
    learned = bdf.BlockDrop(network, bdf.policy_resnet8(5))
    for other in (learned, bdf.Cascade([network, network])):
        with pytest.raises(ValueError, match="or BlockDrop models of a FixedPolicy, got"):
            bdf.Cascade([other, network])


def test_empty_batch_and_modes():
    cascade, images = make_cascade()
    engine = bdf.compile(cascade)
    logits, decisions = engine(images[:0])
    assert (tuple(logits.shape), tuple(decisions.shape)) == ((0, 10), (0, 3))
    expected = engine(images)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = engine(images)
    assert torch.equal(found.logits, expected.logits)
    assert not found.logits.is_inference()


def test_bad_input():
    cascade, images = make_cascade()
    engine = bdf.compile(cascade)
    with pytest.raises(ValueError, match="budget: expected none, a cascade"):
        engine(images, 3.0)
    with pytest.raises(TypeError, match=r"images: expected dtype torch\.float32"):
        engine(images.double())
    cascade.networks[1].to("meta")
    with pytest.raises(ValueError, match="model: expected weights, those on the meta device"):
        bdf.compile(cascade)
