"""Decisions of your own: of a heuristic, of a rule, of several methods at once.

    python -m examples.own_decisions

Decisions are a (B, K) tensor, 1 = keep, 0 = drop, for B images and K residual blocks; the engine
does not ask where they come from. docs/other-methods.md says what other methods decide.
"""

from __future__ import annotations

import torch
from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.data.batches import batches_of, load_digits
from blockdrop_fast.measure.tolerance import make_reference


def stop_early(images: Tensor, num_blocks: int) -> Tensor:
    """An example of a rule: the more ink in an image, the later it stops."""
    ink = images.mean((1, 2, 3))
    rank = ink.argsort().argsort()
    blocks = 1 + rank * num_blocks // len(images)
    return torch.arange(num_blocks) < blocks[:, None]


def main() -> None:
    backbone = bdf.load_backbone("resnet32-cifar10-jpeg").eval()  # or a file of yours
    engine = bdf.compile(backbone)
    num_blocks, segments = backbone.num_blocks, backbone.config.layers
    # Digits are not what this network was trained for; its logits have to be right all the same.
    batches = batches_of(load_digits().test, 64, normalization=backbone.normalization)
    images, _ = next(iter(batches))

    methods = {
        "a heuristic": bdf.heuristics.distribute_k(9, segments, len(images)),
        "a rule": stop_early(images, num_blocks),
        "at random": torch.rand(len(images), num_blocks) < 0.6,
    }
    for name, decisions in methods.items():
        logits = engine.run(images, decisions)
        check(backbone, images, decisions, name, logits)

    # All at once: what an image's decisions have in common from the first block on runs once.
    all_logits = engine.run_sets(images, torch.stack(list(methods.values())))
    for (name, decisions), logits in zip(methods.items(), all_logits, strict=True):
        check(backbone, images, decisions, f"{name}, in one call", logits)


def check(backbone: bdf.ResNet, images: Tensor, decisions: Tensor, name: str, logits: Tensor):
    """Compare with the float64 network: it computes every block, and drops the results."""
    reference = make_reference(backbone, images, decisions, logits.dtype)
    reference.check(name, logits)
    error = float((logits - reference.logits).abs().max())
    kept = float(decisions.float().sum(1).mean())
    print(f"{name}: {kept:.1f} of {decisions.shape[1]} blocks, logits off by {error:.1e} at most")


if __name__ == "__main__":
    main()
