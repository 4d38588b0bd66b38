"""Stage 3: joint finetuning of backbone and policy network.

    python -m train finetune --preset quick --data DIR --model model.safetensors

ResNet-32, CIFAR-10 (JPEG), two CPU cores, in five parts whose options docs/results/cifar10-jpeg.md
lists: 87.84 % at 8.32 ± 0.47 of 15 blocks after 18 epochs, 68 minutes of training steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import blockdrop_fast as bdf
from blockdrop_fast.networks.resnet import masked_block
from train import distributed
from train.batch_statistics import count_backbone, count_policy
from train.config import Finetune
from train.distillation import distillation_loss, load_teacher
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
    explore,
    judge,
    policy_loss,
    samples_in,
)
from train.run_files import MODEL_FILE


def finetune(config: Finetune) -> None:
    """Train backbone and policy jointly (Algorithm 1, lines 14 to 16).

    loss = policy-gradient loss and entropy bonus (summed over the batch) + cross entropy of a
    sampled pass. With
    ``--bn all`` both passes are the authors': masked, in train mode, both updating the running
    statistics. Otherwise the gradient pass computes active images only, and all rewards come from
    one gradient-free call of an engine that takes over the weights before each step.
    """
    device, dataset = prepare(config)
    model = _load_model(config).to(device, memory_format=torch.channels_last)
    samples = samples_in(config)
    steps = max(1, len(dataset.train) // config.batch_size) * config.epochs
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=lr, weight_decay=config.weight_decay)
        for network, lr in (
            (model.backbone, config.lr),
            (model.policy, config.policy_lr or config.lr),
        )
    ]
    schedulers = [_scheduler(config, optimizer, steps) for optimizer in optimizers]
    price = UsagePrice(config, model.backbone.num_blocks)
    skips_blocks = config.bn == "active"
    run = Run(config, model, optimizers, [*schedulers, price], skips_blocks, config.bn == "all")
    dtype = engine_dtype(config, device)
    engine = bdf.compile(model, dtype=dtype)
    teacher = load_teacher(config.teacher, model, device, dtype)

    def forward(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Step, Tensor]:
        with autocast(config, device):
            probabilities = model.policy.logits(images).float().sigmoid()
        return finetune_step(
            probabilities, images, labels, config, generator, engine, price, teacher
        )

    for epoch in run.epochs():
        means, statistics = Means(), PolicyStatistics()
        generator = sampling_generator(config.seed, epoch, device)
        model.train()
        policy_is_frozen = epoch <= config.policy_frozen
        model.policy.train(not policy_is_frozen)
        if config.bn == "frozen":
            freeze_batch_norm(model.backbone)
        for images, labels in run.batches(dataset.train, epoch, config.batch_size):
            step, classification = run.compute(forward, images, labels, generator)
            run.check_finite(
                step.loss,
                epoch=epoch,
                cross_entropy=classification.item(),
                lr=schedulers[0].get_last_lr()[0],
            )
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            step.loss.backward()
            if policy_is_frozen:
                optimizers[1].zero_grad(set_to_none=True)
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                scheduler.step()
            means.add_policy(
                step.decisions, step.correct, step.rewards, samples, cross_entropy=classification
            )
            statistics.add(step.decisions[samples])
            if run.step % 20 == 0:
                run.show(**means.items())
        count_policy(model, dataset.train, config)
        if config.bn != "frozen":
            count_backbone(model, dataset.train, config, active_only=config.bn == "active")
        metrics = {f"train_{name}": value for name, value in means.items().items()}
        metrics |= statistics.items("train")
        if config.usage_target is not None:
            metrics |= {"usage_price": float(price.value)}
        if run.due(epoch, config.evaluate_every):
            engine.refresh()
            static = None
            if epoch == config.epochs:
                static = static_accuracies_of(
                    config.out / MODEL_FILE, engine, dataset, config.static_images, config.workers
                )
            evaluation = evaluate_test(
                engine, dataset, config.workers, None, config.routing_images, static
            )
            full = bdf.compile(model.backbone, dtype=dtype)
            full = evaluate_test(full, dataset, config.workers)
            metrics |= evaluation_metrics(evaluation, config.penalty)
            metrics |= {"test_accuracy_all_blocks": full.accuracy}
        run.finish_epoch(epoch, metrics)


def finetune_step(
    probabilities: Tensor,
    images: Tensor,
    labels: Tensor,
    config: Finetune,
    generator: torch.Generator,
    engine: bdf.Engine,
    price: UsagePrice,
    teacher: bdf.Engine | None = None,
) -> tuple[Step, Tensor]:
    """A step's decisions, rewards and loss (Algorithm 1, lines 5 to 12 and 15).

    Args:
        probabilities: (B, K), the policy network's, with gradient.
        images: (B, 3, H, W) normalised.
        labels: (B,) int64.
        engine: compiled from the backbone that is trained, in train mode.
        price: of a usage target, which the step then moves; it is not in the step's rewards.
        teacher: whose logits the sampled pass also learns to match.

    Returns:
        The step, whose loss has gradients to both networks, and what of it is the classification's.
    """
    exploring, decisions = explore(probabilities, config, 0, generator)
    with autocast(config, images.device):
        if config.bn == "all":
            logits, tried = _masked_passes(engine.backbone, images, decisions)
        else:
            logits, tried = _engine_passes(engine, images, decisions, samples_in(config).start)
        classification = F.cross_entropy(logits, labels)
        if teacher is not None:
            classification = classification + config.distill * distillation_loss(
                logits, teacher(images.to(teacher.dtype)).logits.float(), config.temperature
            )
    correct, rewards = judge(tried, labels, decisions, config)
    paid = price.charge(rewards, decisions)
    policy = distributed.summed(policy_loss(probabilities, exploring, decisions, paid, config, 0))
    loss = policy + classification
    price.update(probabilities, 0)
    return Step(decisions, correct, rewards, loss), classification


def _masked_passes(
    backbone: bdf.ResNet, images: Tensor, decisions: Tensor
) -> tuple[Tensor, Tensor]:
    """The authors' two passes: (B, C) logits of the sampled one; (2, B, C), without gradient."""
    with torch.no_grad():
        thresholded = masked_pass(backbone, images, decisions[0])
    logits = masked_pass(backbone, images, decisions[1])
    return logits, torch.stack([thresholded, logits.detach()])


