"""Whether decisions depend on the image, and pay: cases made so that the answer is known."""

import math

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.measure import evaluation as evaluation_module
from blockdrop_fast.measure.routing import (
    at_usage,
    concave_envelope,
    effective_policies,
    margins,
    rank_correlation,
    routing_gain,
    shuffled_decisions,
)


def test_shuffles_are_permutations():
    decisions = torch.rand(40, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    shuffled = shuffled_decisions(decisions, 3)
    assert shuffled.shape == (3, 40, 5)
    rows = sorted(decisions.tolist())
    for one in shuffled:
        assert sorted(one.tolist()) == rows
        assert not torch.equal(one, decisions)
    assert torch.equal(shuffled, shuffled_decisions(decisions, 3))


def test_gain_by_hand():
    correct = torch.tensor([1, 1, 1, 0]).bool()
    shuffled = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0]]).bool()
    assert routing_gain(correct, shuffled) == pytest.approx((0.75 - 0.375, 0.125))


def test_effective_policies():
    equal = torch.eye(4).bool().repeat(3, 1)
    assert effective_policies(equal) == pytest.approx(4)
    assert effective_policies(equal[:1].expand(9, -1)) == 1
    uneven = torch.tensor([[1, 0]] * 3 + [[0, 1]]).bool()
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_policies(uneven) == pytest.approx(math.exp(entropy))


def test_margins():
    assert margins(torch.tensor([[1.0, 4.0, 2.0], [5.0, 0.0, 5.0]])).tolist() == [2, 0]


def test_rank_correlation():
    x = torch.tensor([1, 2, 3, 4])
    assert rank_correlation(x, x.float().exp()) == pytest.approx(1)
    assert rank_correlation(x, -x) == pytest.approx(-1)
    # Ranks 1.5, 1.5, 3, 4 and 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    assert rank_correlation(torch.tensor([7, 7, 8, 9]), x) == pytest.approx(
        4.5 / math.sqrt(4.5 * 5)
    )
    assert rank_correlation(torch.ones(4), x) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.1, 0.8, 0.7, 1.0], [0.0, 0.4, 0.8, 0.9, 1.0]),
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),
        ([0.5, 0.1, 0.1, 0.2], [0.5, 0.4, 0.3, 0.2]),
        ([0.0, 0.9, 0.8, 0.1], [0.0, 0.9, 0.8, 0.1]),
    ],
)
def test_envelope(values, expected):
    found = concave_envelope(torch.tensor(values))
    torch.testing.assert_close(found, torch.tensor(expected).double())


def test_between_two_sizes():
    values = torch.tensor([0.0, 1.0, 3.0])
    found = [at_usage(values, usage) for usage in (0, 0.5, 1, 1.25, 2)]
    assert found == [0, 0.5, 1, 1.5, 3]


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    backbone = bdf.resnet_cifar(14).eval()
    for block, _ in backbone.blocks():
        torch.nn.init.uniform_(block.bn2.weight, 0.5, 2)
    return backbone


@pytest.fixture(scope="module")
def batches(backbone):
    """Labels are what either of two sets of blocks says, by turns."""
    images = torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    engine = bdf.compile(backbone)
    predicted = engine.run_sets(images, two_sets(images)).argmax(-1)
    assert (predicted[0] != predicted[1]).sum() > 20
    labels = torch.where(torch.arange(96) % 2 == 0, predicted[0], predicted[1])
    return list(zip(images.split(40), labels.split(40), strict=True))


def two_sets(images: torch.Tensor) -> torch.Tensor:
    sets = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 1, 0]]).bool()
    return sets[:, None].expand(-1, len(images), -1)


def decide_rightly(backbone, batches):
    """The set that is right, by looking at the labels."""
    engine = bdf.compile(backbone)
    labels = {id(images): labels for images, labels in batches}

    def decide(images: torch.Tensor) -> torch.Tensor:
        sets = two_sets(images)
        right = engine.run(images, sets[0]).argmax(1) == labels[id(images)]
        return torch.where(right[:, None], sets[0], sets[1])

    return decide


