"""Walks that decide on the way: what an image has become says which blocks it runs next.

Kernels: ``csrc/cpu/walk_gates.cpp``.

All take images and a network as ``blockdrop_fast.ops.walk`` does, and give the same bits whatever
batch an image is in and however many threads run. A block's decision is True where the image kept
it. What is not a number lets no image leave, and drops blocks.

Gates are a float32 matrix with a row for each block: the bias, then 64 weights of the channels,
averaged over pixels, that the gate looks at (zeros beyond their number).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdrop_fast.ops._library import define
from blockdrop_fast.ops.walk import (
    CLASS_MULTIPLE,
    check,
    pack_classifier,
    pack_conv,
    packed_size,
    unpack,
    unpack_layers,
)
from blockdrop_fast.ops.walk_network import (
    NETWORK,
    WIDTHS,
    ReferenceNetwork,
    check_decisions,
    check_length,
    new_logits,
)

GATE_VALUES = 1 + WIDTHS[-1]
RULE_VALUES = 6
LOOK_SIZE = 16
LOOK_CONVS = tuple(pairwise(WIDTHS))  # (C_in, C_out) of a look's convolutions


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


def walk_exits(
    images: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
    after: Sequence[int],
    heads: Tensor,
    rules: Tensor,
    decisions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Ask classifiers on the way how sure they are, and leave where a rule says so.

    A rule is linear in the three largest probabilities, the lead of the first over the second and
    the entropy in nats; an image leaves where the sum is at least 0.

    Args:
        images, weights, layers, num_classes, subsample: as for ``blockdrop_fast.ops.walk``.
        after: the blocks behind which there are classifiers, 1-based, ascending, below K; E.
        heads: (E, 65 * classes) float32, the classifiers, packed by ``pack_heads``.
        rules: (E, 6) float32: weights of the five features, and a bias.
        decisions: (B, K) bool, the blocks before the exit at which each image leaves, or all of
            them; None: the rules decide.

    Returns:
        logits: (B, num_classes), of the exit where an image left, or of the network.
        decisions: (B, K) bool, the blocks up to there.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes that do not fit each other, no such blocks, or decisions that end at no
            exit.
    """
    return torch.ops.blockdrop_fast.walk_exits(
        images, weights, layers, num_classes, subsample, after, heads, rules, decisions
    )


