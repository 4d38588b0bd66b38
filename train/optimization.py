"""Optimizers, schedules and precision, by a stage's options."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from train.config import Common


def sgd(config: Common, parameters: Iterable[nn.Parameter] | list[dict]) -> torch.optim.SGD:
    """SGD with Nesterov momentum, by a stage's options, at ``lr`` or what groups say."""
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=True,
    )


def one_cycle(
    config: Common, parameters: Iterable[nn.Parameter] | list[dict], images: int
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.OneCycleLR]:
    """SGD with Nesterov momentum, and a one-cycle schedule over all steps of a run.

    Args:
        config: of a stage that has their options.
        parameters: to train at ``lr``, or groups with a peak of their own.
        images: that an epoch trains on.
    """
    optimizer = sgd(config, parameters)
    peaks = [group["lr"] for group in optimizer.param_groups]
    steps = max(1, images // config.batch_size) * config.epochs
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peaks, total_steps=steps, cycle_momentum=False
    )
    return optimizer, scheduler


def autocast(config: Common, device: torch.device) -> AbstractContextManager:
    """Mixed precision of training passes where the device has it."""
    if _in_bfloat16(config, device):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def engine_dtype(config: Common, device: torch.device) -> torch.dtype:
    """Of engines, for rewards and evaluation: on a GPU that of the training passes.

    On a CPU always float32: its kernels are the faster ones there.
    """
    bfloat16 = device.type == "cuda" and _in_bfloat16(config, device)
    return torch.bfloat16 if bfloat16 else torch.float32


def _in_bfloat16(config: Common, device: torch.device) -> bool:
    if config.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return config.precision == "bfloat16"
