"""A step of joint finetuning: our procedure against the authors', everything of a step counted.

The authors' is ``train finetune --bn all``: two masked passes in train mode, of the thresholded
decisions without gradient and of the sampled ones with it, all blocks computed for all images. Ours
is ``--bn active``: the rewards of both from one engine call at the weights of that step, the
gradient pass on active images only. Both are the paper's in all else (one sample, self-critical,
alpha = 0.8) and run the step of ``train.finetune``; policy forward and backward and both Adams are
timed, too. Both get channels-last images and weights, which the masked passes like better as well.

Decisions are at the published block usage: a policy network of random weights computes its
probabilities, then their values (not their gradients) are replaced. Blocks that the published
decisions drop get s = 0, which is sampled with 1 - alpha; those that they keep one s for all, such
that sampled decisions keep as many blocks as the thresholded ones, on average. Where the policy is
"decided", kept blocks get s = 1: samples of ResNet-110 then keep 20.9 blocks, its thresholded
decisions 16.9.

An epoch is so many equal steps, so a step is timed and the epoch of 50,000 images is scaled
from it (``extra_info``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.measure import timing
from blockdrop_fast.measure.tolerance import make_reference
from blockdrop_fast.measure.workload import Workload, make_workload
from train.config import Finetune
from train.finetune import finetune_step
from train.reward import UsagePrice

EPOCH_IMAGES = 50_000
PROCEDURES = {"authors": Finetune(bn="all"), "ours": Finetune(bn="active")}
# Network, and whether its policy is decided.
CASES = {
    "resnet32": ("resnet32", False),
    "resnet110": ("resnet110", False),
    "resnet110-decided": ("resnet110", True),
}
BATCH, QUICK_BATCH = 256, 32  # the paper's 256
CHECKED = 64


def make_probabilities(decisions: Tensor, alpha: float, decided: bool) -> Tensor:
    """(B, K) s with these decisions (B, K); see the module for ``decided``."""
    if decided:
        return decisions.float()
    usage = decisions.float().mean()
    # s' of kept blocks, so that usage * s' + (1 - usage) * (1 - alpha) = usage.
    exploring = 1 - (1 - alpha) * (1 - usage) / usage
    return decisions * ((exploring - (1 - alpha)) / (2 * alpha - 1))


def make_step(
    workload: Workload, config: Finetune, decided: bool, usage: list[float]
) -> Callable[[int], None]:
    """A step of one procedure, from images to new weights, on its own copy of the model.

    Args:
        decided: see ``make_probabilities``.
        usage: gets the mean kept blocks of the thresholded and of the sampled decisions.
    """
    model = copy.deepcopy(workload.model).train().requires_grad_(True)
    model = model.to(memory_format=torch.channels_last)
    engine = bdf.compile(model)
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=config.lr)
        for network in (model.backbone, model.policy)
    ]
    generator = torch.Generator().manual_seed(0)
    price = UsagePrice(config, model.backbone.num_blocks)
    images = workload.images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (len(images),), generator=torch.Generator().manual_seed(0))
    wanted = make_probabilities(workload.decisions, config.alpha, decided)

    def step(_: int) -> None:
        probabilities = model.policy.logits(images).sigmoid()
        probabilities = probabilities + (wanted - probabilities).detach()
        done, _ = finetune_step(probabilities, images, labels, config, generator, engine, price)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        done.loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        usage[:] = done.decisions.sum(-1).double().mean(1).tolist()

    return step


def check(workload: Workload) -> None:
    """Compare the logits of all passes with the reference, in eval mode, where all are the same.

    Raises:
        WrongLogitsError: naming the pass.
    """
    backbone, images = workload.model.backbone, workload.images[:CHECKED]
    sets = torch.stack([workload.decisions[:CHECKED], workload.decisions[:CHECKED].roll(1, 0)])
    at_once = bdf.compile(backbone).run_sets(images, sets)
    for one, keep in enumerate(sets):
        reference = make_reference(backbone, images, keep, torch.float32)
        reference.check(f"rewards, set {one}", at_once[one])
        for active_only in (False, True):
            logits = backbone(images, keep, active_only=active_only)
            reference.check(f"pass with active_only={active_only}", logits)


def measure(case: str, batch: int, rounds: int) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds a step of each procedure, interleaved; kept blocks, thresholded and sampled."""
    network, decided = CASES[case]
    workload = make_workload(network, max(batch, CHECKED))
    check(workload)
    usage: list[float] = []
    steps = {
        name: make_step(workload.first(batch), config, decided, usage)
        for name, config in PROCEDURES.items()
    }
    # Two calls until the allocator has settled.
    return timing.interleave(steps, rounds=rounds, warmup=2), usage


@pytest.mark.parametrize("procedure", PROCEDURES)
@pytest.mark.parametrize("case", CASES)
def test_finetune_step(case, procedure, quick, once, report, benchmark):
    batch, rounds = (QUICK_BATCH, 3) if quick else (BATCH, 7)
    benchmark.group = f"finetuning step, {case}, batch {batch}"
    samples, usage = once(case, lambda: measure(case, batch, rounds))
    seconds = {name: timing.median(values) for name, values in samples.items()}
    steps = math.ceil(EPOCH_IMAGES / batch)
    report(
        samples[procedure],
        images_per_second=batch / seconds[procedure],
        epoch_seconds_scaled=steps * seconds[procedure],
        epoch_steps=steps,
        kept_thresholded=usage[0],
        kept_sampled=usage[1],
        speedup_over_authors=seconds["authors"] / seconds[procedure],
    )
