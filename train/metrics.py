"""What is counted during an epoch of training: means, and the authors' numbers on decisions."""

from __future__ import annotations

import torch
from torch import Tensor

from train import distributed


class Means:
    """Running means of an epoch's metrics, without a device synchronisation a step."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight = 0

    def add(self, weight: int, **values: Tensor) -> None:
        """Add scalars tensors, each a mean over ``weight`` images."""
        for name, value in values.items():
            term = value.detach().double() * weight
            self._sums[name] = self._sums[name] + term if name in self._sums else term
        self._weight += weight

    def add_policy(
        self,
        decisions: Tensor,
        correct: Tensor,
        rewards: Tensor,
        samples: slice,
        **values: Tensor,
    ) -> None:
        """Add how good a batch's decisions are, and other means over its images.

        Args: see ``train.reward.Step``; ``samples`` is where the samples are, behind thresholded
            decisions if there are any.
        """
        values |= {"accuracy": correct[samples].float().mean(), "reward": rewards[samples].mean()}
        if samples.start:
            values |= {
                "thresholded_accuracy": correct[0].float().mean(),
                "thresholded_reward": rewards[0].mean(),
                "thresholded_sparsity": decisions[0].sum(1).float().mean(),
            }
        self.add(correct.shape[1], **values)

    def items(self) -> dict[str, float]:
        """The means so far, over all processes' images."""
        means = distributed.mean(torch.stack([*self._sums.values()])) / self._weight
        return dict(zip(self._sums, means.tolist(), strict=True))


class PolicyStatistics:
    """The authors' numbers on an epoch's decisions: sparsity, variance, unique policies."""

    def __init__(self) -> None:
        self._policies: set[bytes] = set()
        self._usage: list[Tensor] = []

    def add(self, decisions: Tensor) -> None:
        """Add (…, K) decisions."""
        decisions = decisions.flatten(0, -2)
        self._usage.append(decisions.sum(-1).cpu())
        packed = decisions.unique(dim=0).cpu().numpy()
        self._policies.update(row.tobytes() for row in packed)

    def items(self, split: str) -> dict[str, float]:
        """Scalars under the authors' TensorBoard names ("variance" is a standard deviation)."""
        usage = torch.cat(distributed.gathered(torch.cat(self._usage))).double()
        policies = set().union(*distributed.gathered(self._policies))
        return {
            f"{split}_sparsity": float(usage.mean()),
            f"{split}_variance": float(usage.std(correction=0)),
            f"{split}_unique_policies": len(policies),
        }
