"""Stage 1: train a backbone on all its blocks, or make it bear dropping.

    python -m train pretrain --data DIR --init resnet32-d509ac18.th --epochs 3 --lr 0.02
    python -m train pretrain --data DIR --init model.safetensors --droppable

The first on ResNet-32, CIFAR-10 (JPEG), two CPU cores (docs/results/cifar10-jpeg.md): from the
published network's 82.56 % to 88.68 %, 11 minutes of training steps.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.data.batches import Batches
from blockdrop_fast.data.image_sets import IMAGENET_NORMALIZATION, Dataset
from blockdrop_fast.measure.static_line import set_accuracies
from blockdrop_fast.networks.architectures import by_name
from train import distributed
from train.batch_statistics import recalibrate
from train.config import Pretrain
from train.distillation import load_teacher, taught_loss
from train.droppable import Chain, random_subnetworks
from train.evaluation import evaluate_test
from train.images import plain_batches, prepare, split
from train.loop import Run, sampling_generator
from train.optimization import autocast, engine_dtype, one_cycle

RECALIBRATION_IMAGES = 2000


def pretrain(config: Pretrain) -> None:
    """Train a backbone with SGD under a one-cycle schedule, on all blocks or random ones.

    Raises:
        ValueError: options that contradict each other.
    """
    _check(config)
    device, dataset = prepare(config)
    if config.held_out:
        dataset = replace(dataset, train=split(dataset.train, config.held_out, config.seed)[1])
    backbone = _make_backbone(config, dataset).to(device, memory_format=torch.channels_last)
    optimizer, scheduler = one_cycle(config, backbone.parameters(), len(dataset.train))
    dtype = engine_dtype(config, device)
    engine = bdf.compile(backbone, dtype=dtype)
    teacher = load_teacher(
        config.teacher or (config.init if config.droppable else None), backbone, device, dtype
    )
    chain = _make_chain(config, backbone, dataset) if config.droppable else None
    skips_blocks = config.droppable or config.drop_rate > 0
    schedulers = [scheduler] + ([chain] if config.droppable else [])
    run = Run(config, backbone, [optimizer], schedulers, skips_blocks, not skips_blocks)

    def step(
        images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        drawn_for = distributed.whole(len(images))
        decisions = _decisions(config, drawn_for, backbone.num_blocks, chain, generator)
        decisions = None if decisions is None else distributed.own(decisions)
        with autocast(config, device):
            logits = backbone(images, decisions, active_only=decisions is not None)
            target = None if teacher is None else teacher(images.to(dtype)).logits.float()
            loss = taught_loss(logits, labels, target, config)
        return loss, {"accuracy": (logits.argmax(1) == labels).float().mean()}

    for epoch in run.epochs():
        generator = sampling_generator(config.seed, epoch, device)
        backbone.train()
        if chain is not None:
            chain.look(distributed.shared(engine), epoch)
        means = run.descend(dataset.train, epoch, partial(step, generator=generator))
        metrics = {f"train_{name}": value for name, value in means.items().items()}
        if chain is not None and epoch == config.epochs:
            _recalibrate(config, backbone, dataset, chain, generator)
        if run.due(epoch, config.evaluate_every):
            engine.refresh()
            evaluation = evaluate_test(engine, dataset, config.workers)
            metrics["test_accuracy"] = evaluation.accuracy
            if chain is not None:
                metrics |= _chain_accuracies(engine, dataset, config.workers, chain)
        run.finish_epoch(epoch, metrics)


def _decisions(
    config: Pretrain, batch: int, num_blocks: int, chain: Chain | None, generator: torch.Generator
) -> Tensor | None:
    if chain is not None:
        full = 0.12 if config.full_share is None else config.full_share
        return random_subnetworks(
            batch, chain.sets, full, config.random_share, config.keep_lowest, generator
        )
    if config.drop_rate:
        full = 0.5 if config.full_share is None else config.full_share
        return stochastic_depth(batch, num_blocks, config.drop_rate, full, generator)
    return None


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


def _check(config: Pretrain) -> None:
    if config.droppable and config.drop_rate:
        raise ValueError("droppable: expected without --drop-rate, which samples blocks itself")
    shares = {
        "full_share": config.full_share or 0.0,
        "random_share": config.random_share,
        "keep_lowest": config.keep_lowest,
        "distill": config.distill,
    }
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: expected 0 to 1, got {share}")
    if config.droppable and shares["full_share"] + config.random_share > 1:
        raise ValueError(
            f"full_share and random_share: expected at most 1 together, got "
            f"{config.full_share} and {config.random_share}"
        )


def _make_chain(config: Pretrain, backbone: bdf.ResNet, dataset: Dataset) -> Chain:
    blocks = backbone.num_blocks
    lowest = round(blocks / 4) if config.chain_lowest is None else config.chain_lowest
    batches = _some_training_batches(config, backbone, dataset, config.chain_images)
    return Chain(list(batches), config.chain_every, lowest, blocks)


def _recalibrate(
    config: Pretrain,
    backbone: bdf.ResNet,
    dataset: Dataset,
    chain: Chain,
    generator: torch.Generator,
) -> None:
    recalibrate(
        backbone,
        _some_training_batches(config, backbone, dataset, RECALIBRATION_IMAGES),
        lambda images: _decisions(config, len(images), backbone.num_blocks, chain, generator),
    )


def _some_training_batches(
    config: Pretrain, backbone: bdf.ResNet, dataset: Dataset, images: int
) -> Batches:
    some = dataset.train.subset(min(images, len(dataset.train)), config.seed)
    return plain_batches(backbone, some, config.batch_size, config.workers)


def _chain_accuracies(
    engine: bdf.Engine, dataset: Dataset, workers: int, chain: Chain
) -> dict[str, float]:
    """Test accuracies of some sets of the chain, under the number of their blocks."""
    chosen = chain.sets[:: -(-len(chain.sets) // 4)]
    batches = plain_batches(engine.backbone, dataset.test, 250, workers)
    accuracies = set_accuracies(distributed.shared(engine), batches, chosen)
    return {
        f"test_accuracy_{int(blocks)}_blocks": float(accuracy)
        for blocks, accuracy in zip(chosen.sum(1), accuracies, strict=True)
    }


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
    backbone = by_name(config.arch)(num_classes)
    backbone.normalization = IMAGENET_NORMALIZATION
    return backbone