def walk_look(
    images: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
    after: int,
    head: Tensor,
    outputs: int,
    sets: Tensor | None = None,
    costs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Let a small network see what the first blocks give; it decides on all that follow.

    The head sees its input averaged to at most 16x16, and is two convolutions of stride 2, to 32
    and to 64 channels, with a ReLU each, and a linear layer of what they give, averaged over
    pixels. Without ``sets`` a block is kept where its output is at least 0; with them an image gets
    the set for which sigmoid(output) - cost is largest, the first of equal ones.

    Args:
        images, weights, layers, num_classes, subsample: as for ``blockdrop_fast.ops.walk``. Of a
            size that ``look_serves``.
        after: the block behind which the head looks, of the first segment, 1-based. Blocks up to
            it are always kept.
        head: float32 vector, packed by ``pack_look``.
        outputs: of the head: K, or one a set.
        sets: (M, K) bool, with blocks 1 to ``after`` in each.
        costs: (M,) float32.

    Returns:
        logits: (B, num_classes).
        decisions: (B, K) bool.
        look_logits: (B, outputs).

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes that do not fit each other, no such block, or images of another size.
    """
    return torch.ops.blockdrop_fast.walk_look(
        images, weights, layers, num_classes, subsample, after, head, outputs, sets, costs
    )


def look_serves(height: int, width: int) -> bool:
    """Whether ``walk_look`` takes images of a size, of those that ``walk`` does."""
    return all(size <= LOOK_SIZE or size == 2 * LOOK_SIZE for size in (height, width))


def pack_gates(weights: Sequence[Tensor], biases: Sequence[Tensor | float]) -> Tensor:
    """K (C,) weights and K biases -> (K, 65) of the weights' dtype, for the operators."""
    return torch.stack([
        F.pad(torch.cat([weight.new_tensor([bias]), weight]), (0, WIDTHS[-1] - len(weight)))
        for weight, bias in zip(weights, biases, strict=True)
    ])  # fmt: skip


def pack_heads(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """E (num_classes, C) weights and (num_classes,) biases -> (E, 65 * classes), for the operators.

    Classes are rounded up as in ``blockdrop_fast.ops.walk.pack_classifier``.
    """
    return torch.stack([
        pack_classifier(F.pad(weight, (0, WIDTHS[-1] - weight.shape[1])), bias)
        for weight, bias in zip(weights, biases, strict=True)
    ])  # fmt: skip


def pack_look(convs: Sequence[tuple[Tensor, Tensor]], weight: Tensor, bias: Tensor) -> Tensor:
    """(weight, bias) of both convolutions, and of the linear layer -> vector for the operators."""
    return torch.cat([*(pack_conv(*conv) for conv in convs), pack_classifier(weight, bias)])


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
    _check_sequential(images, weights, layers, num_classes, subsample, gates)
    network = _network(images, weights, layers, num_classes, subsample)
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
    _check_halting(images, weights, layers, num_classes, subsample, gates, epsilon)
    network = _network(images, weights, layers, num_classes, subsample)
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
    _check_weighted(images, decisions, shares, weights, layers, num_classes)
    network = _network(images, weights, layers, num_classes, subsample)
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


def walk_exits_reference(
    images: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
    after: Sequence[int],
    heads: Tensor,
    rules: Tensor,
    decisions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What ``walk_exits`` computes, in PyTorch operations; any floating-point dtype."""
    _check_exits(images, weights, layers, num_classes, subsample, after, heads, rules, decisions)
    network = _network(images, weights, layers, num_classes, subsample)
    num_blocks = network.num_blocks
    if decisions is not None:
        _check_prefixes(decisions, [*after, num_blocks])
    x, kept, logits = network.stem(images), [], None
    going = torch.ones(len(images), dtype=torch.bool, device=images.device)
    keep_all = going
    for block in range(num_blocks):
        if block in after:
            exit = list(after).index(block)
            head = heads[exit].view(GATE_VALUES, -1)[: 1 + x.shape[1], :num_classes]
            found = network.pooled(x) @ head[1:] + head[0]
            logits = found if logits is None else torch.where(going[:, None], found, logits)
            if decisions is None:
                going = going & ~_leaves(found, rules[exit])
            else:
                going = decisions[:, block]
        x = network.run_block(block, x, keep_all)
        kept.append(going)
    found = network.classify(x)
    logits = found if logits is None else torch.where(going[:, None], found, logits)
    return logits, torch.stack(kept, 1)


def walk_look_reference(
    images: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    subsample: bool,
    after: int,
    head: Tensor,
    outputs: int,
    sets: Tensor | None = None,
    costs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``walk_look`` computes, in PyTorch operations; any floating-point dtype."""
    _check_look(images, weights, layers, num_classes, subsample, after, head, outputs, sets, costs)
    if sets is not None and not sets[:, :after].all():
        raise ValueError(f"sets: expected blocks 1 to {after} in each, which run before")
    network = _network(images, weights, layers, num_classes, subsample)
    x = network.stem(images)
    always = torch.ones(len(images), dtype=torch.bool, device=images.device)
    for block in range(after):
        x = network.run_block(block, x, always)
    *convs, classifier = unpack_layers(head, LOOK_CONVS, outputs)
    seen = F.adaptive_avg_pool2d(x, [min(size, LOOK_SIZE) for size in x.shape[2:]])
    for conv in convs:
        seen = F.relu(F.conv2d(seen.to(network.exact), *conv, stride=2, padding=1)).to(x.dtype)
    look_logits = F.linear(network.pooled(seen), *classifier)
    if sets is None:
        decisions = (look_logits >= 0).index_fill(1, torch.arange(after, device=x.device), True)
    else:
        decisions = sets[(look_logits.sigmoid() - costs).argmax(1)]
    for block in range(after, network.num_blocks):
        x = network.run_block(block, x, decisions[:, block])
    return network.classify(x), decisions, look_logits


def _leaves(logits: Tensor, rule: Tensor) -> Tensor:
    """(B, num_classes) logits, (6,) rule -> (B,) bool."""
    probabilities = logits.softmax(1)
    top = probabilities.sort(1, descending=True).values[:, :3]
    first, second, third = F.pad(top, (0, 3 - top.shape[1])).unbind(1)
    entropy = torch.special.entr(probabilities).sum(1)
    features = torch.stack([first, second, third, first - second, entropy], 1)
    return features @ rule[:-1] + rule[-1] >= 0


def _gate_logit(gate: Tensor, pooled: Tensor) -> Tensor:
    """(65,) gate, (B, C) -> (B,)."""
    return pooled @ gate[1 : 1 + pooled.shape[1]] + gate[0]


def _where(images: Tensor, one: Tensor, other: Tensor | float) -> Tensor:
    """(B,) bool, activations (B, C, H, W) -> those of one or the other."""
    return torch.where(images[:, None, None, None], one, other)


def _network(
    images: Tensor, weights: Tensor, layers: Sequence[int], num_classes: int, subsample: bool
) -> ReferenceNetwork:
    parameters = list(unpack(weights, layers, num_classes, subsample))
    return ReferenceNetwork(parameters, layers, subsample, images.dtype)


# ---------------------------------------------------------------- checks


def _check_sequential(images: Tensor, weights: Tensor, layers, num_classes, _, gates: Tensor):
    check(images, weights, layers, num_classes)
    _check_matrix("gates", gates, weights.dtype, sum(layers), GATE_VALUES)


def _check_halting(images: Tensor, weights, layers, num_classes, _, gates, epsilon: float, *__):
    _check_sequential(images, weights, layers, num_classes, _, gates)
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon: expected between 0 and 1, got {epsilon}")


def _check_weighted(
    images: Tensor, decisions: Tensor, shares: Tensor, weights: Tensor, layers, num_classes, *_
):
    check(images, weights, layers, num_classes)
    _check_decisions(decisions, images, sum(layers))
    _check_matrix("shares", shares, weights.dtype, images.shape[0], sum(layers))


def _check_exits(
    images: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    _subsample: bool,
    after: Sequence[int],
    heads: Tensor,
    rules: Tensor,
    decisions: Tensor | None = None,
) -> None:
    check(images, weights, layers, num_classes)
    num_blocks = sum(layers)
    ends = [*after, num_blocks]
    if ends != sorted({*ends}) or ends[0] < 1:
        raise ValueError(
            f"after: expected ascending blocks out of 1 to {num_blocks - 1}, got {list(after)}"
        )
    padded_classes = num_classes + -num_classes % CLASS_MULTIPLE
    _check_matrix("heads", heads, weights.dtype, len(after), GATE_VALUES * padded_classes)
    _check_matrix("rules", rules, weights.dtype, len(after), RULE_VALUES)
    if decisions is not None:
        _check_decisions(decisions, images, num_blocks)


def _check_look(
    images: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    num_classes: int,
    _subsample: bool,
    after: int,
    head: Tensor,
    outputs: int,
    sets: Tensor | None = None,
    costs: Tensor | None = None,
) -> None:
    check(images, weights, layers, num_classes)
    num_blocks, dtype = sum(layers), weights.dtype
    if sets is not None and sets.ndim != 2:
        raise ValueError(f"sets: expected shape (M, {num_blocks}), got {tuple(sets.shape)}")
    if outputs != (num_blocks if sets is None else sets.shape[0]) or outputs < 1:
        raise ValueError(
            f"outputs: expected one of each set, or of each of {num_blocks} blocks, got {outputs}"
        )
    if not 1 <= after <= layers[0]:
        raise ValueError(
            f"after: expected a block of the first segment, 1 to {layers[0]}, got {after}"
        )
    height, width = images.shape[2:]
    if not look_serves(height, width):
        raise ValueError(
            f"images: expected height and width up to 16, or 32, for the head, got {height}x{width}"
        )
    if head.dtype != dtype:
        raise TypeError(f"head: expected dtype {dtype}, got {head.dtype}")
    check_length("head", head, packed_size(LOOK_CONVS, outputs), "packed values")
    if sets is None:
        return
    _check_matrix("sets", sets, torch.bool, outputs, num_blocks)
    if costs is None or costs.shape != (outputs,):
        raise ValueError(f"costs: expected one of each of {outputs} sets")
    if costs.dtype != dtype:
        raise TypeError(f"costs: expected dtype {dtype}, got {costs.dtype}")


def _check_matrix(name: str, matrix: Tensor, dtype: torch.dtype, rows: int, columns: int) -> None:
    if matrix.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {matrix.dtype}")
    if matrix.shape != (rows, columns):
        raise ValueError(f"{name}: expected shape ({rows}, {columns}), got {tuple(matrix.shape)}")


def _check_decisions(decisions: Tensor, images: Tensor, num_blocks: int) -> None:
    if decisions.ndim != 2:
        raise ValueError(f"decisions: expected shape (B, K), got {tuple(decisions.shape)}")
    check_decisions(decisions, images.shape[0], num_blocks)


def _check_prefixes(decisions: Tensor, ends: Sequence[int]) -> None:
    kept = decisions.sum(1)
    prefixes = torch.arange(decisions.shape[1], device=kept.device) < kept[:, None]
    if not torch.equal(decisions, prefixes) or not set(kept.tolist()) <= set(ends):
        raise ValueError(
            f"decisions: expected the first blocks of each image, up to one of after {ends[:-1]} "
            f"or all {ends[-1]}"
        )


# ---------------------------------------------------------------- schemas


def _fake(images: Tensor, _weights, layers, num_classes: int, *_) -> tuple[Tensor, Tensor]:
    decisions = images.new_empty((images.shape[0], sum(layers)), dtype=torch.bool)
    return new_logits(images, (images.shape[0], num_classes)), decisions


def _halting_fake(images: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    logits, decisions = _fake(images, *arguments)
    return logits, decisions, new_logits(images, decisions.shape)


def _look_fake(
    images: Tensor, weights, layers, num_classes: int, subsample, after, head, outputs: int, *_
) -> tuple[Tensor, Tensor, Tensor]:
    logits, decisions = _fake(images, weights, layers, num_classes)
    return logits, decisions, new_logits(images, (images.shape[0], outputs))


def _weighted_fake(images: Tensor, _decisions, _shares, *network) -> Tensor:
    return _fake(images, *network)[0]


define(
    f"walk_sequential(Tensor images, {NETWORK}, Tensor gates) -> (Tensor logits, Tensor decisions)",
    walk_sequential_reference,
    _fake,
    _check_sequential,
)
define(
    f"walk_halting(Tensor images, {NETWORK}, Tensor gates, float epsilon, bool hard)"
    " -> (Tensor logits, Tensor decisions, Tensor shares)",
    walk_halting_reference,
    _halting_fake,
    _check_halting,
)
define(
    f"walk_weighted(Tensor images, Tensor decisions, Tensor shares, {NETWORK}) -> Tensor",
    walk_weighted_reference,
    _weighted_fake,
    _check_weighted,
)
define(
    f"walk_exits(Tensor images, {NETWORK}, int[] after, Tensor heads, Tensor rules, "
    "Tensor? decisions=None) -> (Tensor logits, Tensor decisions)",
    walk_exits_reference,
    _fake,
    _check_exits,
)
define(
    f"walk_look(Tensor images, {NETWORK}, int after, Tensor head, int outputs, Tensor? sets=None, "
    "Tensor? costs=None) -> (Tensor logits, Tensor decisions, Tensor look_logits)",
    walk_look_reference,
    _look_fake,
    _check_look,
)
