"""A network frozen for execution: batch norm folded into its convolutions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockdrop_fast.networks.look import LookPolicy
from blockdrop_fast.networks.resnet import ProjectionShortcut, ResNet, ResNetConfig


@dataclass(frozen=True)
class FoldedConv:
    """A convolution with its batch norm folded in.

    Attributes:
        weight: (C_out, C_in / groups, kh, kw), channels-last.
        bias: (C_out,).
        stride, padding, groups: as of ``torch.nn.functional.conv2d``.
    """

    weight: Tensor
    bias: Tensor
    stride: int
    padding: int
    groups: int = 1


@dataclass(frozen=True)
class FoldedBlock:
    """One residual block.

    Attributes:
        convs: the convolutions of F_k, a ReLU between each two.
        shortcut: None (identity), a FoldedConv (projection), or a module without parameters.
    """

    convs: tuple[FoldedConv, ...]
    shortcut: FoldedConv | nn.Module | None


@dataclass(frozen=True)
class FoldedNetwork:
    """A ResNet with folded batch norm; a copy, that later training does not reach.

    Attributes:
        config: the architecture.
        stem: the first convolution (ReLU, and max pooling for ImageNet, follow).
        blocks: the K residual blocks in order.
        fc_weight: (num_classes, C).
        fc_bias: (num_classes,).
    """

    config: ResNetConfig
    stem: FoldedConv
    blocks: tuple[FoldedBlock, ...]
    fc_weight: Tensor
    fc_bias: Tensor


@dataclass(frozen=True)
class FoldedHead:
    """The head of a ``LookPolicy`` with folded batch norm; a copy, as ``FoldedNetwork``.

    Attributes:
        after: the block behind which it looks, 1-based.
        convs: its convolutions, a ReLU after each.
        fc_weight: (M or K, C).
        fc_bias: (M or K,).
    """

    after: int
    convs: tuple[FoldedConv, ...]
    fc_weight: Tensor
    fc_bias: Tensor


def fold_conv(conv: nn.Conv2d, bn: nn.BatchNorm2d, dtype: torch.dtype) -> FoldedConv:
    """Fold batch norm in eval mode into the convolution before it.

    ``gamma * (conv(x) - mean) / sqrt(var + eps) + beta`` is a convolution again; it is computed
    in float64 and rounded once, to ``dtype``.
    """
    scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
    weight = conv.weight.double() * scale[:, None, None, None]
    bias = bn.bias.double() - bn.running_mean.double() * scale
    return FoldedConv(
        weight.to(dtype).contiguous(memory_format=torch.channels_last),
        bias.to(dtype),
        conv.stride[0],
        conv.padding[0],
        conv.groups,
    )


@torch.no_grad()
def fold_network(network: ResNet, dtype: torch.dtype) -> FoldedNetwork:
    """Copy ``network`` with every batch norm folded into the convolution before it."""
    blocks = []
    for block, shortcut in network.blocks():
        convs = [fold_conv(block.conv1, block.bn1, dtype), fold_conv(block.conv2, block.bn2, dtype)]
        if network.config.block == "bottleneck":
            convs.append(fold_conv(block.conv3, block.bn3, dtype))
        if isinstance(shortcut, nn.Identity):
            shortcut = None
        elif isinstance(shortcut, ProjectionShortcut):
            shortcut = fold_conv(shortcut.conv, shortcut.bn, dtype)
        blocks.append(FoldedBlock(tuple(convs), shortcut))
    return FoldedNetwork(
        config=network.config,
        stem=fold_conv(network.conv1, network.bn1, dtype),
        blocks=tuple(blocks),
        fc_weight=network.fc.weight.detach().to(dtype, copy=True),
        fc_bias=network.fc.bias.detach().to(dtype, copy=True),
    )


@torch.no_grad()
def fold_head(policy: LookPolicy, dtype: torch.dtype) -> FoldedHead:
    """Copy a policy's head with every batch norm folded into the convolution before it."""
    convs = (fold_conv(*pair, dtype) for pair in zip(policy.convs, policy.bns, strict=True))
    return FoldedHead(
        after=policy.after,
        convs=tuple(convs),
        fc_weight=policy.fc.weight.detach().to(dtype, copy=True),
        fc_bias=policy.fc.bias.detach().to(dtype, copy=True),
    )
