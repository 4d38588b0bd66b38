"""Learning from a teacher's logits."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import blockdrop_fast as bdf
from train.config import Joint, Pretrain
from train.images import normalization_of
from train.systems.config import Exits, Retraining


def distillation_loss(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Mean over images of T^2 KL(softmax(target / T) || softmax(logits / T)) (Hinton et al. 2015).

    Args:
        logits: (B, C), with gradient.
        target: (B, C), the teacher's.
        temperature: T.
    """
    return temperature**2 * F.kl_div(
        F.log_softmax(logits / temperature, 1),
        F.log_softmax(target / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )


def taught_loss(
    logits: Tensor,
    labels: Tensor,
    target: Tensor | None,
    config: Pretrain | Joint | Exits | Retraining,
) -> Tensor:
    """Cross entropy; with a target, the mean of it and of distillation that ``--distill`` weighs.

    Args:
        logits: (B, C), with gradient.
        labels: (B,) int64.
        target: (B, C), the teacher's logits; None without one.
    """
    loss = F.cross_entropy(logits, labels)
    if target is None:
        return loss
    distilled = distillation_loss(logits, target, config.temperature)
    return (1 - config.distill) * loss + config.distill * distilled


def load_teacher(
    path: Path | None, model: nn.Module, device: torch.device, dtype: torch.dtype
) -> bdf.Engine | None:
    """An engine of the backbone in a checkpoint, all blocks kept; none without a path.

    Args:
        model: what it shall teach, a backbone or BlockDrop model.

    Raises:
        ValueError: it has other classes or takes images normalised otherwise.
    """
    if path is None:
        return None
    teacher = bdf.load_backbone(path)
    backbone = model.backbone if isinstance(model, bdf.BlockDrop) else model
    classes = teacher.config.num_classes, backbone.config.num_classes
    if classes[0] != classes[1]:
        raise ValueError(f"teacher: {path} has {classes[0]} classes, the model has {classes[1]}")
    if normalization_of(teacher) != normalization_of(model):
        raise ValueError(
            f"teacher: {path} expects images normalised by {normalization_of(teacher)}, "
            f"the model by {normalization_of(model)}"
        )
    return bdf.compile(teacher.to(device), dtype=dtype)