def test_a_static_policy_gains_nothing(backbone, batches):
    engine = bdf.compile(backbone)
    found = bdf.evaluate(engine, batches, lambda images: two_sets(images)[1])
    assert (found.routing_gain, found.routing_gain_std) == (0, 0)
    assert found.effective_policies == 1
    assert found.margin_correlation is None
    assert "routing gain     0.00" in found.format()


def test_an_oracle_of_two_policies_gains(backbone, batches, monkeypatch):
    engine = bdf.compile(backbone)
    decide = decide_rightly(backbone, batches)
    found = bdf.evaluate(engine, batches, decide)
    assert found.accuracy == 1
    assert found.routing_images == 96
    assert 1 < found.effective_policies <= 2
    # The same by hand.
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    decisions = torch.cat([decide(some) for some, _ in batches])
    shuffled = shuffled_decisions(decisions, 5)
    right = torch.stack([engine.run(images, one).argmax(1) == labels for one in shuffled])
    accuracies = right.double().mean(1)
    assert found.routing_gain == pytest.approx(1 - accuracies.mean().item())
    assert found.routing_gain > 0.05
    assert found.routing_gain_std == pytest.approx(accuracies.std(correction=0).item())
    full = margins(engine.run(images, torch.ones(96, 6).bool()))
    assert found.margin_correlation == pytest.approx(rank_correlation(decisions.sum(1), full))
    # On some of the images, drawn; and not at all.
    monkeypatch.setattr(evaluation_module, "ROUTING_BATCH", 7)
    some = bdf.evaluate(engine, batches, decide, routing_images=50)
    assert some.routing_images == 50
    assert 0 < some.routing_gain < 1
    assert bdf.evaluate(engine, batches, decide, routing_images=0).routing_gain is None
    assert bdf.evaluate(engine, batches, decide, shuffles=0).routing_gain is None
    monkeypatch.setattr(evaluation_module, "ROUTING_BYTES", 30 * images[0].nbytes)
    assert bdf.evaluate(engine, batches, decide).routing_images == 30


def test_all_images_are_drawn_alike():
    seen = torch.zeros(20)
    for seed in range(300):
        drawn = evaluation_module._Drawn(5)
        drawn._generator.manual_seed(seed)
        numbers = torch.arange(20).view(20, 1)
        for batch in numbers.split(6):
            drawn.add(batch, batch)
        kept = [int(row[1]) for row in drawn.rows]
        assert len(set(kept)) == 5
        assert all(torch.equal(image, found) for image, found in drawn.rows)
        seen[kept] += 1
    assert seen.min() > 50
    assert seen.max() < 100


def test_beside_the_static_line(backbone, batches):
    line = torch.tensor([0.1, 0.2, 0.7, 0.7, 0.8, 0.9, 1.0])
    found = bdf.evaluate(
        bdf.compile(backbone), batches, lambda images: two_sets(images)[1], static_accuracies=line
    )
    assert found.static_accuracy == pytest.approx(0.7)
    assert found.envelope_accuracy == pytest.approx(0.7)
    assert "static sets      70.00 % at this usage" in found.format()
    with pytest.raises(ValueError, match="static_accuracies"):
        bdf.evaluate(bdf.compile(backbone), batches, static_accuracies=line[1:])
    with pytest.raises(ValueError, match="shuffles"):
        bdf.evaluate(bdf.compile(backbone), batches, shuffles=-1)
    with pytest.raises(ValueError, match="budget: expected none"):
        bdf.evaluate(bdf.compile(backbone), batches, two_sets, budget=2)
    with pytest.raises(ValueError, match="budget: a bare backbone"):
        bdf.evaluate(bdf.compile(backbone), batches, budget=2)
