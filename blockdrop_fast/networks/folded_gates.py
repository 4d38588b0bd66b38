"""Gates frozen for execution beside a ``FoldedNetwork``: copies, which later training misses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockdrop_fast.networks.exits import Exits
from blockdrop_fast.networks.gated import GatedPolicy
from blockdrop_fast.networks.halting import HaltingPolicy
from blockdrop_fast.networks.sequential import SequentialPolicy


@dataclass(frozen=True)
class FoldedLinear:
    """A linear layer on features averaged over pixels, with the batch norm before it folded in.

    Attributes:
        weight: (outputs, C).
        bias: (outputs,).
    """

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class FoldedSequential:
    """A ``SequentialPolicy``.

    Attributes:
        gates: K of one output, each on its block's input.
    """

    gates: tuple[FoldedLinear, ...]


@dataclass(frozen=True)
class FoldedHalting:
    """A ``HaltingPolicy``.

    Attributes:
        heads: K of one output, each on its block's output; None for the last block of a segment.
        epsilon, hard: as of the policy.
    """

    heads: tuple[FoldedLinear | None, ...]
    epsilon: float
    hard: bool


@dataclass(frozen=True)
class FoldedExits:
    """``Exits``.

    Attributes:
        after: the blocks behind which there are exits, 1-based, ascending, E of them.
        heads: E of an output a class.
        rules: (E, 6) float32.
    """

    after: tuple[int, ...]
    heads: tuple[FoldedLinear, ...]
    rules: Tensor


FoldedGates = FoldedSequential | FoldedHalting | FoldedExits


def fold_linear(linear: nn.Linear, bn: nn.BatchNorm1d | None, dtype: torch.dtype) -> FoldedLinear:
    """Fold batch norm in eval mode into the linear layer behind it; in float64, rounded once."""
    weight, bias = linear.weight.double(), linear.bias.double()
    if bn is not None:
        scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
        bias = bias + weight @ (bn.bias.double() - bn.running_mean.double() * scale)
        weight = weight * scale
    return FoldedLinear(weight.to(dtype, copy=True), bias.to(dtype, copy=True))


@torch.no_grad()
def fold_gates(policy: GatedPolicy, dtype: torch.dtype) -> FoldedGates:
    """Copy the gates of a policy that decides on the way.

    Raises:
        TypeError: a policy of another kind.
    """
    if isinstance(policy, SequentialPolicy):
        return FoldedSequential(tuple(fold_linear(gate, None, dtype) for gate in policy.gates))
    if isinstance(policy, HaltingPolicy):
        heads = (
            None if isinstance(head, nn.Identity) else fold_linear(head[1], head[0], dtype)
            for head in policy.heads
        )
        return FoldedHalting(tuple(heads), policy.epsilon, policy.hard)
    if isinstance(policy, Exits):
        heads = (fold_linear(head, None, dtype) for head in policy.heads)
        return FoldedExits(policy.exits, tuple(heads), policy.rules.to(torch.float32, copy=True))
    raise TypeError(
        f"policy: {type(policy).__name__} decides for every pixel, which the reference alone does; "
        "compile model.backbone, which runs its decisions for blocks"
    )
