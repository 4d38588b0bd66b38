"""Stage 2: curriculum learning of the policy network on a frozen backbone."""

from __future__ import annotations

import torch

import blockdrop_fast as bdf
from blockdrop_fast.networks.checkpoints import init_policy_from_resnet18, load_policy
from train.config import Curriculum
from train.loop import (
    Means,
    PolicyStatistics,
    Run,
    autocast,
    engine_dtype,
    evaluate_test,
    evaluation_metrics,
    prepare,
    sampling_generator,
)
from train.reward import (
    advantages,
    bounded,
    entropy_bonus,
    forced_blocks,
    policy_gradient_loss,
    reward,
    sample,
)


def curriculum(config: Curriculum) -> None:
    """Train a policy with the self-critical policy gradient (Algorithm 1, lines 3 to 13).

    The backbone is frozen and in eval mode, so the rewards of the thresholded and of all sampled
    decisions are one gradient-free call of an engine, which skips dropped blocks and computes
    what an image's decisions share, the forced-on prefix above all, once.
    """
    device, dataset = prepare(config)
    model = _make_model(config).to(device, memory_format=torch.channels_last)
    num_blocks = model.backbone.num_blocks
    optimizer = torch.optim.Adam(
        model.policy.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    run = Run(config, model, [optimizer], [])
    # Its backbone is frozen: only evaluation needs the policy's new weights.
    engine = bdf.compile(model, dtype=engine_dtype(config, device))
    for epoch in run.epochs():
        forced = forced_blocks(num_blocks, epoch, config.blocks_per_epoch)
        means, statistics = Means(), PolicyStatistics()
        generator = sampling_generator(config.seed, epoch, device)
        model.policy.train()
        for images, labels in run.batches(dataset.train, epoch, config.batch_size):
            with autocast(config, device):
                logits = model.policy.logits(images)
            probabilities = logits.float().sigmoid()
            thresholded = bdf.decide(probabilities)
            thresholded[:, :forced] = True
            exploring = bounded(probabilities, config.alpha)
            sampled = sample(exploring, config.samples, forced, generator)
            decisions = torch.cat([thresholded[None], sampled])
            correct = engine.run_sets(images.to(engine.dtype), decisions).argmax(-1) == labels
            rewards = reward(correct, decisions, config.penalty)
            advantage = advantages(rewards[1:], rewards[0], config.baseline)
            loss = policy_gradient_loss(exploring, sampled, advantage, forced)
            loss = (loss - config.entropy * entropy_bonus(exploring)) / len(images)
            run.check_finite(loss, epoch=epoch, reward=rewards.mean().item())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            means.add(
                len(images),
                accuracy=correct[1:].float().mean(),
                reward=rewards[1:].mean(),
                thresholded_accuracy=correct[0].float().mean(),
                thresholded_reward=rewards[0].mean(),
                thresholded_sparsity=thresholded.sum(1).float().mean(),
            )
            statistics.add(sampled)
            if run.step % 20 == 0:
                run.show(**means.items())
        metrics = {f"train_{name}": value for name, value in means.items().items()}
        metrics |= statistics.items("train") | {"forced_blocks": forced}
        if run.due(epoch, config.evaluate_every):
            engine.refresh()

            def decide(images: torch.Tensor, forced: int = forced) -> torch.Tensor:
                decisions = bdf.decide(engine.probabilities(images))
                decisions[:, :forced] = True
                return decisions

            evaluation = evaluate_test(engine, dataset, config.workers, decide)
            metrics |= evaluation_metrics(evaluation, config.penalty)
        run.finish_epoch(epoch, metrics)


def _make_model(config: Curriculum) -> bdf.BlockDrop:
    if config.backbone is None:
        raise ValueError("backbone: a backbone checkpoint is required")
    backbone = bdf.load_backbone(config.backbone).eval().requires_grad_(False)
    torch.manual_seed(config.seed)
    if config.policy is not None and config.policy_init is not None:
        raise ValueError("policy and policy_init: expected one of them")
    if config.policy is not None:
        policy = load_policy(config.policy)
    elif backbone.config.stem == "cifar":
        policy = bdf.policy_resnet8(backbone.num_blocks)
    else:
        policy = bdf.policy_resnet10(backbone.num_blocks)
    if config.policy_init is not None:
        init_policy_from_resnet18(policy, config.policy_init)
    return bdf.BlockDrop(backbone, policy)
