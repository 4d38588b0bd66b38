"""Reward, advantage and policy-gradient loss (BlockDrop section 3.3), and the step they make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import blockdrop_fast as bdf
from train.config import Curriculum, Finetune, Policy


def reward(right: Tensor, decisions: Tensor, penalty: float) -> Tensor:
    """R(u), equation 3: ``1 - (|u|_0 / K)^2`` if the prediction is right, else ``-penalty``.

    Args:
        right: (…, B) bool, or a probability in between the two.
        decisions: (…, B, K) bool, 1 = keep.
        penalty: gamma.

    Returns:
        (…, B) float32.
    """
    usage = decisions.float().mean(-1)
    right = right.float()
    return right * (1 - usage**2) - (1 - right) * penalty


def judge(
    logits: Tensor, labels: Tensor, decisions: Tensor, config: Curriculum | Finetune
) -> tuple[Tensor, Tensor]:
    """What came of decisions.

    Args:
        logits: (N, B, C), the backbone's at the decisions.
        labels: (B,) int64.
        decisions: (N, B, K) bool.

    Returns:
        (N, B) bool, whether the prediction is right, and (N, B) float32 rewards, of that or of the
        label's probability (``--reward-of``).
    """
    correct = logits.argmax(-1) == labels
    if config.reward_of == "right":
        return correct, reward(correct, decisions, config.penalty)
    if config.reward_of != "probability":
        raise ValueError(f"reward_of: expected 'right' or 'probability', got {config.reward_of!r}")
    at = labels.expand(correct.shape)[..., None]
    probability = logits.float().softmax(-1).gather(-1, at)[..., 0]
    return correct, reward(probability, decisions, config.penalty)


def bounded(probabilities: Tensor, alpha: float) -> Tensor:
    """s' = alpha s + (1 - alpha)(1 - s), which lies in 1 - alpha … alpha and keeps exploring."""
    return alpha * probabilities + (1 - alpha) * (1 - probabilities)


def forced_blocks(num_blocks: int, epoch: int, blocks_per_epoch: float = 1.0) -> int:
    """How many first blocks the curriculum forces on in epoch t (1-based): K - t, at least 0."""
    return max(0, num_blocks - int(epoch * blocks_per_epoch))


def sample(probabilities: Tensor, samples: int, forced: int, generator: torch.Generator) -> Tensor:
    """Draw decisions u ~ Bernoulli(s'), the first ``forced`` blocks on.

    Args:
        probabilities: (B, K), s'.

    Returns:
        (samples, B, K) bool.
    """
    expanded = probabilities.detach().expand(samples, -1, -1)
    decisions = torch.bernoulli(expanded, generator=generator).bool()
    decisions[..., :forced] = True
    return decisions


def advantages(sampled: Tensor, thresholded: Tensor, baseline: str) -> Tensor:
    """What each sample's reward is better by than its baseline.

    Args:
        sampled: (S, B) rewards of the sampled decisions.
        thresholded: (B,) reward of the thresholded decisions.
        baseline: "self_critical": the thresholded decisions' reward (equation 6).
            "leave_one_out": the mean over the image's other samples and the thresholded
            decisions; unbiased as well, and less noisy the more samples there are.

    Returns:
        (S, B).
    """
    if baseline == "self_critical":
        return sampled - thresholded
    if baseline == "leave_one_out":
        others = sampled.sum(0) - sampled + thresholded
        return sampled - others / sampled.shape[0]
    raise ValueError(f"baseline: expected 'self_critical' or 'leave_one_out', got {baseline!r}")


def policy_gradient_loss(
    probabilities: Tensor, decisions: Tensor, advantage: Tensor, forced: int
) -> Tensor:
    """Minus the expected gradient's integrand (equation 6), mean over samples, sum over images.

    Args:
        probabilities: (B, K), s', with gradient.
        decisions: (S, B, K) bool, drawn from s'.
        advantage: (S, B).
        forced: log-probabilities of the first ``forced`` blocks, which were not drawn, are
            masked out.

    Returns:
        Scalar.
    """
    chosen = torch.where(decisions, probabilities, 1 - probabilities)
    log_probability = chosen[..., forced:].log().sum(-1)
    return -(advantage * log_probability).mean(0).sum()


