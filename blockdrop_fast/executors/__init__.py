"""Ways to execute a folded network, all alike to the engine; ``choice.py`` picks one.

Their constructors take a ``FoldedNetwork`` and say why where they do not support it.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from blockdrop_fast.networks.folded_gates import FoldedGates
from blockdrop_fast.networks.folding import FoldedHead, FoldedNetwork

Strategy = Literal["walk", "gather", "dense"]


class Executor(Protocol):
    """What an engine asks of an executor.

    Attributes:
        strategy: how it executes.
        logits_dtype: of the logits that it returns.
        remark: to be added to the reason for it: what has become of it since.
    """

    strategy: ClassVar[Strategy]
    logits_dtype: torch.dtype
    remark: str = ""

    def run(self, images: Tensor, decisions: Tensor) -> Tensor:
        """(B, 3, H, W) images, (B, K) bool decisions -> (B, num_classes) logits; B at least 1."""
        ...

    def run_from(self, images: Tensor, features: Tensor, after: int, decisions: Tensor) -> Tensor:
        """``run`` where what blocks 1 to ``after`` give is there already.

        Args:
            images, decisions: as of ``run``; all images keep blocks 1 to ``after``.
            features: (B, C, H, W) channels-last, of those blocks; overwritten. An executor that
                cannot begin there leaves them aside.
        """
        return self.run(images, decisions)

    def run_sets(self, images: Tensor, decisions: Tensor) -> Tensor:
        """(B, 3, H, W) images, (S, B, K) bool -> (S, B, num_classes) logits."""
        ...

    def run_weighted(self, images: Tensor, decisions: Tensor, weights: Tensor) -> Tensor:
        """``run`` where a segment gives a weighted sum, see ``networks.halting.run_weighted``.

        Args:
            images, decisions: as of ``run``.
            weights: (B, K) of any floating-point dtype, not read where a block is dropped.

        Raises:
            ValueError: this executor cannot.
        """
        raise ValueError(
            f"weights: expected none, this {self.strategy} sums no outputs; strategy='gather' does"
        )

    def set_look(self, head: FoldedHead, sets: Tensor | None) -> bool:
        """Take a head to decide by, which looks at the backbone's first blocks as they run.

        Args:
            head: folded, with an output a block, or a set.
            sets: (M, K) bool, a menu's.

        Returns:
            Whether ``run_look`` will, of the images that it ``looks_at``; if not, somebody else has
            to run the head, and those blocks before.
        """
        return False

    def looks_at(self, images: Tensor) -> bool:
        """Whether ``run_look`` takes images of this size."""
        return False

    def run_look(self, images: Tensor, price: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Decide and execute, after ``set_look`` returned True.

        Args:
            images: (B, 3, H, W), B at least 1, that it ``looks_at``.
            price: of a block, of a menu; see ``Menu``.

        Returns:
            (B, num_classes) logits, (B, K) bool decisions, (B, K or M) logits of the head.
        """
        raise RuntimeError("run_look: this executor has no head")

    def set_gates(self, gates: FoldedGates) -> bool:
        """Take gates to decide by on the way through the backbone.

        Returns:
            Whether ``run_gates`` and ``run_exits`` will; if not, somebody else has to.
        """
        return False

    def run_gates(self, images: Tensor) -> tuple[Tensor, ...]:
        """Decide and execute, after ``set_gates`` returned True.

        Args:
            images: (B, 3, H, W), B at least 1.

        Returns:
            (B, num_classes) logits, (B, K) bool decisions, and of halting that is not hard (B, K)
            weights, float32 or float64.
        """
        raise RuntimeError("run_gates: this executor has no gates")

    def run_exits(self, images: Tensor, decisions: Tensor) -> Tensor:
        """``run`` of a network with exits: an image leaves at the exit where its blocks end.

        Raises:
            ValueError: decisions that end at no exit.
        """
        raise RuntimeError("run_exits: this executor has no exits")

    def set_policy(self, policy: FoldedNetwork, pool: int) -> bool:
        """Take a policy network to decide by, in one call with the backbone.

        Args:
            policy: folded, with an output a block.
            pool: images are average-pooled by this factor first.

        Returns:
            Whether ``run_policy`` will; if not, somebody else has to run the policy network.
        """
        return False

    def run_policy(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Decide and execute: (B, 3, H, W) -> (B, num_classes) logits, (B, K) bool decisions.

        Raises:
            RuntimeError: ``set_policy`` has not returned True.
        """
        raise RuntimeError("run_policy: this executor has no policy network")
