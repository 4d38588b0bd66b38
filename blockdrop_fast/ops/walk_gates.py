"""Walks that decide on the way: what an image has become says which blocks it runs next.

Kernels: ``csrc/cpu/walk_gates.cpp``.

All take images and a network as ``blockdrop_fast.ops.walk`` does, and give the same bits whatever
batch an image is in and however many threads run. A block's decision is True where the image kept
it. What is not a number lets no image leave, and drops blocks.

Gates are a float32 matrix with a row for each block: the bias, then 64 weights of the channels,
averaged over pixels, that the gate looks at (zeros beyond their number).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdrop_fast.ops._library import LIBRARY, REFERENCE
from blockdrop_fast.ops.walk import check, unpack
from blockdrop_fast.ops.walk_network import (
    NETWORK,
    WIDTHS,
    ReferenceNetwork,
    check_decisions,
    new_logits,
)

GATE_VALUES = 1 + WIDTHS[-1]


def walk_sequential(
    images: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
    gates: Tensor,
) -> tuple[Tensor, Tensor]:
    """Ask a gate before every block: kept where the gate's logit is at least 0.

    Args:
        images, weights, layers, num_classes, subsample: as for ``blockdrop_fast.ops.walk``.
        gates: (K, 65) float32, on the blocks' inputs; see the module's docstring.

    Returns:
        logits: (B, num_classes).
        decisions: (B, K) bool.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes that do not fit each other.
    """
    return torch.ops.blockdrop_fast.walk_sequential(
        images, weights, layers, num_classes, subsample, gates
    )


def walk_halting(
    images: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
    gates: Tensor,
    epsilon: float,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adaptive computation time (Figurnov et al. 2017, section 3.1) in each segment by itself.

    An image runs a segment's blocks until the sum of their scores, each a sigmoid of the gate's
    logit, is at least 1 - epsilon, or to the last. A block's share is its score, that of the last
    which ran what is left to 1. The segment gives the sum of outputs, each times its share.

    Args:
        images, weights, layers, num_classes, subsample: as for ``blockdrop_fast.ops.walk``.
        gates: (K, 65) float32, on the blocks' outputs; those of the segments' last blocks are not
            read. See the module's docstring.
        epsilon: between 0 and 1.
        hard: a segment gives the output of the block that it halted after; its share is 1.

    Returns:
        logits: (B, num_classes).
        decisions: (B, K) bool; the first blocks of a segment are always kept.
        shares: (B, K), 0 where a block was dropped; with these ``walk_weighted`` gives the same.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes that do not fit each other, or such an epsilon.
    """
    return torch.ops.blockdrop_fast.walk_halting(
        images, weights, layers, num_classes, subsample, gates, epsilon, hard
    )


def walk_weighted(
    images: Tensor,
    decisions: Tensor,
    shares: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
) -> Tensor:
    """Run given decisions; a segment gives the sum of its kept blocks' outputs times their shares.

    A segment of which an image keeps no block gives what it was given.

    Args:
        images, weights, layers, num_classes, subsample: as for ``blockdrop_fast.ops.walk``.
        decisions: (B, K) bool.
        shares: (B, K) float32; not read where a block is dropped.

    Returns:
        (B, num_classes) logits.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes that do not fit each other.
    """
    return torch.ops.blockdrop_fast.walk_weighted(
        images, decisions, shares, weights, layers, num_classes, subsample
    )


def pack_gates(weights: Sequence[Tensor], biases: Sequence[Tensor | float]) -> Tensor:
    """K (C,) weights and K biases -> (K, 65) of the weights' dtype, for the operators."""
    return torch.stack([
        F.pad(torch.cat([weight.new_tensor([bias]), weight]), (0, WIDTHS[-1] - len(weight)))
        for weight, bias in zip(weights, biases, strict=True)
    ])  # fmt: skip


# ---------------------------------------------------------------- references


def walk_sequential_reference(
    images: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
    gates: Tensor,
) -> tuple[Tensor, Tensor]:
    """What ``walk_sequential`` computes, in PyTorch operations; any floating-point dtype."""
    network = _network(images, weights, layers, num_classes, subsample)
    _check_matrix("gates", gates, weights.dtype, network.num_blocks, GATE_VALUES)
    x, decisions = network.stem(images), []
    for block, gate in enumerate(gates):
        keep = _gate_logit(gate, network.pooled(x)) >= 0
        x = network.run_block(block, x, keep)
        decisions.append(keep)
    return network.classify(x), torch.stack(decisions, 1)


