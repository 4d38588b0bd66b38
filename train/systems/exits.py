"""Adaptive Neural Networks, early exits: classifiers on the way, and rules by which images leave.

    python -m train exits --preset quick --data DIR --backbone model.safetensors --budget 7

Classifiers behind chosen blocks and the network's own learn together, their cross entropies weighed
alike (the protocol of MSDNet). Rules are then fitted on held-out images, which neither this stage
nor ``pretrain --held-out`` trains on: see ``train/systems/rules.py``. metrics.json has the sweeps.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.data.image_sets import ImageFolder, ImageSet
from train import distributed
from train.distillation import load_teacher, taught_loss
from train.images import EVALUATION_BATCH, plain_batches, prepare, split
from train.loop import Run
from train.optimization import autocast, engine_dtype, one_cycle
from train.run_files import check_out
from train.systems.config import Exits
from train.systems.rules import Stops, budget_of, fit, summary


def exits(config: Exits) -> None:
    """Train the classifiers of exits, and their backbone, by SGD under a one-cycle schedule.

    Raises:
        ValueError: options that contradict each other, or do not fit the backbone.
    """
    check_out(config)
    model = _make_model(config)
    blocks = model.backbone.num_blocks
    budget = budget_of(config.budget, [*model.policy.exits, blocks], blocks)
    device, dataset = prepare(config)
    model.to(device, memory_format=torch.channels_last)
    held_out, train = split(dataset.train, config.held_out, config.seed)
    groups = [{"params": model.policy.parameters(), "lr": config.head_lr}]
    if config.frozen:
        model.backbone.requires_grad_(False)
    else:
        groups.append({"params": model.backbone.parameters(), "lr": config.lr})
    optimizer, scheduler = one_cycle(config, groups, len(train))
    run = Run(config, model, [optimizer], [scheduler], all_used=True)
    teacher = load_teacher(config.teacher, model, device, engine_dtype(config, device))
    names = [*map(str, model.policy.exits), "end"]

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(config, device):
            logits = model.policy.logits_of(model.backbone, images).float()
        target = None if teacher is None else teacher(images.to(teacher.dtype)).logits.float()
        losses = [taught_loss(one, labels, target, config) for one in logits]
        right = (logits.argmax(-1) == labels).float().mean(1)
        seen = {f"accuracy_{name}": one for name, one in zip(names, right, strict=True)}
        return torch.stack(losses).mean(), seen

    for epoch in run.epochs():
        model.backbone.train(not config.frozen)
        means = run.descend(train, epoch, step)
        metrics = {f"train_{name}": value for name, value in means.items().items()}
        model.eval()
        report = None
        if epoch == config.epochs:
            found = [stops_of(model, images, config.workers) for images in (held_out, dataset.test)]
            rules, report = fit(*found, budget, config.rules)
            model.policy.set_rules(rules.to(device))
            metrics |= summary(report)
        run.finish_epoch(epoch, metrics, report)


@torch.no_grad()
def stops_of(model: bdf.BlockDrop, image_set: ImageSet | ImageFolder, workers: int) -> Stops:
    """What all exits, and the network's end, say of a split."""
    logits, labels, size = [], [], None
    run = partial(model.policy.logits_of, model.backbone)
    for images, batch_labels in plain_batches(model, image_set, EVALUATION_BATCH, workers):
        logits.append(distributed.share(run, images, dim=1).float().cpu())
        labels.append(batch_labels.cpu())
        size = tuple(images.shape[2:])
    ends = model.policy.decisions_at(torch.arange(len(model.policy.exits) + 1))
    flops = bdf.flops(model, ends, image_size=size)
    return Stops(torch.cat(logits, 1), torch.cat(labels), ends.sum(1).double(), flops)


def _make_model(config: Exits) -> bdf.BlockDrop:
    if config.backbone is None:
        raise ValueError("backbone: a backbone checkpoint is required")
    backbone = bdf.load_backbone(config.backbone)
    blocks = backbone.num_blocks
    after = config.after
    if after is None:
        after = sorted({round(blocks * fifth / 5) for fifth in range(1, 5)} & set(range(1, blocks)))
    torch.manual_seed(config.seed)
    return bdf.BlockDrop(backbone, bdf.Exits(backbone.config, after))
