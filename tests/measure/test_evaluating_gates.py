"""Evaluations of models that decide on the way: routing gain by run, where sets say too little."""

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.measure.routing import shuffled_decisions
from tests.random_networks import CIFAR, GATED, IMAGES, make_gated_model, make_images, make_network


def batches_of(engine, images):
    """Labels are what the engine says."""
    labels = engine(images).logits.argmax(1)
    return list(zip(images.split(24), labels.split(24), strict=True))


@pytest.mark.parametrize("kind", GATED)
def test_routing_gain(kind):
    model, images = make_gated_model(kind)
    engine = bdf.compile(model)
    found = bdf.evaluate(engine, batches_of(engine, images), shuffles=3)
    output = engine(images)
    cost = bdf.flops(model, output.decisions, image_size=tuple(images.shape[2:]))
    assert found.accuracy == 1
    assert found.flops == pytest.approx(cost.mean().item())
    assert found.block_usage == pytest.approx(output.decisions.sum(1).double().mean().item())
    # The same by hand.
    given = [shuffled_decisions(one, 3) for one in output[1:]]
    right = [
        engine.run(images, *one).argmax(1) == output.logits.argmax(1)
        for one in zip(*given, strict=True)
    ]
    accuracy = torch.stack(right).double().mean().item()
    assert found.routing_images == IMAGES
    assert found.routing_gain == pytest.approx(1 - accuracy)
    assert found.margin_correlation is not None
    assert "routing gain" in found.format()


def test_given_decisions():
    model, images = make_gated_model("halting")
    engine = bdf.compile(model)
    batches = batches_of(engine, images)
    found = bdf.evaluate(engine, batches, lambda images: torch.ones(len(images), 5))
    assert found.block_usage == 5
    assert found.routing_gain == 0
    decisions = engine.decide(images)  # without the weights that halting gives with them
    labels = torch.cat([one for _, one in batches])
    found = bdf.evaluate(engine, [(images, labels)], lambda _: decisions, shuffles=3)
    right = [
        engine.run(images, one).argmax(1) == labels for one in shuffled_decisions(decisions, 3)
    ]
    assert found.routing_gain == pytest.approx(
        found.accuracy - torch.stack(right).double().mean().item()
    )
    model, _ = make_gated_model("exits")
    with pytest.raises(ValueError, match="decide: expected none, a model with exits"):
        bdf.evaluate(bdf.compile(model), batches, lambda images: torch.ones(len(images), 5))


def test_cascade():
    networks, images = [make_network(CIFAR, seed) for seed in (0, 1)], make_images(CIFAR, IMAGES)
    cascade = bdf.Cascade(networks).eval()
    with torch.no_grad():
        sure = networks[0](images).softmax(1).max(1).values
    cascade.set_thresholds([sure.median().item()])
    engine = bdf.compile(cascade)
    batches = batches_of(engine, images)
    found = bdf.evaluate(engine, batches)
    assert found.accuracy == 1
    assert found.block_usage == pytest.approx(1.5, abs=0.02)
    assert (found.num_blocks, found.segment_blocks) == (2, (1, 1))
    with torch.no_grad():
        right = torch.cat([one(images).argmax(1)[None] for one in networks])
        right = (right == torch.cat([labels for _, labels in batches])).double().mean(1)
    # Half of the images end at either network, whichever they are.
    assert found.routing_gain == pytest.approx(1 - right.mean().item(), abs=0.1)
    assert found.routing_gain > 0.2
    cost = bdf.flops(cascade, engine(images).decisions, image_size=tuple(images.shape[2:]))
    assert found.flops == pytest.approx(cost.mean().item())
    with pytest.raises(ValueError, match="decide: expected none, a cascade"):
        bdf.evaluate(engine, batches, lambda images: torch.ones(len(images), 2))
