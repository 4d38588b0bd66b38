"""Stage 2: curriculum learning of the policy network on a frozen backbone.

    python -m train curriculum --preset quick --data DIR --backbone model.safetensors --epochs 26

ResNet-32, CIFAR-10 (JPEG), two CPU cores (docs/results/cifar10-jpeg.md): 78.08 % at 12.71 ± 1.87
of 15 blocks after 19 epochs, 22 minutes of training steps. With all blocks the
backbone has 88.68 %.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.data.image_sets import Dataset
from blockdrop_fast.networks.checkpoints import init_policy_from_resnet18, load_policy
from train import distributed
from train.batch_statistics import count_policy
from train.config import Curriculum
from train.evaluation import evaluate_test, evaluation_metrics, static_accuracies_of
from train.images import prepare
from train.loop import Run, sampling_generator
from train.metrics import Means, PolicyStatistics
from train.optimization import autocast, engine_dtype
from train.reward import (
    Step,
    UsagePrice,
    check_estimator,
    check_policy,
    curriculum_step,
    forced_blocks,
    samples_in,
)
from train.run_files import MODEL_FILE


def curriculum(config: Curriculum) -> None:
    """Train a policy with the policy gradient (Algorithm 1, lines 3 to 13), self-critical or other.

    The backbone is frozen and in eval mode, so the rewards of all decisions that a step tries are
    one gradient-free call of an engine, which skips dropped blocks and computes what an image's
    decisions share, the forced-on prefix above all, once.
    """
    device, dataset = prepare(config)
    model = make_model(config).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(
        model.policy.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    price = UsagePrice(config, model.backbone.num_blocks)
    run = Run(config, model, [optimizer], [price], all_used=True)
    # Its backbone is frozen: only evaluation needs the policy's new weights.
    engine = bdf.compile(model, dtype=engine_dtype(config, device))

    def decide_at(forced: int) -> Callable[[Tensor], Tensor]:
        def decide(images: Tensor) -> Tensor:
            decisions = bdf.decide(distributed.share(engine.probabilities, images))
            decisions[:, :forced] = True
            return decisions

        return decide

    train_policy(run, engine, dataset, price, partial(train_step, engine), decide_at)


def train_policy(
    run: Run,
    engine: bdf.Engine,
    dataset: Dataset,
    price: UsagePrice,
    take_step: Callable[..., Step],
    decide_at: Callable[[int], Callable[[Tensor], Tensor] | None],
    *,
    joint: bool = False,
) -> None:
    """The epochs of a run that trains a policy by rewards, whatever kind of policy.

    Args:
        run: of a stage with the options of ``Curriculum``; its optimizers, and schedulers but for
            the price, make a step a batch.
        engine: compiled from the run's model, to evaluate with.
        take_step: (images, labels, config, forced, generator, price) -> ``Step``.
        decide_at: forced blocks -> how to decide in evaluations; None: as the engine does.
        joint: the backbone trains, too, and no blocks are forced.
    """
    config, model, samples = run.config, run.model, samples_in(run.config)
    schedulers = [each for each in run.schedulers if each is not price]
    static = None
    for epoch in run.epochs():
        forced = forced_blocks(model.backbone.num_blocks, epoch, config.blocks_per_epoch)
        forced = 0 if joint else forced
        means, statistics = Means(), PolicyStatistics()
        generator = sampling_generator(config.seed, epoch, engine.device)
        (model if joint else model.policy).train()
        for images, labels in run.batches(dataset.train, epoch, config.batch_size):
            step = run.compute(take_step, images, labels, config, forced, generator, price)
            run.check_finite(step.loss, epoch=epoch, reward=step.rewards.mean().item())
            for optimizer in run.optimizers:
                optimizer.zero_grad(set_to_none=True)
            step.loss.backward()
            for each in (*run.optimizers, *schedulers):
                each.step()
            means.add_policy(step.decisions, step.correct, step.rewards, samples)
            statistics.add(step.decisions[samples])
            if run.step % 20 == 0:
                run.show(**means.items())
        count_policy(model, dataset.train, config)
        metrics = {f"train_{name}": value for name, value in means.items().items()}
        metrics |= statistics.items("train") | {"forced_blocks": forced}
        if config.usage_target is not None:
            metrics |= {"usage_price": float(price.value)}
        if run.due(epoch, config.evaluate_every):
            engine.refresh()
            if static is None and (not joint or epoch == config.epochs):
                checkpoint = config.out / MODEL_FILE if joint else config.backbone
                static = static_accuracies_of(
                    checkpoint, engine, dataset, config.static_images, config.workers
                )
            decide = decide_at(forced)
            evaluation = evaluate_test(
                engine, dataset, config.workers, decide, config.routing_images, static
            )
            metrics |= evaluation_metrics(evaluation, config.penalty)
            if decide is None:  # else the policy is not counted
                metrics["test_flops"] = evaluation.flops
        run.finish_epoch(epoch, metrics)


def train_step(
    engine: bdf.Engine,
    images: Tensor,
    labels: Tensor,
    config: Curriculum,
    forced: int,
    generator: torch.Generator,
    price: UsagePrice | None = None,
) -> Step:
    """A step from (B, 3, H, W) normalised images on; see ``curriculum_step``.

    Args:
        engine: compiled from the model whose policy network is trained; its backbone is frozen.
    """
    with autocast(config, images.device):
        logits = engine.model.policy.logits(images)
    probabilities = logits.float().sigmoid()
    rewarded = partial(engine.run_sets, images.to(engine.dtype))
    return curriculum_step(probabilities, labels, config, forced, generator, rewarded, price)


def make_model(config: Curriculum) -> bdf.BlockDrop:
    """Backbone, frozen and in eval mode, and the policy network to start from.

    Raises:
        ValueError: naming the option that is missing or cannot be.
    """
    check_estimator(config)
    if config.backbone is None:
        raise ValueError("backbone: a backbone checkpoint is required")
    backbone = bdf.load_backbone(config.backbone).eval().requires_grad_(False)
    torch.manual_seed(config.seed)
    if config.policy is not None and config.policy_init is not None:
        raise ValueError("policy and policy_init: expected one of them")
    if config.policy is not None:
        policy = load_policy(config.policy)
        check_policy("policy", policy)
    elif backbone.config.stem == "cifar":
        policy = bdf.policy_resnet8(backbone.num_blocks)
    else:
        policy = bdf.policy_resnet10(backbone.num_blocks)
    if config.policy_init is not None:
        init_policy_from_resnet18(policy, config.policy_init)
    return bdf.BlockDrop(backbone, policy)
