"""What the BlockDrop authors' test prints, and where in the network the kept blocks are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from blockdrop_fast.decisions import check_values
from blockdrop_fast.engine import Engine
from blockdrop_fast.executors.cascade import CascadeEngine
from blockdrop_fast.measure.routing import (
    at_usage,
    concave_envelope,
    effective_policies,
    margins,
    rank_correlation,
    routing_gain,
    shuffled_decisions,
)
from blockdrop_fast.networks.blockdrop import BlockDrop
from blockdrop_fast.networks.cascade import Cascade
from blockdrop_fast.networks.exits import Exits
from blockdrop_fast.networks.flops import flops
from blockdrop_fast.networks.halting import HaltingPolicy
from blockdrop_fast.networks.resnet import ResNet

ROUTING_BATCH = 128
ROUTING_BYTES = 2**29


@dataclass(frozen=True)
class Evaluation:
    """Measurements over a data set; counts and FLOPs are per image.

    Attributes:
        images: number of images evaluated.
        accuracy: share of right predictions, 0…1.
        saving: mean of 1 - (block usage / K)^2 over all images, wrong predictions counting 0.
        block_usage, block_usage_std: kept blocks an image, mean and standard deviation. Here and
            below, those of a cascade are whole networks, each a segment.
        num_blocks: K.
        flops, flops_std: in the paper's convention, policy network included where one ran.
        unique_policies: number of different decisions met.
        segment_usage: mean kept blocks of each segment.
        segment_blocks: blocks of each segment.
        keep_rates: share of images that keep each block (K values).
        effective_policies: exp(entropy) of the distribution of decisions.
        routing_images: images on which the next three were measured; 0: they were not.
        routing_gain: accuracy minus the mean accuracy with the same decisions shuffled among the
            images, with their weights where there are some; 0 where all have the same. None where
            it was not measured. Of a cascade: shuffled among the images, where they end.
        routing_gain_std: standard deviation of the shuffles' accuracies.
        margin_correlation: Spearman's, of the kept blocks with how far the complete network's
            first logit is ahead of its second. None also where usage is constant.
        static_accuracy: of the static line (``measure.static_line``), interpolated at the mean
            usage. None where no line was given.
        envelope_accuracy: of its upper concave envelope, there.
    """

    images: int
    accuracy: float
    saving: float
    block_usage: float
    block_usage_std: float
    num_blocks: int
    flops: float
    flops_std: float
    unique_policies: int
    segment_usage: tuple[float, ...]
    segment_blocks: tuple[int, ...]
    keep_rates: tuple[float, ...]
    effective_policies: float
    routing_images: int = 0
    routing_gain: float | None = None
    routing_gain_std: float | None = None
    margin_correlation: float | None = None
    static_accuracy: float | None = None
    envelope_accuracy: float | None = None

    def reward(self, penalty: float) -> float:
        """Mean reward (BlockDrop equation 3) under penalty gamma for wrong predictions."""
        return self.saving - (1 - self.accuracy) * penalty

    def to_dict(self) -> dict:
        """JSON-ready values."""
        return asdict(self)

    def format(self) -> str:
        """A few lines to print, in the manner of the authors' test script."""
        segments = ", ".join(
            f"{used:.1f}/{total}"
            for used, total in zip(self.segment_usage, self.segment_blocks, strict=True)
        )
        lines = [
            f"images           {self.images}",
            f"accuracy         {100 * self.accuracy:.2f} %",
            f"block usage      {self.block_usage:.2f} ± {self.block_usage_std:.2f} "
            f"of {self.num_blocks}",
            f"FLOPs/image      {self.flops:.3e} ± {self.flops_std:.2e}",
            f"unique policies  {self.unique_policies}, effective {self.effective_policies:.1f}",
            f"segment usage    {segments}",
        ] + self.format_routing()
        return "\n".join(lines)

    def format_routing(self) -> list[str]:
        """The lines that say whether it pays that decisions depend on the image."""
        lines = []
        if self.routing_gain is not None:
            lines.append(
                f"routing gain     {100 * self.routing_gain:.2f} ± "
                f"{100 * self.routing_gain_std:.2f} points over shuffled decisions"
            )
        if self.margin_correlation is not None:
            lines.append(
                f"usage, margin    {self.margin_correlation:.2f} (Spearman; complete network's)"
            )
        if self.static_accuracy is not None:
            lines.append(
                f"static sets      {100 * self.static_accuracy:.2f} % at this usage, "
                f"concave envelope {100 * self.envelope_accuracy:.2f} %"
            )
        return lines


def format_curve(evaluations: Sequence[Evaluation]) -> str:
    """One table of evaluations of a model at several budgets, a line each, to print."""
    lines = ["blocks          FLOPs/image  accuracy  policies  routing gain  static line"]
    for one in evaluations:
        gain, static = (
            "" if value is None else f"{100 * value:.2f}"
            for value in (one.routing_gain, one.static_accuracy)
        )
        lines.append(
            f"{one.block_usage:5.2f} ± {one.block_usage_std:4.2f}  {one.flops:12.3e}  "
            f"{100 * one.accuracy:8.2f}  {one.effective_policies:8.1f}  {gain:>12}  {static:>11}"
        )
    return "\n".join(lines)


