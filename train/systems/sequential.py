"""BlockDrop-seq: the curriculum of a policy that decides on each block when it is due.

    python -m train sequential --preset quick --data DIR --backbone model.safetensors
    python -m train sequential --preset quick --data DIR --model sequential.safetensors --joint

Algorithm 1 with the gates of ``SequentialPolicy``: what a gate sees depends on what earlier ones
drew, so that samples are drawn on the way, rewards come from the runs that drew them, and each
sample has log-probabilities of its own. The rest is the curriculum's: terminal reward, bounded
probabilities, first blocks forced on, baselines. ``--joint`` trains the backbone, too, with the
cross entropy of the sampled runs, as the stage finetune does.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.networks.policy import threshold
from train import distributed
from train.curriculum import train_policy
from train.images import prepare
from train.loop import Run
from train.optimization import autocast, engine_dtype
from train.reward import Step, UsagePrice, bounded, check_estimator, judge, policy_loss, samples_in
from train.run_files import check_out
from train.systems.config import Sequential


def sequential(config: Sequential) -> None:
    """Train a sequential policy by the curriculum, or it and its backbone jointly.

    Raises:
        ValueError: options that contradict each other, or do not fit the checkpoint.
    """
    check_out(config)
    model = _make_model(config)
    device, dataset = prepare(config)
    model.to(device, memory_format=torch.channels_last)
    parameters = (model if config.joint else model.policy).parameters()
    optimizer = torch.optim.Adam(parameters, lr=config.lr, weight_decay=config.weight_decay)
    schedulers = []
    if config.joint:
        steps = max(1, len(dataset.train) // config.batch_size) * config.epochs
        schedulers = [
            torch.optim.lr_scheduler.OneCycleLR(
                optimizer, config.lr, total_steps=steps, cycle_momentum=False
            )
        ]
    price = UsagePrice(config, model.backbone.num_blocks)
    run = Run(config, model, [optimizer], [*schedulers, price], skips_blocks=True)
    engine = bdf.compile(model, dtype=engine_dtype(config, device))

    def decide_at(forced: int):
        return partial(distributed.share, partial(_decide, model, forced)) if forced else None

    train_policy(
        run, engine, dataset, price, partial(train_step, model), decide_at, joint=config.joint
    )


def train_step(
    model: bdf.BlockDrop,
    images: Tensor,
    labels: Tensor,
    config: Sequential,
    forced: int,
    generator: torch.Generator,
    price: UsagePrice,
) -> Step:
    """Run thresholded and sampled decisions, and judge them.

    Args:
        model: of a ``SequentialPolicy``; with ``joint`` in train mode.
        images: (B, 3, H, W) normalised.
        labels: (B,) int64.
        forced: so many first blocks are on.
        price: of a usage target, which the step then moves; it is not in the step's rewards.
    """
    samples = samples_in(config)
    run = partial(model.policy.run_with, model.backbone, images, forced=forced, active_only=True)

    def draw(_: int, logit: Tensor) -> Tensor:
        keep = bounded(logit.detach().float().sigmoid(), config.alpha)
        keep = distributed.spread(keep.unflatten(0, (-1, len(images))), 1)
        drawn = torch.bernoulli(keep, generator=generator).bool()
        return distributed.own(drawn, 1).flatten()

    with autocast(config, images.device):
        runs = []
        if samples.start:
            with torch.no_grad():
                runs.append(run(lambda _, logit: threshold(logit)))
        runs.append(run(draw, copies=config.samples))
    count, batch = samples.stop, len(images)
    tried, decisions, gates = (torch.cat(each) for each in zip(*runs, strict=True))
    decisions = decisions.unflatten(0, (count, batch))
    probabilities = gates.float().sigmoid().unflatten(0, (count, batch))
    correct, rewards = judge(tried.detach().unflatten(0, (count, batch)), labels, decisions, config)
    sampled = probabilities[samples]
    loss = policy_loss(
        sampled,
        bounded(sampled, config.alpha),
        decisions,
        price.charge(rewards, decisions),
        config,
        forced,
    ) / len(labels)
    if config.joint:
        logits = tried[samples.start * batch :].float()
        loss = loss + F.cross_entropy(logits, labels.repeat(config.samples))
    price.update(probabilities[0], forced)
    return Step(decisions, correct, rewards, loss)


@torch.no_grad()
def _decide(model: bdf.BlockDrop, forced: int, images: Tensor) -> Tensor:
    """Decisions of the curriculum's evaluations; its backbone is in eval mode throughout."""
    _, decisions, _ = model.policy.run_with(
        model.backbone, images, lambda _, logit: threshold(logit), forced=forced, active_only=True
    )
    return decisions


def _make_model(config: Sequential) -> bdf.BlockDrop:
    check_estimator(config)
    if config.estimator in ("arms", "flips"):
        raise ValueError(
            f"estimator: got {config.estimator!r}, which compares decisions that are known "
            "beforehand; expected self_critical, leave_one_out or rloo"
        )
    torch.manual_seed(config.seed)
    if config.joint:
        if config.model is None or config.backbone is not None:
            raise ValueError("joint: expected --model, a checkpoint of this stage, alone")
        model = bdf.load(config.model)
        if not isinstance(model.policy, bdf.SequentialPolicy):
            raise ValueError(f"model: expected one of this stage, {config.model} is of another")
        return model.requires_grad_(True)
    if config.backbone is None or config.model is not None:
        raise ValueError("backbone: expected a backbone checkpoint alone, or --joint and --model")
    backbone = bdf.load_backbone(config.backbone).eval().requires_grad_(False)
    return bdf.BlockDrop(backbone, bdf.SequentialPolicy(backbone.config))
