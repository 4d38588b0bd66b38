"""Deciding on the way, block-major: gates look at the batch's features between two blocks.

The batch is compacted where images leave: at an exit for good, where they halt until the segment's
end. Each gate waits for the device once, as the next shapes depend on what it decides.
"""

from __future__ import annotations

from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdrop_fast.executors.layers import Layers
from blockdrop_fast.executors.plan import plan
from blockdrop_fast.networks.exits import decisions_at, exits_of, leaves_by
from blockdrop_fast.networks.folded_gates import (
    FoldedExits,
    FoldedGates,
    FoldedHalting,
    FoldedLinear,
    FoldedSequential,
)
from blockdrop_fast.networks.gated import pooled
from blockdrop_fast.networks.policy import threshold
from blockdrop_fast.networks.resnet import take_images


def run_gates(
    layers: Layers, gates: FoldedGates, images: Tensor, dense_from: float
) -> tuple[Tensor, ...]:
    """Decide and execute.

    Args:
        layers, gates: of one network.
        images: (B, 3, H, W), B at least 1.
        dense_from: the share of active images from which a block runs on all of them, masked.

    Returns:
        (B, num_classes) logits, (B, K) bool decisions, and of halting that is not hard (B, K)
        weights, float32 or float64.
    """
    if isinstance(gates, FoldedSequential):
        return _run_sequential(layers, gates, images, dense_from)
    if isinstance(gates, FoldedHalting):
        return _run_halting(layers, gates, images)
    return _run_exits(layers, gates, images, None)


def run_exits(layers: Layers, exits: FoldedExits, images: Tensor, decisions: Tensor) -> Tensor:
    """The logits of the exits at which the kept blocks end.

    Args:
        decisions: (B, K) bool; the others as of ``run_gates``.

    Raises:
        ValueError: decisions that end at no exit.
    """
    left = exits_of(decisions, (*exits.after, len(layers.blocks)))
    return _run_exits(layers, exits, images, left)[0]


def run_weighted(
    layers: Layers, images: Tensor, decisions: Tensor, weights: Tensor, dense_from: float
) -> Tensor:
    """What ``networks.halting.run_weighted`` computes; see there.

    Args:
        weights: (B, K) of any floating-point dtype; the others as of ``run_gates``.
    """
    planned = plan(decisions)
    weights = torch.where(decisions, weights, 0)
    x, k = layers.stem(images), 0
    for length in layers.config.layers:
        mean: Tensor | float = 0.0
        for block in layers.blocks[k : k + length]:
            x = block.run(x, decisions[:, k], planned.active(k), dense_from)
            mean = mean + weights[:, k, None, None, None] * x
            k += 1
        some = decisions[:, k - length : k].any(1)
        x = torch.where(some[:, None, None, None], mean, x).to(images.dtype)
    return layers.classifier(x)


def _run_sequential(
    layers: Layers, gates: FoldedSequential, images: Tensor, dense_from: float
) -> tuple[Tensor, Tensor]:
    x, decisions = layers.stem(images), []
    for block, gate in zip(layers.blocks, gates.gates, strict=True):
        keep = threshold(_linear(x, gate)[:, 0])
        x = block.run(x, keep, keep.nonzero()[:, 0], dense_from)
        decisions.append(keep)
    return layers.classifier(x), torch.stack(decisions, 1)


def _run_halting(layers: Layers, gates: FoldedHalting, images: Tensor) -> tuple[Tensor, ...]:
    x, start = layers.stem(images), 0
    # Scores are summed in float32 at least: in 16 bits a sum may never reach its threshold.
    weights = images.new_zeros(
        len(images), len(layers.blocks), dtype=torch.promote_types(images.dtype, torch.float32)
    )
    decisions = torch.zeros_like(weights, dtype=torch.bool)
    for length in layers.config.layers:
        rows = torch.arange(len(images), device=images.device)  # of x: the images that still run
        total, mean, left = weights.new_zeros(len(rows)), 0.0, None
        for k in range(start, start + length):
            block, head = layers.blocks[k], gates.heads[k]
            x = block.kept(x, block.shortcut(x))
            decisions[rows, k] = True
            if head is None:
                score, halts = 1 - total, torch.ones_like(rows, dtype=torch.bool)
            else:
                score = _linear(x, head)[:, 0].to(total.dtype).sigmoid()
                halts = total + score >= 1 - gates.epsilon
            weight = torch.where(halts, 1 - total, score)
            weights[rows, k] = weight
            total = total + score
            if not gates.hard:
                mean = mean + weight[:, None, None, None] * x
            out = x if gates.hard else mean
            going, staying = halts.nonzero()[:, 0], halts.logical_not().nonzero()[:, 0]
            if len(staying) == 0 and left is None:
                left = out.to(x.dtype)
                break
            if len(going):
                left = x.new_empty(len(images), *x.shape[1:]) if left is None else left
                left[rows[going]] = out[going].to(x.dtype)
                x, rows, total = take_images(x, staying), rows[staying], total[staying]
                mean = mean if gates.hard else take_images(mean, staying)
            if len(staying) == 0:
                break
        x = left.contiguous(memory_format=torch.channels_last)
        start += length
    outputs = layers.classifier(x), decisions
    return outputs if gates.hard else (*outputs, weights)


def _run_exits(
    layers: Layers, exits: FoldedExits, images: Tensor, left: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``left``: (B,) exits at which images leave, counted from 0; None: by the rules."""
    x, done = layers.stem(images), 0
    rows = torch.arange(len(images), device=images.device)
    logits = images.new_empty(len(images), layers.config.num_classes)
    left_at = torch.full_like(rows, len(exits.after))
    for exit, (after, head) in enumerate(zip(exits.after, exits.heads, strict=True)):
        for block in islice(layers.blocks, done, after):
            x = block.kept(x, block.shortcut(x))
        done = after
        if left is None:
            found = _linear(x, head)
            precise = found.to(torch.promote_types(found.dtype, torch.float32))
            leaves = leaves_by(precise, exits.rules[exit])
        else:
            leaves = left[rows] == exit
        going = leaves.nonzero()[:, 0]
        if len(going) == 0:
            continue
        logits[rows[going]] = found[going] if left is None else _linear(x[going], head)
        left_at[rows[going]] = exit
        staying = leaves.logical_not().nonzero()[:, 0]
        x, rows = take_images(x, staying), rows[staying]
        if len(rows) == 0:
            break
    else:
        for block in islice(layers.blocks, done, None):
            x = block.kept(x, block.shortcut(x))
        logits[rows] = layers.classifier(x)
    return logits, decisions_at(left_at, (*exits.after, len(layers.blocks)))


def _linear(x: Tensor, linear: FoldedLinear) -> Tensor:
    """(R, C, H, W) -> (R, outputs)."""
    return F.linear(pooled(x), linear.weight, linear.bias)
