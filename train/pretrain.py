"""Stage 1: train a backbone on all its blocks."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.data.image_sets import IMAGENET_NORMALIZATION, Dataset
from train.config import Pretrain
from train.loop import (
    Means,
    Run,
    autocast,
    engine_dtype,
    evaluate_test,
    prepare,
    sampling_generator,
)

_IMAGENET_ARCHITECTURES = {
    "resnet50": bdf.resnet50,
    "resnet101": bdf.resnet101,
    "resnet152": bdf.resnet152,
}


def pretrain(config: Pretrain) -> None:
    """Train a backbone with SGD under a one-cycle schedule, optionally with stochastic depth."""
    device, dataset = prepare(config)
    backbone = _make_backbone(config, dataset).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        backbone.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=True,
    )
    steps = max(1, len(dataset.train) // config.batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=config.epochs * steps, cycle_momentum=False
    )
    run = Run(config, backbone, [optimizer], [scheduler])
    engine = bdf.compile(backbone, dtype=engine_dtype(config, device))
    for epoch in run.epochs():
        means = Means()
        generator = sampling_generator(config.seed, epoch, device)
        backbone.train()
        for images, labels in run.batches(dataset.train, epoch, config.batch_size):
            decisions = None
            if config.drop_rate:
                decisions = stochastic_depth(
                    len(images), backbone.num_blocks, config.drop_rate, config.full_share, generator
                )
            with autocast(config, device):
                logits = backbone(images, decisions, active_only=decisions is not None)
                loss = F.cross_entropy(logits, labels)
            run.check_finite(loss, epoch=epoch, lr=scheduler.get_last_lr()[0])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            means.add(len(images), loss=loss, accuracy=(logits.argmax(1) == labels).float().mean())
            if run.step % 20 == 0:
                run.show(**means.items())
        metrics = {f"train_{name}": value for name, value in means.items().items()}
        if run.due(epoch, config.evaluate_every):
            engine.refresh()
            evaluation = evaluate_test(engine, dataset, config.workers)
            metrics["test_accuracy"] = evaluation.accuracy
        run.finish_epoch(epoch, metrics)


def stochastic_depth(
    batch: int, num_blocks: int, drop_rate: float, full_share: float, generator: torch.Generator
) -> Tensor:
    """Random decisions for each image; block k of K is dropped with probability drop_rate k / K.

    Args:
        full_share: this share of the images, the first ones of the batch, keeps all blocks.

    Returns:
        (batch, num_blocks) bool.
    """
    depth = torch.arange(1, num_blocks + 1, device=generator.device) / num_blocks
    keep = (1 - drop_rate * depth).expand(batch, -1)
    decisions = torch.bernoulli(keep, generator=generator).bool()
    decisions[: round(full_share * batch)] = True
    return decisions


def _make_backbone(config: Pretrain, dataset: Dataset) -> bdf.ResNet:
    num_classes = len(dataset.classes)
    if config.init is not None:
        backbone = bdf.load_backbone(config.init)
        if backbone.config.num_classes != num_classes:
            raise ValueError(
                f"init: {config.init} has {backbone.config.num_classes} classes, the data set "
                f"{dataset.name} has {num_classes}"
            )
        return backbone
    torch.manual_seed(config.seed)
    if config.arch in _IMAGENET_ARCHITECTURES:
        backbone = _IMAGENET_ARCHITECTURES[config.arch](num_classes)
    elif match := re.fullmatch(r"resnet(\d+)", config.arch):
        backbone = bdf.resnet_cifar(int(match[1]), num_classes)
    else:
        raise ValueError(f"arch: expected resnet<depth>, got {config.arch!r}")
    backbone.normalization = IMAGENET_NORMALIZATION
    return backbone