def evaluate(
    engine: Engine | CascadeEngine,
    batches: Iterable[tuple[Tensor, Tensor]],
    decide: Callable[[Tensor], Tensor] | None = None,
    *,
    budget: float | None = None,
    shuffles: int = 5,
    routing_images: int | None = None,
    static_accuracies: Tensor | None = None,
) -> Evaluation:
    """Evaluate an engine at its policy's decisions, or at given ones.

    Args:
        engine: compiled from a BlockDrop model, from a backbone (which keeps all blocks), or from a
            cascade.
        batches: of (images (B, 3, H, W) normalised, labels (B,) int64).
        decide: images -> (B, K) decisions, in place of the policy network, whose FLOPs then do
            not count. Not of exits and cascades, which are no blocks to keep or drop.
        budget: mean kept blocks, of a policy network that chooses from a menu; None: its own.
        shuffles: permutations of the decisions, for the routing gain; each costs what the
            evaluation costs. 0: the gain and the correlation are not measured.
        routing_images: images, drawn at random, on which they are; default: all, or as many as
            fit into 512 MiB.
        static_accuracies: (K+1,), of the static line on these images.

    Raises:
        TypeError: another engine, or images or labels that are no tensors of values.
        ValueError: no images, another number of labels, or such outside of the network's classes, a
            budget that the policy network cannot meet or beside ``decide``, ``decide`` where blocks
            alone do not say what is computed, ``shuffles`` below 0, or another number of static
            accuracies.
    """
    return evaluate_each(
        engine,
        batches,
        decide,
        budget=budget,
        shuffles=shuffles,
        routing_images=routing_images,
        static_accuracies=static_accuracies,
    )[0]


def evaluate_each(
    engine: Engine | CascadeEngine,
    batches: Iterable[tuple[Tensor, Tensor]],
    decide: Callable[[Tensor], Tensor] | None = None,
    *,
    budget: float | None = None,
    shuffles: int = 5,
    routing_images: int | None = None,
    static_accuracies: Tensor | None = None,
) -> tuple[Evaluation, Tensor, Tensor]:
    """``evaluate``, and of each image its decisions, (N, K) bool, and whether right, (N,) bool."""
    cascade = isinstance(engine, CascadeEngine)
    if not cascade and not isinstance(engine, Engine):
        raise TypeError(f"engine: expected one of compile, got {type(engine).__name__}")
    if decide is not None and (cascade or _has_exits(engine)):
        what = "a cascade" if cascade else "a model with exits"
        raise ValueError(f"decide: expected none, {what} says itself where an image leaves")
    if decide is not None and budget is not None:
        raise ValueError(f"budget: expected none where decisions are given, got {budget}")
    if shuffles < 0:
        raise ValueError(f"shuffles: expected 0 or more, got {shuffles}")
    if static_accuracies is not None and len(static_accuracies) != engine.config.num_blocks + 1:
        raise ValueError(
            f"static_accuracies: expected {engine.config.num_blocks + 1} values, "
            f"got {len(static_accuracies)}"
        )
    all_correct, all_decisions, image_size = [], [], None
    varies = isinstance(engine.model, (BlockDrop, Cascade)) or decide is not None
    weights: Tensor | None = None
    drawn = _Drawn(routing_images if shuffles and varies else 0)
    for images, labels in batches:
        _check_batch(images, labels, engine.config.num_classes)
        images = images.to(engine.device, engine.dtype)
        if decide is None:
            output = engine(images, budget)
            logits, decisions = output.logits, output.decisions
            weights = getattr(output, "weights", None)
        else:
            decisions = decide(images)
            logits = engine.run(images, decisions)
        correct, decisions = logits.argmax(1).cpu() == labels.cpu(), decisions.bool().cpu()
        drawn.add(
            images, labels.cpu(), correct, decisions, *([] if weights is None else [weights.cpu()])
        )
        all_correct.append(correct)
        all_decisions.append(decisions)
        image_size = images.shape[2:]
    if not all_decisions or not sum(map(len, all_decisions)):
        raise ValueError("batches: no images to evaluate")
    model = engine.model if decide is None else engine.backbone
    decisions, correct = torch.cat(all_decisions), torch.cat(all_correct)
    evaluation = summarise(model, decisions, correct, tuple(image_size))
    if shuffles and varies:
        evaluation = _with_routing(evaluation, engine, drawn, shuffles)
    if static_accuracies is not None:
        evaluation = replace(
            evaluation,
            static_accuracy=at_usage(static_accuracies, evaluation.block_usage),
            envelope_accuracy=at_usage(concave_envelope(static_accuracies), evaluation.block_usage),
        )
    return evaluation, decisions, correct


def _check_batch(images: Tensor, labels: Tensor, num_classes: int) -> None:
    check_values("images", images)
    check_values("labels", labels)
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels: expected an integer dtype, got {labels.dtype}")
    if images.ndim == 0 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels: expected one of each image, got {tuple(labels.shape)} for images "
            f"{tuple(images.shape)}"
        )
    if labels.numel() and int(labels.max()) >= num_classes:
        raise ValueError(
            f"labels: class {int(labels.max())} met, but the network has {num_classes} classes"
        )


