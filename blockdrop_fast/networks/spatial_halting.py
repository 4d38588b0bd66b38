"""Spatial halting: every position of an image leaves a segment for itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockdrop_fast.networks.flops import block_flops, fixed_flops
from blockdrop_fast.networks.gated import PixelGates, PixelOutput, pooled
from blockdrop_fast.networks.halting import BIAS, EPSILON
from blockdrop_fast.networks.resnet import ResNet, ResNetConfig


class PonderedOutput(NamedTuple):
    """What ``SpatialHaltingPolicy.run_with`` gives, for training.

    Attributes:
        output: as of ``run``.
        ponder: (B,), blocks that ran and the remainder, summed over segments, of the mean position;
            gradients are those of the remainder.
    """

    output: PixelOutput
    ponder: Tensor


class SpatialHead(nn.Module):
    """The logit of halting at each position, by what is around it and by the whole image.

    Args:
        channels: C of the features.
        bias: of the logit.
    """

    def __init__(self, channels: int, bias: float):
        super().__init__()
        self.local = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, 1, 3, padding=1))
        self.whole = nn.Sequential(nn.BatchNorm1d(channels), nn.Linear(channels, 1, bias=False))
        nn.init.normal_(self.local[1].weight, std=0.01)
        nn.init.constant_(self.local[1].bias, bias)
        nn.init.normal_(self.whole[1].weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1, H, W)."""
        return self.local(x) + self.whole(pooled(x))[:, :, None, None]


class SpatialHaltingPolicy(PixelGates):
    """Spatially adaptive computation time (Figurnov et al. 2017, section 3.2).

    ``HaltingPolicy`` at each position of its own. Blocks behind the one where a position halts
    leave it as it is; the first block of a segment always runs everywhere. FLOPs: convolutions
    count at positions that run, the first one of a block also beside them, heads where they are
    asked.

    Args:
        backbone: architecture of the backbone.
        epsilon, bias: see ``HaltingPolicy``.

    Attributes:
        heads: K heads; none for the last block of a segment.

    Raises:
        ValueError: an epsilon outside of 0…1.
    """

    def __init__(self, backbone: ResNetConfig, epsilon: float = EPSILON, bias: float = BIAS):
        super().__init__(backbone)
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon: expected between 0 and 1, got {epsilon}")
        self.epsilon = epsilon
        self.heads = nn.ModuleList()
        for layers, channels in zip(backbone.layers, backbone.channels, strict=True):
            self.heads.extend(SpatialHead(channels, bias) for _ in range(layers - 1))
            self.heads.append(nn.Identity())

    @torch.no_grad()
    def run(self, backbone: ResNet, images: Tensor) -> PixelOutput:
        """(B, 3, H, W) images -> ``PixelOutput``."""
        return self.run_with(backbone, images).output

    def run_with(self, backbone: ResNet, images: Tensor) -> PonderedOutput:
        """``run``, differentiable, and the ponder cost."""
        x, heads = backbone.stem(images), iter(self.heads)
        size = tuple(images.shape[2:])
        fixed, whole = fixed_flops(backbone, size), block_flops(backbone, size).tolist()
        flops = torch.full((len(images),), fixed, dtype=torch.float64, device=images.device)
        ponder = x.new_zeros(len(images))
        decisions, densities = [], []
        for segment, shortcut in zip(backbone.segments, backbone.shortcuts, strict=True):
            mean: Tensor | float = 0.0
            total, running = None, None
            for index, block in enumerate(segment):
                if index == 0:
                    x = F.relu(shortcut(x) + block(x))
                    flops = flops + whole[len(decisions)]
                    total = torch.zeros_like(x[:, :1])
                    running = torch.ones_like(total, dtype=torch.bool)
                else:
                    x = torch.where(running, F.relu(x + block(x)), x)
                    flops = flops + _block_flops(block, running)
                head, last = next(heads), index == len(segment) - 1
                score = torch.ones_like(total) if last else head(x).sigmoid()
                if not last:
                    flops = flops + _head_flops(head, running)
                halts = torch.ones_like(running) if last else total + score >= 1 - self.epsilon
                weight = torch.where(running, torch.where(halts, 1 - total, score), 0)
                mean = mean + weight * x
                remainder = torch.where(running & halts, weight, 0)
                ponder = ponder + (running + remainder).mean((1, 2, 3))
                decisions.append(running.flatten(1).any(1))
                densities.append(running.float().mean((1, 2, 3)))
                total = total + torch.where(running, score, 0)
                running = running & ~halts
            x = mean
        output = PixelOutput(
            backbone.classifier(x), torch.stack(decisions, 1), torch.stack(densities, 1), flops
        )
        return PonderedOutput(output, ponder)


def _block_flops(block: nn.Module, running: Tensor) -> Tensor:
    """(B,) float64, of a block without stride at (B, 1, H, W) positions, the first convolution
    also beside them."""
    first, *others = (conv for conv in block.children() if isinstance(conv, nn.Conv2d))
    beside = F.max_pool2d(running.float(), 3, 1, 1)
    inner = sum(conv.weight.numel() for conv in others)
    return 2 * (first.weight.numel() * _count(beside) + inner * _count(running))


def _head_flops(head: SpatialHead, running: Tensor) -> Tensor:
    """(B,) float64, of a head at (B, 1, H, W) positions."""
    some = running.flatten(1).any(1)
    local, whole = head.local[1].weight.numel(), head.whole[1].weight.numel()
    return 2 * (local * _count(running) + whole * some)


def _count(mask: Tensor) -> Tensor:
    """(B,) float64, the positions of a (B, 1, H, W) mask."""
    return mask.sum((1, 2, 3), dtype=torch.float64)
