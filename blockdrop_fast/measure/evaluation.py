"""What the BlockDrop authors' test prints, and where in the network the kept blocks are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from blockdrop_fast.engine import Engine
from blockdrop_fast.networks.blockdrop import BlockDrop
from blockdrop_fast.networks.flops import flops
from blockdrop_fast.networks.resnet import ResNet


@dataclass(frozen=True)
class Evaluation:
    """Measurements over a data set; counts and FLOPs are per image.

    Attributes:
        images: number of images evaluated.
        accuracy: share of right predictions, 0…1.
        saving: mean of 1 - (block usage / K)^2 over all images, wrong predictions counting 0.
        block_usage, block_usage_std: kept blocks an image, mean and standard deviation.
        num_blocks: K.
        flops, flops_std: in the paper's convention, policy network included where one ran.
        unique_policies: number of different decisions met.
        segment_usage: mean kept blocks of each segment.
        segment_blocks: blocks of each segment.
        keep_rates: share of images that keep each block (K values).
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
        return "\n".join(
            [
                f"images           {self.images}",
                f"accuracy         {100 * self.accuracy:.2f} %",
                f"block usage      {self.block_usage:.2f} ± {self.block_usage_std:.2f} "
                f"of {self.num_blocks}",
                f"FLOPs/image      {self.flops:.3e} ± {self.flops_std:.2e}",
                f"unique policies  {self.unique_policies}",
                f"segment usage    {segments}",
            ]
        )


def evaluate(
    engine: Engine,
    batches: Iterable[tuple[Tensor, Tensor]],
    decide: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Evaluate an engine at its policy's decisions, or at given ones.

    Args:
        engine: compiled from a BlockDrop model, or from a backbone (which keeps all blocks).
        batches: of (images (B, 3, H, W) normalised, labels (B,) int64).
        decide: images -> (B, K) decisions, in place of the policy network.

    Raises:
        ValueError: no images, or labels outside of the network's classes.
    """
    all_correct, all_decisions, image_size = [], [], None
    for images, labels in batches:
        if labels.numel() and int(labels.max()) >= engine.config.num_classes:
            raise ValueError(
                f"labels: class {int(labels.max())} met, but the network has "
                f"{engine.config.num_classes} classes"
            )
        images = images.to(engine.device, engine.dtype)
        if decide is None:
            logits, decisions = engine(images)
        else:
            decisions = decide(images)
            logits = engine.run(images, decisions)
        all_correct.append(logits.argmax(1).cpu() == labels.cpu())
        all_decisions.append(decisions.bool().cpu())
        image_size = images.shape[2:]
    if not all_decisions or not sum(map(len, all_decisions)):
        raise ValueError("batches: no images to evaluate")
    model = engine.model if decide is None else engine.backbone
    return _summarise(model, torch.cat(all_decisions), torch.cat(all_correct), tuple(image_size))


def _summarise(
    model: BlockDrop | ResNet, decisions: Tensor, correct: Tensor, image_size: tuple[int, int]
) -> Evaluation:
    """decisions (N, K) bool and correct (N,) bool of N images -> ``Evaluation``."""
    usage = decisions.sum(1).double()
    # As every image has one of few policies, count FLOPs a policy.
    policies, counts = decisions.unique(dim=0, return_counts=True)
    policy_flops = flops(model, policies, image_size=image_size)
    mean_flops = float((policy_flops * counts).sum() / counts.sum())
    variance = float(((policy_flops - mean_flops) ** 2 * counts).sum() / counts.sum())
    keep_rates = decisions.double().mean(0)
    backbone = model.backbone if isinstance(model, BlockDrop) else model
    layers = backbone.config.layers
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
    )
