"""Reward, sampling and policy-gradient loss against values worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from train.config import Curriculum
from train.reward import (
    USAGE_DAMPING,
    UsagePrice,
    advantages,
    bounded,
    curriculum_step,
    entropy_bonus,
    forced_blocks,
    judge,
    policy_gradient_loss,
    reward,
    sample,
)


def test_reward_is_equation_3():
    decisions = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    correct = torch.tensor([True, False, True, True])
    assert reward(correct, decisions, 5.0).tolist() == [0.75, -5.0, 1.0, 0.0]


def test_reward_takes_several_sets():
    decisions = torch.tensor([[[1, 0]], [[0, 0]]]).bool()
    correct = torch.tensor([[True], [False]])
    assert reward(correct, decisions, 1.0).tolist() == [[0.75], [-1.0]]


def test_reward_of_the_label_s_probability_lies_between():
    decisions = torch.tensor([[[1, 0, 0, 0]], [[1, 1, 1, 1]]]).bool()
    logits = torch.tensor([[[0.0, math.log(3.0)]], [[math.log(3.0), 0.0]]])
    labels = torch.tensor([1])
    config = Curriculum(penalty=2.0)
    correct, rewards = judge(logits, labels, decisions, config)
    assert correct.tolist() == [[True], [False]]
    assert rewards.tolist() == [[0.9375], [-2.0]]
    correct, rewards = judge(logits, labels, decisions, replace(config, reward_of="probability"))
    assert correct.tolist() == [[True], [False]]
    expected = [0.75 * 0.9375 - 0.25 * 2, 0.25 * 0 - 0.75 * 2]
    assert rewards[:, 0].tolist() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="reward_of"):
        judge(logits, labels, decisions, replace(config, reward_of="none"))


def test_bounded_lies_between_one_minus_alpha_and_alpha():
    s = torch.tensor([0.0, 0.5, 1.0])
    assert torch.allclose(bounded(s, 0.8), torch.tensor([0.2, 0.5, 0.8]))


@pytest.mark.parametrize(
    ("epoch", "per_epoch", "expected"),
    [(1, 1, 14), (14, 1, 1), (15, 1, 0), (99, 1, 0), (3, 0.5, 14)],
)
def test_curriculum_frees_the_last_blocks_first(epoch, per_epoch, expected):
    assert forced_blocks(15, epoch, per_epoch) == expected


def test_sample_forces_the_first_blocks_and_follows_the_probabilities():
    probabilities = torch.tensor([[0.0, 0.0, 0.25, 1.0]]).expand(4000, 4)
    drawn = sample(probabilities, 3, 1, torch.Generator().manual_seed(0))
    assert drawn.shape == (3, 4000, 4)
    rates = drawn.float().mean((0, 1))
    assert rates[[0, 1, 3]].tolist() == [1, 0, 1]
    # 12,000 draws: the standard error is 0.004.
    assert abs(rates[2] - 0.25) < 0.02


def test_self_critical_advantage_is_equation_6():
    sampled, thresholded = torch.tensor([[1.0, -1.0], [0.5, 0.0]]), torch.tensor([0.5, 0.0])
    assert advantages(sampled, thresholded, "self_critical").tolist() == [[0.5, -1.0], [0.0, 0.0]]


def test_leave_one_out_baseline_is_the_mean_of_the_others():
    sampled, thresholded = torch.tensor([[1.0], [0.0]]), torch.tensor([0.5])
    assert advantages(sampled, thresholded, "leave_one_out").tolist() == [[0.75], [-0.75]]


def test_unknown_baseline_is_an_error():
    with pytest.raises(ValueError, match="baseline"):
        advantages(torch.zeros(1, 1), torch.zeros(1), "none")


def test_usage_price_moves_with_the_usage_of_free_blocks():
    price = UsagePrice(Curriculum(usage_target=2.0, usage_rate=0.5), 4)
    kept = torch.tensor([[0.1, 0.9, 0.9, 0.9], [0.1, 0.1, 0.9, 0.9]])
    price.update(kept, 0)  # 2.5 of 4
    assert float(price.value) == pytest.approx((0.5 + USAGE_DAMPING) * 0.5 / 4)
    price.update(torch.zeros(2, 4), 2)  # 0 of the 2 free blocks, where the target is 1
    assert float(price.value) == pytest.approx(0.5 * (0.5 - 1) / 4 - USAGE_DAMPING * 1 / 4)
    price.update(torch.zeros(2, 4), 4)  # no block is free, so that there is no excess
    again = UsagePrice(Curriculum(usage_target=2.0), 4)
    again.load_state_dict(price.state_dict())
    paid = again.charge(torch.tensor([[1.0, 0.0]]), torch.tensor([[[1, 1, 0, 0], [0, 0, 0, 0]]]))
    assert paid[0].tolist() == pytest.approx([1 + 0.0625 / 2, 0])
    with pytest.raises(ValueError, match="usage_target: expected 0 to 4"):
        UsagePrice(Curriculum(usage_target=5.0), 4)


@pytest.mark.parametrize("target", [1.0, 4.0])
def test_usage_target_is_reached(target):
    """Every decision is right, so that the paper's reward alone drops all six blocks."""
    config = Curriculum(
        usage_target=target, usage_rate=0.1, estimator="rloo", samples=4, entropy=0.0
    )
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(128, 6, generator=generator, requires_grad=True)
    optimizer, price = torch.optim.Adam([scores], lr=0.05), UsagePrice(config, 6)
    labels, usage = torch.zeros(128, dtype=torch.int64), []
    for _ in range(500):
        step = curriculum_step(
            scores.sigmoid(),
            labels,
            config,
            0,
            generator,
            lambda decisions: torch.tensor([1.0, 0.0]).expand(*decisions.shape[:2], 2),
            price,
        )
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        usage.append((scores >= 0).float().sum(1).mean().item())
    assert max(abs(kept - target) for kept in usage[-50:]) < 0.3