def walk_halting_reference(
    images: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
    gates: Tensor,
    epsilon: float,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``walk_halting`` computes, in PyTorch operations; any floating-point dtype."""
    network = _network(images, weights, layers, num_classes, subsample)
    _check_matrix("gates", gates, weights.dtype, network.num_blocks, GATE_VALUES)
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon: expected between 0 and 1, got {epsilon}")
    x, decisions, shares, block = network.stem(images), [], [], 0
    for num_blocks in network.layers:
        running = torch.ones(len(x), dtype=torch.bool, device=x.device)
        total = x.new_zeros(len(x))
        given: Tensor | float = 0.0
        for index in range(num_blocks):
            x = network.run_block(block, x, running)
            score = _gate_logit(gates[block], network.pooled(x)).sigmoid()
            last = torch.full_like(running, index == num_blocks - 1)
            halts = running & (last | (total + score >= 1 - epsilon))
            share = torch.where(halts, 1 - total, torch.where(running, score, 0))
            given = given + _where(running, share[:, None, None, None] * x, 0)
            decisions.append(running)
            shares.append(halts.to(share) if hard else share)
            total = total + torch.where(running, score, 0)
            running = running & ~halts
            block += 1
        x = x if hard else given
    return network.classify(x), torch.stack(decisions, 1), torch.stack(shares, 1)


def walk_weighted_reference(
    images: Tensor,
    decisions: Tensor,
    shares: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
) -> Tensor:
    """What ``walk_weighted`` computes, in PyTorch operations; any floating-point dtype."""
    network = _network(images, weights, layers, num_classes, subsample)
    _check_decisions(decisions, images, network.num_blocks)
    _check_matrix("shares", shares, weights.dtype, len(images), network.num_blocks)
    x, block = network.stem(images), 0
    for num_blocks in network.layers:
        given: Tensor | float = 0.0
        segment = slice(block, block + num_blocks)
        for keep, share in zip(decisions[:, segment].t(), shares[:, segment].t(), strict=True):
            x = network.run_block(block, x, keep)
            given = given + _where(keep, share[:, None, None, None] * x, 0)
            block += 1
        x = _where(decisions[:, segment].any(1), given, x)
    return network.classify(x)


def _gate_logit(gate: Tensor, pooled: Tensor) -> Tensor:
    """(65,) gate, (B, C) -> (B,)."""
    return pooled @ gate[1 : 1 + pooled.shape[1]] + gate[0]


def _where(images: Tensor, one: Tensor, other: Tensor | float) -> Tensor:
    """(B,) bool, activations (B, C, H, W) -> those of one or the other."""
    return torch.where(images[:, None, None, None], one, other)


def _network(
    images: Tensor, weights: Tensor, layers: Sequence[int], num_classes: int, subsample: bool
) -> ReferenceNetwork:
    check(images, weights, layers, num_classes)
    parameters = list(unpack(weights, layers, num_classes))
    return ReferenceNetwork(parameters, layers, subsample, images.dtype)


def _check_matrix(name: str, matrix: Tensor, dtype: torch.dtype, rows: int, columns: int) -> None:
    if matrix.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {matrix.dtype}")
    if matrix.shape != (rows, columns):
        raise ValueError(f"{name}: expected shape ({rows}, {columns}), got {tuple(matrix.shape)}")


def _check_decisions(decisions: Tensor, images: Tensor, num_blocks: int) -> None:
    if decisions.ndim != 2:
        raise ValueError(f"decisions: expected shape (B, K), got {tuple(decisions.shape)}")
    check_decisions(decisions, len(images), num_blocks)


# ---------------------------------------------------------------- schemas


def _define(schema: str, reference: Callable, fake: Callable) -> None:
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, REFERENCE)
    torch.library.register_fake(f"blockdrop_fast::{name}", fake, lib=LIBRARY)


def _fake(images: Tensor, _weights, layers, num_classes: int, *_) -> tuple[Tensor, Tensor]:
    decisions = images.new_empty((len(images), sum(layers)), dtype=torch.bool)
    return new_logits(images, (len(images), num_classes)), decisions


def _halting_fake(images: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    logits, decisions = _fake(images, *arguments)
    return logits, decisions, new_logits(images, decisions.shape)


def _weighted_fake(images: Tensor, _decisions, _shares, *network) -> Tensor:
    return _fake(images, *network)[0]


_define(
    f"walk_sequential(Tensor images, {NETWORK}, Tensor gates) -> (Tensor logits, Tensor decisions)",
    walk_sequential_reference,
    _fake,
)
_define(
    f"walk_halting(Tensor images, {NETWORK}, Tensor gates, float epsilon, bool hard)"
    " -> (Tensor logits, Tensor decisions, Tensor shares)",
    walk_halting_reference,
    _halting_fake,
)
_define(
    f"walk_weighted(Tensor images, Tensor decisions, Tensor shares, {NETWORK}) -> Tensor",
    walk_weighted_reference,
    _weighted_fake,
)