class _Drawn:
    """Images drawn evenly from a stream, with what was found of them (reservoir sampling)."""

    def __init__(self, most: int | None):
        self._most = most
        self._seen = 0
        self._generator = torch.Generator().manual_seed(0)
        self.rows: list[tuple[Tensor, ...]] = []

    def add(self, images: Tensor, *found: Tensor) -> None:
        if self._most is None and len(images):
            self._most = max(1, ROUTING_BYTES // images[0].nbytes)
        for index in range(len(images)):
            self._seen += 1
            place = len(self.rows)
            if place == self._most:
                place = int(torch.randint(self._seen, (), generator=self._generator))
                if place >= self._most:
                    continue
                self.rows[place] = None
            else:
                self.rows.append(None)
            # Copies: a view would hold its whole batch.
            self.rows[place] = (images[index].clone(), *(values[index] for values in found))


def _with_routing(
    evaluation: Evaluation, engine: Engine | CascadeEngine, drawn: _Drawn, shuffles: int
) -> Evaluation:
    """The evaluation and, on the drawn images, the gain and the correlation with the margin."""
    weighted = bool(drawn.rows) and len(drawn.rows[0]) > 4
    if evaluation.unique_policies == 1 and not weighted:
        return replace(
            evaluation, routing_images=evaluation.images, routing_gain=0.0, routing_gain_std=0.0
        )
    if not drawn.rows:
        return evaluation
    images, *found = zip(*drawn.rows, strict=True)
    labels, correct, decisions, *weights = map(torch.stack, found)
    # All of them by the same permutations.
    shuffled = [shuffled_decisions(one, shuffles) for one in (decisions, *weights)]
    outcomes, margin = [], []
    for start in range(0, len(labels), ROUTING_BATCH):
        part = slice(start, start + ROUTING_BATCH)
        batch = torch.stack(images[part])
        batch = batch.contiguous(memory_format=torch.channels_last)
        sets = [one[:, part].to(engine.device) for one in shuffled]
        everything = torch.ones_like(sets[0][0])
        if isinstance(engine, CascadeEngine):
            found = torch.stack([one(batch).logits for one in engine.engines])
            last = torch.cat([sets[0], everything[None]]).sum(-1) - 1
            logits = found[last, torch.arange(len(batch), device=last.device)]
        elif _runs_no_sets(engine):
            logits = [engine.run(batch, *one) for one in zip(*sets, strict=True)]
            logits = torch.stack([*logits, engine.run(batch, everything)])
        else:
            logits = engine.run_sets(batch, torch.cat([sets[0], everything[None]]))
        logits = logits.float().cpu()
        outcomes.append(logits[:-1].argmax(-1) == labels[part])
        margin.append(margins(logits[-1]))
    gain, spread = routing_gain(correct, torch.cat(outcomes, 1))
    return replace(
        evaluation,
        routing_images=len(labels),
        routing_gain=gain,
        routing_gain_std=spread,
        margin_correlation=rank_correlation(decisions.sum(1), torch.cat(margin)),
    )


def _has_exits(engine: Engine) -> bool:
    return isinstance(engine.model, BlockDrop) and isinstance(engine.model.policy, Exits)


def _runs_no_sets(engine: Engine) -> bool:
    """Whether only ``run`` replays the model's decisions."""
    policy = engine.model.policy if isinstance(engine.model, BlockDrop) else None
    return _has_exits(engine) or (isinstance(policy, HaltingPolicy) and not policy.hard)


def summarise(
    model: BlockDrop | ResNet | Cascade,
    decisions: Tensor,
    correct: Tensor,
    image_size: tuple[int, int],
) -> Evaluation:
    """decisions (N, K) bool and correct (N,) bool of N images -> ``Evaluation``."""
    usage = decisions.sum(1).double()
    # As every image has one of few policies, count FLOPs a policy.
    policies, counts = decisions.unique(dim=0, return_counts=True)
    policy_flops = flops(model, policies, image_size=image_size)
    mean_flops = float((policy_flops * counts).sum() / counts.sum())
    variance = float(((policy_flops - mean_flops) ** 2 * counts).sum() / counts.sum())
    keep_rates = decisions.double().mean(0)
    if isinstance(model, Cascade):
        layers = (1,) * len(model.networks)
    else:
        layers = (model.backbone if isinstance(model, BlockDrop) else model).config.layers
    return Evaluation(
        images=len(decisions),
        accuracy=float(correct.double().mean()),
        saving=float((correct * (1 - (usage / decisions.shape[1]) ** 2)).mean()),
        block_usage=float(usage.mean()),
        block_usage_std=float(usage.std(correction=0)),
        num_blocks=decisions.shape[1],
        flops=mean_flops,
        flops_std=variance**0.5,
        unique_policies=len(policies),
        segment_usage=tuple(float(part.sum()) for part in keep_rates.split(layers)),
        segment_blocks=layers,
        keep_rates=tuple(keep_rates.tolist()),
        effective_policies=effective_policies(decisions),
    )
