"""Low-cost collaborative layers: a cheap convolution beside each says where it is needed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockdrop_fast.networks.flops import fixed_flops
from blockdrop_fast.networks.gated import PixelGates, PixelOutput
from blockdrop_fast.networks.resnet import ResNet, ResNetConfig


class LowCostMasks(PixelGates):
    """Masks of the convolutions in blocks (Dong et al. 2017).

    A 1x1 convolution to one channel beside each 3x3 convolution sees its input. Clamped to 0…1 it
    is the mask: what the convolution and its batch norm give is multiplied by it, and needs no
    computing where it is 0. Where the last mask of a block is 0 for all pixels, so is F_k(x): the
    block is dropped.

    New masks are 1 everywhere: a trained backbone stays what it is. The clamp is of the authors'
    variant v1; otherwise they have batch norm and ReLU, by which no mask is 1 or 0 throughout, and
    without batch norm a ReLU's products grow without bounds.

    Args:
        backbone: architecture of the backbone, of basic blocks.

    Attributes:
        masks: 2 K convolutions, of the first and the second one of each block.

    Raises:
        ValueError: other blocks.
    """

    def __init__(self, backbone: ResNetConfig):
        super().__init__(backbone)
        if backbone.block != "basic":
            raise ValueError(f"backbone: expected basic blocks, got {backbone.block} ones")
        self.masks = nn.ModuleList()
        inputs = [channels for channels, _ in backbone.block_channels]
        strided = {sum(backbone.layers[:segment]) for segment in range(1, len(backbone.layers))}
        for k, (channels, width) in enumerate(zip(inputs, backbone.inner_widths, strict=True)):
            stride = 2 if k in strided else 1
            self.masks.extend([nn.Conv2d(channels, 1, 1, stride), nn.Conv2d(width, 1, 1)])
        for mask in self.masks:
            nn.init.zeros_(mask.weight)
            nn.init.ones_(mask.bias)

    def check_backbone(self, config: ResNetConfig) -> None:
        """As of ``GatedPolicy``; masks also see what is inside of blocks."""
        super().check_backbone(config)
        if config.inner_widths != self.backbone.inner_widths:
            raise ValueError(
                f"policy: its masks are for blocks of widths {self.backbone.inner_widths}, "
                f"got {config.inner_widths}"
            )

    @torch.no_grad()
    def run(self, backbone: ResNet, images: Tensor) -> PixelOutput:
        """(B, 3, H, W) images -> ``PixelOutput``."""
        return self.run_with(backbone, images)

    def run_with(self, backbone: ResNet, images: Tensor) -> PixelOutput:
        """``run``, differentiable, also FLOPs: as if masks that are not clamped yet were counts."""
        x, masks = backbone.stem(images), iter(self.masks)
        fixed = fixed_flops(backbone, tuple(images.shape[2:]))
        flops = torch.full((len(images),), fixed, dtype=torch.float64, device=images.device)
        decisions, densities = [], []
        for block, shortcut in backbone.blocks():
            first, second = next(masks), next(masks)
            wanted = first(x)
            hidden = F.relu(block.bn1(block.conv1(x)) * wanted.clamp(0, 1))
            flops = flops + _flops(block.conv1, first, wanted)
            wanted = second(hidden)
            flops = flops + _flops(block.conv2, second, wanted)
            keep = (wanted > 0).flatten(1).any(1)
            residual = shortcut(x)
            kept = F.relu(residual + block.bn2(block.conv2(hidden)) * wanted.clamp(0, 1))
            x = torch.where(keep[:, None, None, None], kept, residual)
            decisions.append(keep)
            densities.append((wanted > 0).float().mean((1, 2, 3)))
        logits = backbone.classifier(x)
        return PixelOutput(logits, torch.stack(decisions, 1), torch.stack(densities, 1), flops)


def _flops(conv: nn.Conv2d, mask: nn.Conv2d, wanted: Tensor) -> Tensor:
    """(B,) float64: of a convolution where it is wanted, and of its mask everywhere.

    Args:
        wanted: (B, 1, H, W), the mask, not clamped yet.
    """
    soft = wanted.double().clamp(min=0)
    pixels = ((wanted > 0) + (soft - soft.detach())).sum((1, 2, 3))
    return 2 * (conv.weight.numel() * pixels + mask.weight.numel() * wanted.shape[1:].numel())
