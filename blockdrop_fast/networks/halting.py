"""Halting: an image leaves a segment when it has been looked at for long enough."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from blockdrop_fast.decisions import check_decisions, check_weights
from blockdrop_fast.networks.gated import GatedPolicy, Output, block_runner, pooled
from blockdrop_fast.networks.resnet import ResNet, ResNetConfig, masked_block

EPSILON = 0.01
# Of a head's logit. Figurnov et al. take -3; on 18 blocks the last then has a weight of 0.19 only,
# and a trained backbone to which halting is added would be lost. At -6 it is 0.96.
BIAS = -6.0


class WeightedOutput(NamedTuple):
    """``Output`` of a model whose decisions alone do not say what it computed.

    Attributes:
        logits: (B, num_classes).
        decisions: (B, K) bool, True = the block was kept.
        weights: (B, K), of the kept blocks' outputs in what their segment gives; see
            ``run_weighted``.
    """

    logits: Tensor
    decisions: Tensor
    weights: Tensor


class HaltingPolicy(GatedPolicy):
    """Adaptive computation time (Figurnov et al. 2017, section 3.1), in each segment by itself.

    After block l of a segment a head gives a halting score h_l, a sigmoid of the block's output,
    averaged over pixels. An image leaves the segment after block N, where the sum of its scores
    reaches 1 - epsilon, or the last one; later blocks of the segment are dropped. The segment gives
    the mean of the outputs of blocks 1 to N, weighted by h_l, and the last of them by what is left
    to 1, the remainder. The first block of a segment always runs.

    Args:
        backbone: architecture of the backbone.
        hard: the segment gives block N's output as it is ("ACT-hard"), so that decisions alone say
            what is computed. Gradients are still those of the weighted mean (straight-through).
        epsilon: as above, so that a single block can be enough.
        bias: of a new head's logit; low ones halt late.

    Attributes:
        heads: K heads, each batch norm and a linear layer on (B, C); none for the last block of a
            segment.

    Raises:
        ValueError: an epsilon outside of 0…1.
    """

    def __init__(
        self,
        backbone: ResNetConfig,
        hard: bool = False,
        epsilon: float = EPSILON,
        bias: float = BIAS,
    ):
        super().__init__(backbone)
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon: expected between 0 and 1, got {epsilon}")
        self.hard, self.epsilon = hard, epsilon
        self.heads = nn.ModuleList()
        for layers, channels in zip(backbone.layers, backbone.channels, strict=True):
            for _ in range(layers - 1):
                self.heads.append(nn.Sequential(nn.BatchNorm1d(channels), nn.Linear(channels, 1)))
                nn.init.normal_(self.heads[-1][1].weight, std=0.01)
                nn.init.constant_(self.heads[-1][1].bias, bias)
            self.heads.append(nn.Identity())

    def run(self, backbone: ResNet, images: Tensor) -> Output | WeightedOutput:
        """(B, 3, H, W) images -> logits, decisions, and unless ``hard`` the weights."""
        output = self.run_with(backbone, images)
        return Output(output.logits, output.decisions) if self.hard else output

    def run_with(
        self, backbone: ResNet, images: Tensor, *, active_only: bool = False
    ) -> WeightedOutput:
        """``run``, differentiable, with the weights in any case: the ponder cost needs them.

        Args:
            active_only: see ``ResNet.forward``.
        """
        run = block_runner(active_only)
        x, decisions, weights = backbone.stem(images), [], []
        heads, identity = iter(self.heads), nn.Identity()
        for segment, shortcut in zip(backbone.segments, backbone.shortcuts, strict=True):
            total = x.new_zeros(len(x))
            running = torch.ones(len(x), dtype=torch.bool, device=x.device)
            mean: Tensor | float = 0.0
            for index, block in enumerate(segment):
                x = run(block, identity if index else shortcut, x, running)
                head, last = next(heads), index == len(segment) - 1
                score = torch.ones_like(total) if last else head(pooled(x)).squeeze(1).sigmoid()
                halts = torch.ones_like(running) if last else total + score >= 1 - self.epsilon
                weight = torch.where(running, torch.where(halts, 1 - total, score), 0)
                mean = mean + weight[:, None, None, None] * x
                decisions.append(running)
                weights.append(weight)
                total = total + torch.where(running, score, 0)
                running = running & ~halts
            # 0 where a mean has overflowed that is not given.
            x = x + (mean - mean.detach()).nan_to_num(0.0) if self.hard else mean
        return WeightedOutput(
            backbone.classifier(x), torch.stack(decisions, 1), torch.stack(weights, 1)
        )

    def replay(self, backbone: ResNet, images: Tensor, output: Output | WeightedOutput) -> Tensor:
        """As of ``GatedPolicy``."""
        if self.hard:
            return super().replay(backbone, images, output)
        return run_weighted(backbone, images, output.decisions, output.weights)


def run_weighted(backbone: ResNet, images: Tensor, decisions: Tensor, weights: Tensor) -> Tensor:
    """Run given decisions and weights: what replays a ``HaltingPolicy``.

    A segment of which an image keeps blocks gives the sum of their outputs, each times its weight;
    one of which it keeps none gives what it was given.

    Args:
        backbone: any.
        images: (B, 3, H, W) normalised.
        decisions: (B, K) bool, 1 = keep.
        weights: (B, K) of any floating-point dtype, not read where a block is dropped.

    Returns:
        (B, num_classes) logits.

    Raises:
        TypeError, ValueError: see ``blockdrop_fast.decisions``.
    """
    x, k = backbone.stem(images), 0
    decisions = check_decisions(
        decisions, batch=len(images), num_blocks=backbone.num_blocks, device=images.device
    )
    check_weights(weights, decisions=decisions, device=images.device)
    for segment, shortcut in zip(backbone.segments, backbone.shortcuts, strict=True):
        mean: Tensor | float = 0.0
        for index, block in enumerate(segment):
            keep = decisions[:, k]
            x = masked_block(block, nn.Identity() if index else shortcut, x, keep)
            weight = torch.where(keep, weights[:, k], 0)
            mean = mean + weight[:, None, None, None] * x
            k += 1
        some = decisions[:, k - len(segment) : k].any(1)
        x = torch.where(some[:, None, None, None], mean, x).to(images.dtype)
    return backbone.classifier(x)
