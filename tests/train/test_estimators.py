"""Estimators of the policy gradient against the exact gradient of the expected reward."""

from itertools import combinations, product
from math import comb

import pytest
import torch

from train.config import Curriculum
from train.reward import bounded, explore, flip, policy_loss, sample_antithetic, samples_in

K = 3
LOGITS = torch.tensor([0.4, -1.3, 2.0], dtype=torch.float64)
ALL = torch.tensor(list(product([False, True], repeat=K)))
TABLE = torch.randn(2**K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def table_rewards(decisions, table=TABLE):
    place = 2 ** torch.arange(decisions.shape[-1]).flip(0)
    return table[(decisions * place).sum(-1)]


def exact_gradient(logits, forced, rewards):
    """Of E[R] by the logits, and the decisions that can be drawn, with their probabilities."""
    logits = logits.clone().requires_grad_(True)
    keep = bounded(logits.sigmoid(), 0.8)
    every = torch.tensor(list(product([False, True], repeat=len(logits))))
    every = every[every[:, :forced].all(1)]
    weights = torch.where(every, keep, 1 - keep)[:, forced:].prod(1)
    (gradient,) = torch.autograd.grad(weights @ rewards(every), logits)
    return gradient, every, weights.detach()


def estimates(logits, decisions, config, forced, rewards):
    """(B, K): each image's estimated gradient by the logits, from its column of decisions."""
    logits = logits.expand(decisions.shape[1], -1).clone().requires_grad_(True)
    s = logits.sigmoid()
    exploring = bounded(s, config.alpha)
    loss = policy_loss(s, exploring, decisions, rewards(decisions), config, forced)
    return -torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("forced", [0, 1, 3])
@pytest.mark.parametrize(
    ("estimator", "samples"),
    [("self_critical", 1), ("leave_one_out", 2), ("rloo", 2), ("flips", 1), ("flips", 2)],
)
def test_expected_estimate_is_the_exact_gradient(estimator, samples, forced):
    """Every tuple of samples is one image, weighted with its probability."""
    config = Curriculum(estimator=estimator, samples=samples, entropy=0.0)
    expected, every, weights = exact_gradient(LOGITS, forced, table_rewards)
    tuples = torch.tensor(list(product(range(len(every)), repeat=samples))).T
    decisions, weight = every[tuples], weights[tuples].prod(0)
    if samples_in(config).start:
        thresholded = LOGITS >= 0
        thresholded[:forced] = True
        decisions = torch.cat([thresholded.expand(1, decisions.shape[1], K), decisions])
    if estimator == "flips":
        decisions = torch.cat([decisions, flip(decisions, forced, None, torch.Generator())])
    estimate = weight @ estimates(LOGITS, decisions, config, forced, table_rewards)
    assert torch.allclose(estimate, expected, rtol=1e-12, atol=1e-14)
    assert (estimate[:forced] == 0).all()


def test_flips_of_a_part_of_the_blocks_are_unbiased():
    config = Curriculum(estimator="flips", flips=2, entropy=0.0)
    expected, every, weights = exact_gradient(LOGITS, 0, table_rewards)
    flipped = flip(every[None], 0, None, torch.Generator())
    parts = list(combinations(range(K), 2))
    estimate = sum(
        weights
        @ estimates(LOGITS, torch.cat([every[None], flipped[list(part)]]), config, 0, table_rewards)
        for part in parts
    ) / len(parts)
    assert torch.allclose(estimate, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("flips", [None, 2, 9])
def test_flips_change_one_free_block_each(flips):
    config = Curriculum(estimator="flips", samples=2, flips=flips)
    probabilities = torch.full((600, 5), 0.5)
    _, decisions = explore(probabilities, config, 1, torch.Generator().manual_seed(0))
    count = 2 if flips == 2 else 4
    assert decisions.shape == (2 + 2 * count, 600, 5)
    assert decisions[..., 0].all()
    changed = decisions[2:].unflatten(0, (count, 2)) ^ decisions[:2]
    assert (changed.sum(-1) == 1).all()
    assert (changed.sum(0) <= 1).all()  # no block twice
    shares = changed.float().sum(0).mean((0, 1))
    # 1,200 draws of 2 of 4 blocks: the standard error is 0.015.
    assert torch.allclose(shares[1:], torch.tensor(count / 4), atol=0.07)


def antithetic_weights(decisions, keep):
    """(B,) probabilities of B tuples of antithetic samples: decisions (S, B, K) at keep (K,).

    Of Dirichlet(1, …, 1) shares, m given ones are above x with probability (1 - m x)^(S - 1);
    which ones exactly, by inclusion and exclusion.
    """
    samples, least = len(decisions), torch.minimum(keep, 1 - keep)
    x = 1 - least ** (1 / (samples - 1))
    above = [(1 - m * x).clamp(min=0) ** (samples - 1) for m in range(samples + 1)]
    exactly = torch.stack(
        [
            sum((-1) ** j * comb(samples - m, j) * above[m + j] for j in range(samples - m + 1))
            for m in range(samples + 1)
        ]
    )
    count = (decisions ^ (keep >= 0.5)).sum(0)
    return exactly.clamp(min=0).gather(0, count).prod(1)


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_antithetic_samples_are_distributed_as_they_should(samples):
    keep = torch.tensor([0.05, 0.31, 0.5, 0.62, 0.95], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = sample_antithetic(keep.expand(40_000, -1), samples, 0, generator)
    for k, probability in enumerate(keep):
        patterns = torch.tensor(list(product([False, True], repeat=samples))).T[..., None]
        expected = antithetic_weights(patterns, probability[None])
        assert torch.allclose(expected[patterns[0, :, 0]].sum(), probability)
        code = (drawn[..., k].T * 2 ** torch.arange(samples).flip(0)).sum(1)
        found = code.bincount(minlength=2**samples) / len(code)
        # Four standard errors of a share of 40,000.
        assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / 40_000).sqrt()).all()
    assert sample_antithetic(keep[None], samples, 2, generator)[..., :2].all()


@pytest.mark.parametrize(("samples", "forced"), [(2, 0), (3, 0), (3, 1), (3, 3), (4, 1)])
def test_expected_estimate_of_arms_is_the_exact_gradient(samples, forced):
    config = Curriculum(estimator="arms", samples=samples, entropy=0.0)
    expected, every, _ = exact_gradient(LOGITS, forced, table_rewards)
    decisions = every[torch.tensor(list(product(range(len(every)), repeat=samples))).T]
    keep = bounded(LOGITS.sigmoid(), config.alpha)
    weight = antithetic_weights(decisions[..., forced:], keep[forced:])
    estimate = weight @ estimates(LOGITS, decisions, config, forced, table_rewards)
    assert torch.allclose(estimate, expected, rtol=1e-12, atol=1e-14)
    assert (estimate[:forced] == 0).all()


def test_arms_of_decided_blocks_has_no_gradient_and_no_nan():
    config = Curriculum(estimator="arms", samples=3, entropy=0.0, alpha=1.0)
    probabilities = torch.tensor([[0.0, 1.0, 0.5]], requires_grad=True)
    exploring, decisions = explore(probabilities, config, 0, torch.Generator().manual_seed(0))
    assert decisions[:, 0, :2].tolist() == [[False, True]] * 3
    rewards = torch.tensor([[1.0], [0.0], [-1.0]])
    loss = policy_loss(probabilities, exploring, decisions, rewards, config, 0)
    (gradient,) = torch.autograd.grad(loss, probabilities)
    assert gradient[0, :2].tolist() == [0, 0]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("estimator", ["rloo", "arms"])
def test_estimators_of_samples_alone_try_nothing_else(estimator):
    config = Curriculum(estimator=estimator, samples=3)
    _, decisions = explore(torch.rand(4, 5), config, 2, torch.Generator().manual_seed(0))
    assert decisions.shape == (3, 4, 5)
    assert decisions[samples_in(config)].shape == (3, 4, 5)
    assert decisions[..., :2].all()


def threshold_rewards(keep, generator):
    """An image is right where the random worth of its blocks is above the expected one."""
    worth = torch.rand(len(keep), generator=generator, dtype=torch.float64)

    def rewards(decisions):
        right = (decisions * worth).sum(-1) > (keep * worth).sum()
        return torch.where(right, 1 - decisions.double().mean(-1) ** 2, -2.0)

    return rewards


@pytest.mark.parametrize("low", [0.05, 0.2, 0.45])
@pytest.mark.parametrize("samples", [3, 4])
def test_arms_is_less_noisy_than_rloo_at_the_same_samples(samples, low):
    generator = torch.Generator().manual_seed(0)
    keep = torch.where(torch.rand(15, generator=generator) < 0.5, low, 1 - low).double()
    rewards, noise = threshold_rewards(keep, generator), {}
    for estimator in ("rloo", "arms"):
        config = Curriculum(estimator=estimator, samples=samples, entropy=0.0, alpha=1.0)
        _, decisions = explore(keep.expand(8000, -1), config, 0, generator)
        found = estimates(keep.logit(), decisions, config, 0, rewards)
        noise[estimator] = found.var(0).sum().item()
    assert noise["arms"] < 0.97 * noise["rloo"]


def test_flips_are_less_noisy_than_samples_of_the_same_cost():
    """Five free blocks of fifteen: one sample and its flips, or four sets: two forward passes."""
    forced, generator = 10, torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(15, generator=generator, dtype=torch.float64)
    keep = bounded(logits.sigmoid(), 0.8)
    keep[:forced] = 1
    rewards = threshold_rewards(keep, generator)
    exact, _, _ = exact_gradient(logits, forced, rewards)
    noise = {}
    for estimator, samples in (("self_critical", 3), ("rloo", 4), ("arms", 4), ("flips", 1)):
        config = Curriculum(estimator=estimator, samples=samples, entropy=0.0)
        probabilities = logits.sigmoid().expand(4000, -1)
        _, decisions = explore(probabilities, config, forced, generator)
        found = estimates(logits, decisions, config, forced, rewards)
        noise[estimator] = found.var(0).sum().item()
        standard_error = found.std(0) / len(found) ** 0.5
        assert ((found.mean(0) - exact).abs() <= 4 * standard_error).all()
    assert noise["flips"] < noise["arms"] < noise["rloo"] < noise["self_critical"]