def masked_pass(backbone: bdf.ResNet, images: Tensor, decisions: Tensor) -> Tensor:
    """``backbone(images, decisions)`` of a process: computed is what any image of the batch keeps.

    So its batch norms see the same blocks in all processes; synchronised ones wait for each other.
    """
    used = distributed.mean(decisions.any(0).float()) > 0
    x = backbone.stem(images)
    for (block, shortcut), keep, some in zip(backbone.blocks(), decisions.T, used, strict=True):
        x = masked_block(block, shortcut, x, keep, some)
    return backbone.classifier(x)


def _engine_passes(
    engine: bdf.Engine, images: Tensor, decisions: Tensor, sample: int
) -> tuple[Tensor, Tensor]:
    """(B, C) logits of a sample, on active images; (N, B, C) of all, without gradient."""
    engine.refresh()
    tried = engine.run_sets(images.to(engine.dtype), decisions)
    return engine.backbone(images, decisions[sample], active_only=True), tried


def freeze_batch_norm(network: nn.Module) -> None:
    """Batch norm with running statistics that stay as they are; its weights still train."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            module.eval()


def _scheduler(
    config: Finetune, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if config.schedule == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, optimizer.param_groups[0]["lr"], total_steps=steps, cycle_momentum=False
        )
    if config.schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return torch.optim.lr_scheduler.StepLR(optimizer, max(1, round(0.8 * steps)), gamma=0.1)


def _load_model(config: Finetune) -> bdf.BlockDrop:
    if config.model is None:
        raise ValueError("model: a BlockDrop checkpoint is required")
    check_estimator(config)
    if config.bn == "all" and config.estimator in ("rloo", "arms", "flips"):
        raise ValueError(
            f"estimator: got {config.estimator!r}, but --bn all is the authors' procedure, with "
            "thresholded decisions and one sample (or use --bn active)"
        )
    if config.bn == "all" and config.samples != 1:
        raise ValueError(
            f"samples: got {config.samples}, but --bn all is the authors' procedure, where every "
            "pass updates the batch-norm statistics: it takes 1 (or use --bn active)"
        )
    model = bdf.load(config.model).requires_grad_(True)
    check_policy("model", model.policy)
    return model
