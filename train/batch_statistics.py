"""Statistics of batch norm, counted anew over training images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

import blockdrop_fast as bdf
from blockdrop_fast.data.batches import Batches
from blockdrop_fast.data.image_sets import ImageFolder, ImageSet
from train.config import Policy
from train.images import EVALUATION_BATCH, device_of, plain_batches
from train.reward import bounded


def count_policy(model: bdf.BlockDrop, image_set: ImageSet | ImageFolder, config: Policy) -> None:
    """Replace a policy network's running statistics by those at its present weights.

    Running ones cover the last ten steps or so, in which weights may have become others. They are
    for evaluations and files: what trains is normalised by its batch, so training goes on as it
    would, and a policy in eval mode, which does not train, keeps what it has. All processes count
    the same images.

    Args:
        model: that the run trains.
        image_set: that it trains on; ``statistics_images`` of them are counted, as they are, in
            batches of one size, so that all weigh the same.
    """
    if model.policy.training and (batches := _batches(model, image_set, config)) is not None:
        update_bn(batches, model.policy)


def count_backbone(
    model: bdf.BlockDrop, image_set: ImageSet | ImageFolder, config: Policy, active_only: bool
) -> None:
    """Do so for the backbone, at decisions drawn as in training, of which each block has some.

    The rewards of ``finetune --bn active`` are computed with such statistics: training, too, goes
    on from these.

    Args:
        active_only: see ``recalibrate``.
    """
    if (batches := _batches(model, image_set, config)) is None:
        return
    policy = copy.deepcopy(model.policy).eval()
    generator = torch.Generator(device_of(model)).manual_seed(config.seed)

    def draw(images: Tensor) -> Tensor:
        keep = bounded(policy(images).float(), config.alpha)
        return torch.bernoulli(keep, generator=generator).bool()

    recalibrate(model.backbone, batches, draw, active_only)


def _batches(
    model: bdf.BlockDrop, image_set: ImageSet | ImageFolder, config: Policy
) -> Batches | None:
    images = min(config.statistics_images, len(image_set))
    if images < 1:
        return None
    count = -(-images // EVALUATION_BATCH)
    size = images // count
    some = image_set.subset(count * size, config.seed)
    return plain_batches(model, some, size, config.workers)


@torch.no_grad()
def recalibrate(
    backbone: bdf.ResNet,
    batches: Iterable[tuple[Tensor, Tensor]],
    decisions_of: Callable[[Tensor], Tensor],
    active_only: bool = True,
) -> None:
    """Replace the batch-norm statistics by those at the decisions that will run.

    Each layer's mean and variance become the averages, over the batches in which its block runs,
    of those of the block's active images, or of all. A block that no image keeps has the old ones.

    Args:
        backbone: changed in place; its mode is not.
        batches: of (images (B, 3, H, W) normalised, labels), large ones.
        decisions_of: images -> their (B, K) decisions.
        active_only: statistics cover active images only.
    """
    layers = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    modes = {module: module.training for module in backbone.modules()}
    before = [(layer.momentum, layer.num_batches_tracked.clone()) for layer in layers]
    statistics = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in layers]
    backbone.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # averages over all batches
        layer.train()
    for images, _ in batches:
        backbone(images, decisions_of(images), active_only=active_only)
    for layer, (momentum, tracked), (mean, variance) in zip(
        layers, before, statistics, strict=True
    ):
        if layer.num_batches_tracked == 0:
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)
        layer.momentum = momentum
        layer.num_batches_tracked.copy_(tracked)
    for module, training in modes.items():
        module.training = training