def test_policy_gradient_loss_by_hand():
    s = torch.tensor([[0.9, 0.6, 0.2]], requires_grad=True)
    decisions = torch.tensor([[[1, 1, 0]]]).bool()
    loss = policy_gradient_loss(s, decisions, torch.tensor([[2.0]]), forced=1)
    assert loss.item() == pytest.approx(-2 * (math.log(0.6) + math.log(0.8)), rel=1e-6)
    loss.backward()
    # The forced block learns nothing; the others are pushed towards what was drawn.
    assert s.grad[0].tolist() == pytest.approx([0, -2 / 0.6, 2 / 0.8], rel=1e-5)


def test_policy_gradient_equals_the_exact_gradient_of_the_expected_reward():
    """Summed over all decisions with their probabilities, the estimate is the true gradient."""
    s = torch.tensor([[0.3, 0.7]], dtype=torch.float64, requires_grad=True)
    every = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).bool()
    values = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64)
    weights = torch.where(every, s, 1 - s).prod(1)
    (expected,) = torch.autograd.grad(weights @ values, s)
    estimate = torch.zeros_like(s)
    for decisions, value, weight in zip(every, values, weights.detach(), strict=True):
        loss = policy_gradient_loss(s, decisions[None, None], (value - 0.25).view(1, 1), 0)
        estimate -= weight * torch.autograd.grad(loss, s)[0]
    assert torch.allclose(estimate, expected)


def test_authors_entropy_bonus_counts_all_blocks():
    s = torch.tensor([[0.5, 1.0], [0.25, 0.5]])
    bonus = entropy_bonus(torch.zeros_like(s), s, "authors", forced=1)
    assert bonus.item() == pytest.approx(1.5 * math.log(2))


def test_bernoulli_entropy_counts_free_blocks_and_pulls_saturated_ones_back():
    logits = torch.tensor([[3.0, 0.0, 4.0, -200.0, 200.0]], requires_grad=True)
    s = logits.sigmoid()
    bonus = entropy_bonus(s, bounded(s, 0.8), "bernoulli", forced=1)
    free = torch.distributions.Bernoulli(s.detach()[:, 1:3]).entropy().sum()
    assert bonus.item() == pytest.approx(free.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(bonus, logits)
    p = torch.sigmoid(torch.tensor(4.0)).item()
    # dH/dlogit = -s (1 - s) logit; the forced block has none, and far tails no NaN.
    expected = [0, 0, -p * (1 - p) * 4, 0, 0]
    assert gradient[0].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_unknown_entropy_form_is_an_error():
    half = torch.full((1, 1), 0.5)
    with pytest.raises(ValueError, match="entropy_form"):
        entropy_bonus(half, half, "none", 0)
