"""Decisions with the block usage that the paper publishes, for benchmarks.

The paper's trained policies are not to be had for every network, and random weights decide
nothing like them; time depends on how many blocks an image keeps and on how alike the images'
policies are, so both are drawn to match what is published. Drawn with Python's own generator,
whose stream is the same on every machine and version.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class PublishedUsage:
    """What is published of a trained policy network, and how a sample of it is drawn.

    Attributes:
        num_blocks: K.
        mean, std: block usage of an image (BlockDrop tables 3 and 4, with the policy's gamma).
        policies: number of different policies in the pool.
        agreement: how much policies agree on which blocks to keep; 0 not at all. An assumption.
        seed: of the draw; the first one whose 1,024 images have the mean and standard deviation
            to within 0.05, and the first 64 of them the mean to within 0.1.
    """

    num_blocks: int
    mean: float
    std: float
    policies: int
    agreement: float
    seed: int


PUBLISHED = {
    # gamma = 5. The number of policies is not published: an assumption.
    "resnet32": PublishedUsage(15, 6.9, 1.6, policies=100, agreement=2.0, seed=37),
    # gamma = 10; 469 policies over the 10,000 test images.
    "resnet110": PublishedUsage(54, 16.9, 3.7, policies=469, agreement=2.0, seed=310),
    # gamma = 5; only ten policies over the 50,000 validation images.
    "resnet101": PublishedUsage(33, 24.8, 1.0, policies=10, agreement=4.0, seed=69),
}
IMAGES = 1024


def published_decisions(network: str) -> Tensor:
    """(1024, K) bool decisions at the published usage of "resnet32", "resnet110" or "resnet101".

    Raises:
        ValueError: no usage is published for this network.
    """
    usage = _published(network)
    return draw(usage, usage.seed)


def scaled_decisions(network: str, num_blocks: int) -> Tensor:
    """(1024, num_blocks) bool: of a network of which no usage is published, an assumption.

    Images keep about the share of the blocks that they keep of ``network``, by as many policies.

    Raises:
        ValueError: as of ``published_decisions``.
    """
    usage = _published(network)
    scale = num_blocks / usage.num_blocks
    scaled = replace(usage, num_blocks=num_blocks, mean=scale * usage.mean, std=scale * usage.std)
    return draw(scaled, usage.seed)


def _published(network: str) -> PublishedUsage:
    if network not in PUBLISHED:
        raise ValueError(f"network: expected one of {', '.join(PUBLISHED)}, got {network!r}")
    return PUBLISHED[network]


def draw(usage: PublishedUsage, seed: int) -> Tensor:
    """One sample: (1024, K) bool.

    Policies are drawn first: their usage from a normal distribution, their blocks without
    replacement in proportion to weights that all policies share. Then each image draws a policy,
    the policy of rank r being met in proportion to 1 / (r + 10).
    """
    generator = random.Random(seed)
    weights = [math.exp(generator.gauss(0, usage.agreement)) for _ in range(usage.num_blocks)]
    pool = []
    for _ in range(usage.policies):
        kept = min(max(round(generator.gauss(usage.mean, usage.std)), 0), usage.num_blocks)
        # Efraimidis and Spirakis: the largest u^(1/w) are a weighted sample.
        keys = [math.log(1 - generator.random()) / weight for weight in weights]
        chosen = set(sorted(range(usage.num_blocks), key=keys.__getitem__)[-kept:] if kept else [])
        pool.append([block in chosen for block in range(usage.num_blocks)])
    popularity = list(accumulate(1 / (rank + 10) for rank in range(usage.policies)))
    ranks = [bisect(popularity, generator.random() * popularity[-1]) for _ in range(IMAGES)]
    return torch.tensor([pool[rank] for rank in ranks])


def fits(usage: PublishedUsage, decisions: Tensor) -> bool:
    """Whether a sample has the published mean and standard deviation (see ``PublishedUsage``)."""
    kept = decisions.sum(1).double()
    return (
        abs(float(kept.mean()) - usage.mean) < 0.05
        and abs(float(kept.std()) - usage.std) < 0.05
        and abs(float(kept[:64].mean()) - usage.mean) < 0.1
    )
