"""Reward, advantage and policy-gradient loss (BlockDrop section 3.3), and the step they make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import blockdrop_fast as bdf
from train import distributed
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
    expanded = distributed.spread(probabilities.detach()).expand(samples, -1, -1)
    decisions = distributed.own(torch.bernoulli(expanded, generator=generator).bool(), 1)
    decisions[..., :forced] = True
    return decisions


def sample_antithetic(
    probabilities: Tensor, samples: int, forced: int, generator: torch.Generator
) -> Tensor:
    """Draw decisions u ~ Bernoulli(s') of which two of an image differ more often than by chance.

    A block's uniform variates are Dirichlet(1, …, 1) shares, each through its distribution
    function: not two of them are small at once. Samples whose variate is below the probability of
    the less likely decision take that one (ARMS: Dimitriev and Zhou, 2021).

    Args:
        probabilities: (B, K), s'.
        samples: S, at least 2.
        forced: the first blocks, which are on.

    Returns:
        (S, B, K) bool; each sample alone is distributed as those of ``sample``.
    """
    probabilities = probabilities.detach()
    batch, num_blocks = probabilities.shape
    drawn = probabilities.new_empty(samples, distributed.whole(batch), num_blocks)
    drawn = distributed.own(drawn.exponential_(generator=generator), 1)
    uniform = (1 - drawn / drawn.sum(0)) ** (samples - 1)
    less_likely = uniform < torch.minimum(probabilities, 1 - probabilities)
    decisions = less_likely ^ (probabilities >= 0.5)
    decisions[..., :forced] = True
    return decisions


def arms_loss(probabilities: Tensor, decisions: Tensor, rewards: Tensor) -> Tensor:
    """Minus the expected reward, linear in each s'_k, sum over images.

    Its slope is the samples' covariance of reward and decision, over how often two antithetic
    samples differ. It is 0 for blocks in which none differ, as forced ones. Of two samples it is
    DisARM.

    Args:
        probabilities: (B, K), s', with gradient.
        decisions: (S, B, K) bool, of ``sample_antithetic``.
        rewards: (S, B).

    Returns:
        Scalar, whose value means nothing; its gradient does.
    """
    others = len(decisions) - 1
    values = decisions.to(rewards.dtype)
    gain = (rewards - rewards.mean(0))[..., None]
    covariance = (gain * (values - values.mean(0))).sum(0) / others
    likely = probabilities.detach()
    least = torch.minimum(likely, 1 - likely)
    # Two samples both take the less likely decision with probability ``both``, and differ in one
    # given way with ``least - both``: least (1 - least) if they were independent.
    both = (2 * least ** (1 / others) - 1).clamp(min=0) ** others
    differ = (least - both).clamp(min=torch.finfo(least.dtype).tiny)
    return -(covariance / differ * probabilities).sum()


def flip(decisions: Tensor, forced: int, flips: int | None, generator: torch.Generator) -> Tensor:
    """Decisions with one free block changed each.

    Args:
        decisions: (S, B, K) bool.
        forced: the first blocks, which are not free.
        flips: changed blocks an image and sample, drawn without replacement; at most, and by
            default, all free ones.

    Returns:
        (M * S, B, K) bool: M changes, in each S samples.
    """
    samples, batch, num_blocks = decisions.shape
    free = num_blocks - forced
    order = torch.arange(free, device=decisions.device).expand(samples, batch, free)
    if flips is not None and flips < free:
        shape = (samples, distributed.whole(batch), free)
        drawn = torch.rand(shape, generator=generator, device=decisions.device)
        order = distributed.own(drawn, 1).argsort(-1)[..., :flips]
    changed = F.one_hot(forced + order, num_blocks).bool()
    return (decisions[:, :, None] ^ changed).permute(2, 0, 1, 3).flatten(0, 1)


def flips_loss(
    probabilities: Tensor, decisions: Tensor, rewards: Tensor, samples: int, forced: int
) -> Tensor:
    """Minus the expected reward, linear in each s'_k, mean over samples, sum over images.

    Its slope R(u, block k on) - R(u, block k off) is, in expectation over the other blocks'
    decisions, the derivative of the expected reward by s'_k (local expectation gradient).

    Args:
        probabilities: (B, K), s', with gradient.
        decisions: (S + M * S, B, K) bool: samples drawn from s', and ``flip`` of them.
        rewards: (S + M * S, B).
        samples: S.
        forced: so many first blocks are not free.

    Returns:
        Scalar, whose value means nothing; its gradient does.
    """
    flips = len(decisions) // samples - 1
    values = decisions.to(rewards.dtype)
    # (M, S, B, K): 1 where a block was switched on, -1 where off, else 0.
    change = values[samples:].unflatten(0, (flips, samples)) - values[:samples]
    gain = rewards[samples:].unflatten(0, (flips, samples)) - rewards[:samples]
    slopes = (change * gain[..., None]).sum(0).mean(0)
    # Of t free blocks M were drawn: each stands for t / M.
    free = probabilities.shape[1] - forced
    return -(slopes * (free / max(flips, 1)) * probabilities).sum()


def advantages(sampled: Tensor, thresholded: Tensor | None, baseline: str) -> Tensor:
    """What each sample's reward is better by than its baseline.

    Args:
        sampled: (S, B) rewards of the sampled decisions.
        thresholded: (B,) reward of the thresholded decisions; "rloo" has none.
        baseline: "self_critical": the thresholded decisions' reward (equation 6).
            "leave_one_out": the mean over the image's other samples and the thresholded
            decisions; unbiased as well, and less noisy the more samples there are. "rloo": the
            mean over the image's other samples (REINFORCE leave-one-out).

    Returns:
        (S, B).
    """
    if baseline == "self_critical":
        return sampled - thresholded
    if baseline == "leave_one_out":
        others = sampled.sum(0) - sampled + thresholded
        return sampled - others / sampled.shape[0]
    if baseline == "rloo":
        others = sampled.sum(0) - sampled
        return sampled - others / (sampled.shape[0] - 1)
    raise ValueError(
        f"baseline: expected 'self_critical', 'leave_one_out' or 'rloo', got {baseline!r}"
    )


def policy_gradient_loss(
    probabilities: Tensor, decisions: Tensor, advantage: Tensor, forced: int
) -> Tensor:
    """Minus the expected gradient's integrand (equation 6), mean over samples, sum over images.

    Args:
        probabilities: (B, K), or (S, B, K) where each sample has its own, s', with gradient.
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
        probabilities: (…, B, K), s, with gradient.
        exploring: (…, B, K), s', with gradient.
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
        keep = probabilities[..., forced:].clamp(tiny, 1 - tiny)
        return -(keep * keep.log() + (1 - keep) * (1 - keep).log()).sum()
    raise ValueError(f"entropy_form: expected 'authors' or 'bernoulli', got {form!r}")


@dataclass(frozen=True)
class Step:
    """What a step of policy training tried, and what came of it.

    Attributes:
        decisions: (N, B, K) bool, of ``explore``.
        correct: (N, B) bool, whether the prediction at them is right.
        rewards: (N, B).
        loss: scalar, with gradient to the policy network.
    """

    decisions: Tensor
    correct: Tensor
    rewards: Tensor
    loss: Tensor


def check_estimator(config: Policy) -> None:
    """Refuse options that an estimator cannot work with.

    Raises:
        ValueError: naming the option.
    """
    least = 2 if config.estimator in ("rloo", "arms") else 1
    if config.samples < least:
        raise ValueError(
            f"samples: expected at least {least} for --estimator {config.estimator}, got "
            f"{config.samples}"
        )
    if config.flips is not None and (config.estimator != "flips" or config.flips < 1):
        raise ValueError(
            "flips: expected at least 1, and --estimator flips, got "
            f"{config.flips} and {config.estimator!r}"
        )


def check_policy(name: str, policy: nn.Module) -> None:
    """Refuse a policy whose logits are not those of K independent blocks, all open to choice.

    Raises:
        ValueError: naming the option ``name``.
    """
    if not isinstance(policy, bdf.PolicyNetwork) or policy.menu is not None:
        raise ValueError(
            f"{name}: expected a policy network that decides block by block, got a "
            f"{type(policy).__name__} {'without' if policy.menu is None else 'with'} a menu"
        )


def samples_in(config: Policy) -> slice:
    """Which of the decisions of ``explore`` are the samples."""
    first = 1 if config.estimator in ("self_critical", "leave_one_out") else 0
    return slice(first, first + config.samples)


def explore(
    probabilities: Tensor, config: Policy, forced: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What to sample from, and the decisions to try.

    Args:
        probabilities: (B, K), s.
        forced: so many first blocks are on.

    Returns:
        (B, K) s', with gradient, and (N, B, K) bool: the thresholded decisions, if the estimator
        needs them, then the samples, then for "flips" ``flip`` of them.
    """
    exploring = bounded(probabilities, config.alpha)
    draw = sample_antithetic if config.estimator == "arms" else sample
    sampled = draw(exploring, config.samples, forced, generator)
    if config.estimator == "flips":
        return exploring, torch.cat([sampled, flip(sampled, forced, config.flips, generator)])
    if config.estimator in ("rloo", "arms"):
        return exploring, sampled
    thresholded = bdf.decide(probabilities)
    thresholded[:, :forced] = True
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
        probabilities: (B, K), s, with gradient; (S, B, K) of a policy that decides on the way, each
            of whose samples has its own.
        exploring: of the same shape, s', with gradient.
        decisions: (N, B, K), of ``explore``.
        rewards: (N, B), theirs.
        forced: so many first blocks are on.

    Returns:
        Scalar.
    """
    if config.estimator == "flips":
        loss = flips_loss(exploring, decisions, rewards, config.samples, forced)
    elif config.estimator == "arms":
        loss = arms_loss(exploring, decisions, rewards)
    else:
        samples = samples_in(config)
        thresholded = rewards[0] if samples.start else None
        advantage = advantages(rewards[samples], thresholded, config.estimator)
        loss = policy_gradient_loss(exploring, decisions[samples], advantage, forced)
    if config.entropy:
        bonus = entropy_bonus(probabilities, exploring, config.entropy_form, forced)
        loss = loss - config.entropy * bonus / probabilities[..., 0, 0].numel()
    return loss


# Of a usage price, in units of the reward: how much of the price is the present excess of usage.
# Without it price and usage swing about the target; in trials 2 damped them within 200 steps.
USAGE_DAMPING = 2.0


class UsagePrice:
    """The dual variable of a usage target: what keeping blocks costs beside the paper's reward.

    It sums up by how much usage was above the target, and is damped by the present excess, as in
    an augmented Lagrangian.

    Args:
        config: its ``usage_target``, in blocks; None: the price stays 0.
        num_blocks: K.

    Attributes:
        value: the price of all K blocks, in units of the reward.
    """

    def __init__(self, config: Policy, num_blocks: int):
        self.target, self.rate = config.usage_target, config.usage_rate
        self.value: Tensor | float = 0.0
        self._sum: Tensor | float = 0.0
        if self.target is not None and not 0 <= self.target <= num_blocks:
            raise ValueError(
                f"usage_target: expected 0 to {num_blocks} blocks, got {self.target:g}"
            )

    def charge(self, rewards: Tensor, decisions: Tensor) -> Tensor:
        """Rewards (N, B) less the price of what decisions (N, B, K) keep."""
        if self.target is None:
            return rewards
        return rewards - self.value * decisions.float().mean(-1)

    def update(self, probabilities: Tensor, forced: int) -> None:
        """Move the price with how far the thresholded decisions are above the target.

        Args:
            probabilities: (B, K), s.
            forced: so many first blocks are on.
        """
        if self.target is None:
            return
        num_blocks = probabilities.shape[1]
        kept = bdf.decide(probabilities.detach())[:, forced:].sum(1).float().mean()
        kept = distributed.mean(kept)
        target = self.target * (num_blocks - forced) / num_blocks
        excess = (kept - target) / num_blocks
        self._sum = self._sum + self.rate * excess
        self.value = self._sum + USAGE_DAMPING * excess

    def state_dict(self) -> dict[str, float]:
        """The price, for a checkpoint."""
        return {"value": float(self.value), "sum": float(self._sum)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on at a checkpoint's price."""
        self.value, self._sum = state["value"], state["sum"]


def curriculum_step(
    probabilities: Tensor,
    labels: Tensor,
    config: Curriculum,
    forced: int,
    generator: torch.Generator,
    logits: Callable[[Tensor], Tensor],
    price: UsagePrice | None = None,
) -> Step:
    """A step's decisions, rewards and loss (Algorithm 1, lines 5 to 12).

    Args:
        probabilities: (B, K), the policy network's, with gradient.
        labels: (B,) int64.
        forced: so many first blocks are on.
        logits: (N, B, K) decisions -> (N, B, C), without gradient.
        price: of a usage target, which the step then moves; it is not in the step's rewards.
    """
    exploring, decisions = explore(probabilities, config, forced, generator)
    correct, rewards = judge(logits(decisions), labels, decisions, config)
    paid = rewards if price is None else price.charge(rewards, decisions)
    loss = policy_loss(probabilities, exploring, decisions, paid, config, forced) / len(labels)
    if price is not None:
        price.update(probabilities, forced)
    return Step(decisions, correct, rewards, loss)
