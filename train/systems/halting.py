"""ACT and ACT-hard: an image leaves each segment of the network when it has run long enough.

    python -m train halting --preset quick --data DIR --backbone model.safetensors --tau 0.01
    python -m train halting --preset quick --data DIR --model act.safetensors --hard --tau 0.01

Figurnov et al. 2017, section 3.1, from a trained backbone. The loss is the cross entropy and tau
times the ponder cost of each segment: the blocks N that ran and the remainder R, through which
alone it has a gradient. The second command goes on with what the first has learned.
"""

from __future__ import annotations

import torch
from torch import Tensor

import blockdrop_fast as bdf
from train.distillation import load_teacher, taught_loss
from train.evaluation import evaluate_test, evaluation_metrics
from train.images import prepare
from train.loop import Run
from train.optimization import autocast, engine_dtype, one_cycle
from train.run_files import check_out
from train.systems.config import Halting


def halting(config: Halting) -> None:
    """Train a backbone and its halting scores.

    Raises:
        ValueError: options that contradict each other, or do not fit the checkpoint.
    """
    check_out(config)
    model = _make_model(config)
    device, dataset = prepare(config)
    model.to(device, memory_format=torch.channels_last)
    optimizer, scheduler = one_cycle(config, model.backbone.parameters(), len(dataset.train))
    # Scores start near 0, where their gradients are as small as they are: steps must not be.
    gates = torch.optim.Adam(model.policy.parameters(), lr=config.policy_lr, betas=(0.9, 0.99))
    gates_scheduler = torch.optim.lr_scheduler.OneCycleLR(
        gates, config.policy_lr, total_steps=scheduler.total_steps, cycle_momentum=False
    )
    run = Run(config, model, [optimizer, gates], [scheduler, gates_scheduler], skips_blocks=True)
    dtype = engine_dtype(config, device)
    engine = bdf.compile(model, dtype=dtype)
    teacher = load_teacher(config.teacher, model, device, dtype)
    for epoch in run.epochs():
        tau = 0.0 if epoch <= config.free_epochs else config.tau

        def step(images: Tensor, labels: Tensor, tau: float = tau):
            with autocast(config, device):
                output = model.policy.run_with(model.backbone, images, active_only=True)
            target = None if teacher is None else teacher(images.to(dtype)).logits.float()
            logits = output.logits.float()
            classification = taught_loss(logits, labels, target, config)
            ponder = ponder_cost(output, model.backbone.config.layers)
            return classification + tau * ponder, {
                "accuracy": (logits.argmax(1) == labels).float().mean(),
                "cross_entropy": classification,
                "ponder": ponder,
                "sparsity": output.decisions.sum(1).float().mean(),
            }

        model.train()
        model.policy.requires_grad_(epoch > config.free_epochs)
        means = run.descend(dataset.train, epoch, step)
        metrics = {f"train_{name}": value for name, value in means.items().items()}
        if run.due(epoch, config.evaluate_every):
            engine.refresh()
            evaluation = evaluate_test(
                engine, dataset, config.workers, routing_images=config.routing_images
            )
            metrics |= evaluation_metrics(evaluation, 1.0) | {"test_flops": evaluation.flops}
        run.finish_epoch(epoch, metrics)


def ponder_cost(output: bdf.WeightedOutput, layers: tuple[int, ...]) -> Tensor:
    """Sum over segments of N + R, blocks that ran and what is left of 1 for the last, in the mean.

    Args:
        output: of ``HaltingPolicy.run_with``.
        layers: blocks of each segment.

    Returns:
        Scalar, whose gradient is that of R alone.
    """
    ran = output.decisions.split(layers, 1)
    weights = output.weights.float().split(layers, 1)
    total = torch.zeros((), device=output.weights.device)
    for kept, weight in zip(ran, weights, strict=True):
        blocks = kept.sum(1, keepdim=True)
        total = total + (blocks + weight.gather(1, blocks - 1)).mean()
    return total


def _make_model(config: Halting) -> bdf.BlockDrop:
    if (config.backbone is None) == (config.model is None):
        raise ValueError("backbone and model: expected one of the two checkpoints")
    for name, value in (("tau", config.tau), ("free_epochs", config.free_epochs)):
        if not value >= 0:
            raise ValueError(f"{name}: expected 0 or more, got {value}")
    torch.manual_seed(config.seed)
    if config.backbone is not None:
        backbone = bdf.load_backbone(config.backbone)
        policy = bdf.HaltingPolicy(backbone.config, config.hard, config.epsilon, config.bias)
        return bdf.BlockDrop(backbone, policy)
    model = bdf.load(config.model)
    if not isinstance(model.policy, bdf.HaltingPolicy):
        raise ValueError(f"model: expected one of this stage, {config.model} does not halt")
    model.policy.hard = config.hard
    return model.requires_grad_(True)