def entropy_bonus(probabilities: Tensor, exploring: Tensor, form: str, forced: int) -> Tensor:
    """What rewards an undecided policy, summed over images and blocks.

    Args:
        probabilities: (B, K), s, with gradient.
        exploring: (B, K), s', with gradient.
        form: "authors": -s' log s' over all blocks, also forced ones (the authors' code).
            "bernoulli": the entropy -s log s - (1 - s) log(1 - s) over free blocks; of s, as a
            bounded s' is undecided whatever s is.
        forced: so many first blocks are on.

    Returns:
        Scalar.
    """
    if form == "authors":
        return -(exploring * exploring.log()).sum()
    if form == "bernoulli":
        # 0 log 0 = 0, and its gradient is not NaN either.
        tiny = torch.finfo(probabilities.dtype).eps
        keep = probabilities[:, forced:].clamp(tiny, 1 - tiny)
        return -(keep * keep.log() + (1 - keep) * (1 - keep).log()).sum()
    raise ValueError(f"entropy_form: expected 'authors' or 'bernoulli', got {form!r}")


@dataclass(frozen=True)
class Step:
    """What a step of policy training tried, and what came of it.

    Attributes:
        decisions: (1 + S, B, K) bool: thresholded, then the samples.
        correct: (1 + S, B) bool, whether the prediction at them is right.
        rewards: (1 + S, B).
        loss: scalar, with gradient to the policy network.
    """

    decisions: Tensor
    correct: Tensor
    rewards: Tensor
    loss: Tensor


def explore(
    probabilities: Tensor, config: Policy, forced: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What to sample from, and the decisions to try.

    Args:
        probabilities: (B, K), s.
        forced: so many first blocks are on.

    Returns:
        (B, K) s', with gradient, and (1 + S, B, K) bool: thresholded, then the samples.
    """
    thresholded = bdf.decide(probabilities)
    thresholded[:, :forced] = True
    exploring = bounded(probabilities, config.alpha)
    sampled = sample(exploring, config.samples, forced, generator)
    return exploring, torch.cat([thresholded[None], sampled])


def policy_loss(
    probabilities: Tensor,
    exploring: Tensor,
    decisions: Tensor,
    rewards: Tensor,
    config: Curriculum | Finetune,
    forced: int,
) -> Tensor:
    """The policy network's loss, summed over images: policy gradient and entropy bonus.

    Args:
        probabilities: (B, K), s, with gradient.
        exploring: (B, K), s', with gradient, of ``explore``.
        decisions: (1 + S, B, K), of ``explore``.
        rewards: (1 + S, B), theirs.
        forced: so many first blocks are on.

    Returns:
        Scalar.
    """
    advantage = advantages(rewards[1:], rewards[0], config.baseline)
    loss = policy_gradient_loss(exploring, decisions[1:], advantage, forced)
    if config.entropy:
        bonus = entropy_bonus(probabilities, exploring, config.entropy_form, forced)
        loss = loss - config.entropy * bonus
    return loss


def curriculum_step(
    probabilities: Tensor,
    labels: Tensor,
    config: Curriculum,
    forced: int,
    generator: torch.Generator,
    logits: Callable[[Tensor], Tensor],
) -> Step:
    """A step's decisions, rewards and loss (Algorithm 1, lines 5 to 12).

    Args:
        probabilities: (B, K), the policy network's, with gradient.
        labels: (B,) int64.
        forced: so many first blocks are on.
        logits: (1 + S, B, K) decisions -> (1 + S, B, C), without gradient.
    """
    exploring, decisions = explore(probabilities, config, forced, generator)
    correct, rewards = judge(logits(decisions), labels, decisions, config)
    loss = policy_loss(probabilities, exploring, decisions, rewards, config, forced) / len(labels)
    return Step(decisions, correct, rewards, loss)
