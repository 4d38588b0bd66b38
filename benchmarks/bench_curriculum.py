"""A curriculum step: our procedure against the authors', policy training counted in both.

Both procedures differ in one thing only: how the logits at the thresholded and at the sampled
decisions are computed, without gradient. The authors make two full masked passes of the unfolded
network; `train curriculum` makes one engine call, which folds batch norm, skips dropped blocks
and computes what the two decision sets share once. Everything else (policy forward, sampling,
rewards, backward, Adam) is the same code for both, that of ``train.reward``, and is timed too.
Both get channels-last images, which the masked passes like better as well.

An epoch is so many equal steps, so a step is timed and the epoch of 50,000 images is scaled
from it (``extra_info``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.measure import timing
from blockdrop_fast.measure.baselines import masked_forward
from blockdrop_fast.measure.tolerance import make_reference
from blockdrop_fast.measure.workload import make_workload
from train.config import Curriculum
from train.reward import curriculum_step, forced_blocks

EPOCH_IMAGES = 50_000
CONFIG = Curriculum(lr=1e-3)  # the paper's one sample an image, the authors' commands
BATCH, QUICK_BATCH = 512, 128
KEPT_LATE = 11
PROCEDURES = ("authors", "ours")
# Position -> epoch t of the K - t schedule. "trained" is after it, with a policy that has
# learned: it would keep 11 of 15 blocks, where a fresh one is undecided everywhere.
POSITIONS = {"t1": 1, "t8": 8, "t15": 15, "trained": 16}

Logits = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Trainer:
    """Policy, optimizer and random numbers of one procedure; each has its own."""

    policy: bdf.PolicyNetwork
    optimizer: torch.optim.Optimizer
    generator: torch.Generator


def make_trainer(policy: bdf.PolicyNetwork) -> Trainer:
    """A trainer on its own copy of the policy network."""
    policy = copy.deepcopy(policy).requires_grad_(True).train()
    policy = policy.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(policy.parameters(), lr=CONFIG.lr)
    return Trainer(policy, optimizer, torch.Generator().manual_seed(0))


def step(trainer: Trainer, images: Tensor, labels: Tensor, forced: int, logits: Logits) -> None:
    """A step from images to new weights.

    Args:
        logits: (images, (2, B, K) decisions) -> (2, B, num_classes), without gradient.
    """
    probabilities = trainer.policy(images)
    done = curriculum_step(
        probabilities, labels, CONFIG, forced, trainer.generator, partial(logits, images)
    )
    trainer.optimizer.zero_grad(set_to_none=True)
    done.loss.backward()
    trainer.optimizer.step()


def authors_passes(backbone: bdf.ResNet) -> Logits:
    """Two full passes of the unfolded network, dropped blocks computed and masked."""

    @torch.no_grad()
    def logits(images: Tensor, decisions: Tensor) -> Tensor:
        return torch.stack([masked_forward(backbone, images, one) for one in decisions])

    return logits


def measure_position(position: str, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a step of each procedure, interleaved, after the logits of both were checked."""
    workload = make_workload("resnet32", batch)
    backbone, policy, images = workload.model.backbone, workload.model.policy, workload.images
    if position == "trained":
        # Undecided about nothing: s = 0.82 for the blocks it keeps, 0.18 for the others.
        keep = bdf.heuristics.random_k(KEPT_LATE, backbone.config.layers, 1)[0]
        head = policy.network.fc
        torch.nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(0))
        head.bias.data = torch.where(keep, 1.5, -1.5)
    forced = forced_blocks(backbone.num_blocks, POSITIONS[position])
    passes = {"authors": authors_passes(backbone), "ours": bdf.compile(backbone).run_sets}

    decisions = torch.stack(
        [
            bdf.heuristics.random_k(keep, backbone.config.layers, 64, seed=keep, per_image=True)
            for keep in (KEPT_LATE, 7)
        ]
    )
    decisions[:, :, :forced] = True
    for one, keep in enumerate(decisions):
        reference = make_reference(backbone, images[:64], keep, torch.float32)
        for name, logits in passes.items():
            reference.check(f"{name}, set {one}", logits(images[:64], decisions)[one])

    labels = torch.randint(10, (batch,), generator=torch.Generator().manual_seed(0))
    # The batches of `train` are channels-last.
    images = images.contiguous(memory_format=torch.channels_last)

    def call(name: str) -> Callable[[int], None]:
        trainer = make_trainer(policy)
        return lambda _: step(trainer, images, labels, forced, passes[name])

    return timing.interleave({name: call(name) for name in PROCEDURES}, rounds=rounds)


@pytest.mark.parametrize("procedure", PROCEDURES)
@pytest.mark.parametrize("position", POSITIONS)
def test_curriculum_step(position, procedure, quick, once, report, benchmark):
    batch, rounds = (QUICK_BATCH, 3) if quick else (BATCH, 7)
    benchmark.group = f"curriculum step, ResNet-32, {position}, batch {batch}"
    samples = once(position, lambda: measure_position(position, batch, rounds))
    seconds = {name: timing.median(values) for name, values in samples.items()}
    steps = math.ceil(EPOCH_IMAGES / batch)
    report(
        samples[procedure],
        images_per_second=batch / seconds[procedure],
        epoch_seconds_scaled=steps * seconds[procedure],
        epoch_steps=steps,
        speedup_over_authors=seconds["authors"] / seconds[procedure],
    )
