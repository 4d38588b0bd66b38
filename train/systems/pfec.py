"""Pruning Filters for Efficient ConvNets: the weakest filters inside blocks are cut off for good.

    python -m train pfec --preset quick --data DIR --model backbone.safetensors --variant B
    python -m train pfec --preset quick --data DIR --model blockdrop.safetensors --ratios .5 .4 .3

Li et al. 2017, section 3.3, "increasingly": of the first convolution of a block the filters of the
smallest l1 norms go, with their batch norm and the second convolution's inputs; all at once, before
the network is trained again. What is left is a narrower network (``ResNetConfig.block_widths``).
Given a BlockDrop model, its backbone is pruned and trained again at what its policy decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.networks.checkpoints import load_any
from train.distillation import load_teacher, taught_loss
from train.evaluation import evaluate_test, evaluation_metrics
from train.images import prepare
from train.loop import Run
from train.optimization import autocast, engine_dtype, one_cycle, sgd
from train.run_files import check_out
from train.systems.config import Pfec

# Layers -> variant -> share of filters that go in each segment, and blocks that stay whole, counted
# from 1: Li et al. for ResNet-56 and ResNet-110; those of ResNet-110 carried over to ResNet-32.
VARIANTS: dict[tuple[int, ...], dict[str, tuple[tuple[float, ...], tuple[int, ...]]]] = {
    (5, 5, 5): {"A": ((0.5, 0.0, 0.0), (5,)), "B": ((0.5, 0.4, 0.3), (5, 6, 11))},
    (9, 9, 9): {
        "A": ((0.1, 0.1, 0.1), (8, 10, 19, 27)),
        "B": ((0.6, 0.3, 0.1), (8, 9, 10, 17, 19, 27)),
    },
    (18, 18, 18): {"A": ((0.5, 0.0, 0.0), (18,)), "B": ((0.5, 0.4, 0.3), (18, 19, 37))},
}


def pfec(config: Pfec) -> None:
    """Prune a backbone, and train it again.

    Raises:
        ValueError: options that contradict each other, or do not fit the checkpoint.
    """
    check_out(config)
    model = _load_model(config)
    decides = isinstance(model, bdf.BlockDrop)
    whole = float(bdf.flops(model.backbone if decides else model))
    if decides:
        model.backbone = prune(model.backbone, _block_widths(config, model.backbone.config))
    else:
        model = prune(model, _block_widths(config, model.config))
    backbone = model.backbone if decides else model
    pruned = 1 - float(bdf.flops(backbone)) / whole
    print(f"{100 * pruned:.1f} % of the FLOPs are cut off: widths {backbone.config.inner_widths}")
    device, dataset = prepare(config)
    model.to(device, memory_format=torch.channels_last)
    if config.schedule == "constant":
        optimizer = sgd(config, backbone.parameters())
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    else:
        optimizer, scheduler = one_cycle(config, backbone.parameters(), len(dataset.train))
    run = Run(config, model, [optimizer], [scheduler], decides, all_used=not decides)
    dtype = engine_dtype(config, device)
    engine = bdf.compile(model, dtype=dtype)
    teacher = load_teacher(config.teacher, model, device, dtype)

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(config, device):
            decisions = None
            if decides:
                with torch.no_grad():
                    decisions = model.decide(images)
            logits = backbone(images, decisions, active_only=decides).float()
        target = None if teacher is None else teacher(images.to(dtype)).logits.float()
        right = (logits.argmax(1) == labels).float().mean()
        return taught_loss(logits, labels, target, config), {"accuracy": right}

    for epoch in run.epochs():
        model.eval()  # a policy stays as it is
        backbone.train()
        means = run.descend(dataset.train, epoch, step)
        metrics = {f"train_{name}": value for name, value in means.items().items()}
        metrics["pruned"] = pruned
        if run.due(epoch, config.evaluate_every):
            engine.refresh()
            evaluation = evaluate_test(
                engine,
                dataset,
                config.workers,
                routing_images=config.routing_images if decides else 0,
            )
            metrics |= {"test_accuracy": evaluation.accuracy, "test_flops": evaluation.flops}
            if decides:
                metrics |= evaluation_metrics(evaluation, 1.0)
        run.finish_epoch(epoch, metrics)


@torch.no_grad()
def prune(backbone: bdf.ResNet, block_widths: Sequence[int]) -> bdf.ResNet:
    """Cut off the filters of the smallest l1 norms, of the first convolution of each block.

    Args:
        backbone: of basic blocks.
        block_widths: K numbers of filters to keep, at most as many as there are.

    Returns:
        A new, narrower backbone; filters keep their order.

    Raises:
        ValueError: widths that do not fit, or other blocks.
    """
    config = backbone.config
    if config.block != "basic":
        raise ValueError(f"backbone: expected basic blocks to prune, got {config.block} ones")
    result = bdf.ResNet(replace(config, block_widths=tuple(block_widths)))
    for k, (width, present) in enumerate(zip(block_widths, config.inner_widths, strict=True), 1):
        if width > present:
            raise ValueError(
                f"block_widths: block {k} has {present} filters, expected at most as many, "
                f"got {width}"
            )
    state, k = backbone.state_dict(), 0
    for segment, blocks in enumerate(backbone.segments):
        for index, block in enumerate(blocks):
            name = f"segments.{segment}.{index}"
            norms = block.conv1.weight.abs().sum((1, 2, 3))
            keep = norms.argsort(descending=True, stable=True)[: block_widths[k]].sort().values
            for key in ("conv1.weight", *(f"bn1.{part}" for part in block.bn1.state_dict())):
                value = state[f"{name}.{key}"]
                state[f"{name}.{key}"] = value[keep] if value.ndim else value
            state[f"{name}.conv2.weight"] = block.conv2.weight[:, keep]
            k += 1
    result.load_state_dict(state)
    result.normalization = backbone.normalization
    return result.to(backbone.conv1.weight)


def _block_widths(config: Pfec, architecture: bdf.ResNetConfig) -> tuple[int, ...]:
    """How many filters each block keeps: int(C (1 - ratio)), as the authors, or a bit more."""
    layers, ratios, skip = architecture.layers, config.ratios, config.skip
    if ratios is None:
        if layers not in VARIANTS:
            raise ValueError(
                "variant: known for ResNet-32, 56 and 110; name --ratios, and --skip, for "
                f"layers={layers}"
            )
        if skip is not None:
            raise ValueError("skip: expected with --ratios")
        ratios, skip = VARIANTS[layers][config.variant]
    if len(ratios) != len(layers) or not all(0 <= ratio < 1 for ratio in ratios):
        raise ValueError(f"ratios: expected {len(layers)} of 0 to below 1, got {ratios}")
    skip = skip or ()
    if not set(skip) <= set(range(1, architecture.num_blocks + 1)):
        raise ValueError(f"skip: expected blocks out of 1 to {architecture.num_blocks}, got {skip}")
    if config.multiple < 1:
        raise ValueError(f"multiple: expected 1 or more, got {config.multiple}")
    of_blocks = [ratio for ratio, count in zip(ratios, layers, strict=True) for _ in range(count)]
    widths = []
    for k, (present, ratio) in enumerate(zip(architecture.inner_widths, of_blocks, strict=True), 1):
        # Rounded first, as binary fractions may come to 6.9999999.
        left = max(1, int(round(present * (1 - ratio), 6)))
        left = min(present, -(-left // config.multiple) * config.multiple)
        widths.append(present if k in skip else left)
    return tuple(widths)


def _load_model(config: Pfec) -> bdf.BlockDrop | bdf.ResNet:
    if config.model is None:
        raise ValueError("model: a backbone or BlockDrop checkpoint is required")
    model = load_any(config.model)
    if isinstance(model, bdf.ResNet):
        return model
    policy = model.policy if isinstance(model, bdf.BlockDrop) else None
    if not isinstance(policy, bdf.PolicyNetwork | bdf.FixedPolicy):
        raise ValueError(
            f"model: {config.model} decides by what its backbone sees, which pruning would change; "
            "expected a backbone, or a policy network or a set of blocks beside one"
        )
    return model.requires_grad_(True)
