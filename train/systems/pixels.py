"""What the stages lccl and sact share: backbones whose gates decide for every pixel.

The references compute everything, in training and on test images; FLOPs are counted from masks, and
no time is claimed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.networks.checkpoints import load_any
from blockdrop_fast.networks.gated import PixelGates, PixelOutput
from train import distributed
from train.distillation import load_teacher, taught_loss
from train.images import EVALUATION_BATCH, plain_batches, prepare
from train.loop import Run
from train.optimization import autocast, engine_dtype, one_cycle
from train.run_files import check_out
from train.systems.config import Pixels

# (images, complete network's FLOPs) -> output, and its cost, a scalar.
Costed = Callable[[Tensor, float], tuple[PixelOutput, Tensor]]


def load_model(config: Pixels, kind: type[PixelGates], **options: float) -> bdf.BlockDrop:
    """A backbone with new gates, or a checkpoint of the stage.

    Args:
        config: of the stage.
        kind: of the gates.
        options: of new ones.

    Raises:
        ValueError: no checkpoint, or of something else; a negative ``free_epochs``.
    """
    check_out(config)
    if config.model is None:
        raise ValueError("model: a backbone checkpoint, or one of this stage, is required")
    if config.free_epochs < 0:
        raise ValueError(f"free_epochs: expected 0 or more, got {config.free_epochs}")
    model = load_any(config.model)
    if isinstance(model, bdf.ResNet):
        torch.manual_seed(config.seed)
        return bdf.BlockDrop(model, kind(model.config, **options))
    if not (isinstance(model, bdf.BlockDrop) and isinstance(model.policy, kind)):
        raise ValueError(
            f"model: expected a backbone, or a checkpoint of this stage, {config.model} is neither"
        )
    return model.requires_grad_(True)


def train_pixels(config: Pixels, model: bdf.BlockDrop, weight: float, costed: Costed) -> None:
    """Train backbone and gates by cross entropy and the weighted cost of what is computed.

    Args:
        config: of the stage.
        model: see ``load_model``.
        weight: of the cost, after ``free_epochs``.
        costed: the differentiable run.

    Raises:
        ValueError: a negative weight.
    """
    device, dataset = prepare(config)
    model.to(device, memory_format=torch.channels_last)
    optimizer, scheduler = one_cycle(config, model.backbone.parameters(), len(dataset.train))
    # Gates start where their gradients are small: steps must not be.
    gates = torch.optim.Adam(model.policy.parameters(), lr=config.policy_lr, betas=(0.9, 0.99))
    gates_scheduler = torch.optim.lr_scheduler.OneCycleLR(
        gates, config.policy_lr, total_steps=scheduler.total_steps, cycle_momentum=False
    )
    run = Run(config, model, [optimizer, gates], [scheduler, gates_scheduler])
    dtype = engine_dtype(config, device)
    teacher = load_teacher(config.teacher, model, device, dtype)
    for epoch in run.epochs():
        free = epoch <= config.free_epochs

        def step(images: Tensor, labels: Tensor, free: bool = free):
            complete = float(bdf.flops(model.backbone, image_size=tuple(images.shape[2:])))
            with autocast(config, device):
                output, cost = costed(images, complete)
            target = None if teacher is None else teacher(images.to(dtype)).logits.float()
            logits = output.logits.float()
            classification = taught_loss(logits, labels, target, config)
            return classification + (0.0 if free else weight) * cost, {
                "accuracy": (logits.argmax(1) == labels).float().mean(),
                "cross_entropy": classification,
                "cost": cost,
                "flops": output.flops.mean(),
            }

        model.train()
        model.policy.requires_grad_(not free)
        means = run.descend(dataset.train, epoch, step)
        metrics = {f"train_{name}": value for name, value in means.items().items()}
        report = None
        if run.due(epoch, config.evaluate_every):
            batches = plain_batches(model, dataset.test, EVALUATION_BATCH, config.workers)
            found, report = evaluate_pixels(model.eval(), batches)
            metrics |= {f"test_{name}": value for name, value in found.items()}
        run.finish_epoch(epoch, metrics, report)


@torch.no_grad()
def evaluate_pixels(model: bdf.BlockDrop, batches) -> tuple[dict[str, float], dict]:
    """Accuracy of the reference, and what its masks leave to compute.

    Args:
        model: with ``PixelGates``, in eval mode.
        batches: of images (B, 3, H, W) and labels (B,).

    Returns:
        Means over images: accuracy, FLOPs by the masks with their standard deviation, blocks of
        which some pixel is computed (``sparsity``) and FLOPs at those decisions, which an engine
        saves; the number of blocks that no image needs; and, JSON-ready, each block's density.
    """
    right, flops, decisions, densities, size = [], [], [], [], None
    for images, labels in batches:
        output = distributed.share(model, images)
        right.append((output.logits.argmax(1) == labels).double().cpu())
        flops.append(output.flops.cpu())
        decisions.append(output.decisions.cpu())
        densities.append(output.densities.cpu())
        size = tuple(images.shape[2:])
    counted, kept = torch.cat(flops), torch.cat(decisions)
    metrics = {
        "accuracy": float(torch.cat(right).mean()),
        "flops": float(counted.mean()),
        "flops_std": float(counted.std(correction=0)),
        "sparsity": float(kept.sum(1).double().mean()),
        "decisions_flops": float(bdf.flops(model.backbone, kept, image_size=size).mean()),
        "removed_blocks": int((~kept).all(0).sum()),
    }
    return metrics, {"test_densities": torch.cat(densities).double().mean(0).tolist()}
