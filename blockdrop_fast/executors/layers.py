"""The arithmetic that block-major executors share: folded convolutions in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdrop_fast.folding import FoldedBlock, FoldedConv, FoldedNetwork


def conv(x: Tensor, folded: FoldedConv) -> Tensor:
    """Convolution with folded batch norm."""
    return F.conv2d(x, folded.weight, folded.bias, folded.stride, folded.padding)


def stem(network: FoldedNetwork, images: Tensor) -> Tensor:
    """(B, 3, H, W) images -> (B, C, H', W') channels-last input of block 1, freshly allocated."""
    x = conv(images.contiguous(memory_format=torch.channels_last), network.stem).relu_()
    return F.max_pool2d(x, 3, 2, 1) if network.config.stem == "imagenet" else x


def residual(block: FoldedBlock, x: Tensor) -> Tensor:
    """F_k(x), without shortcut and without the final ReLU; freshly allocated."""
    *first, last = block.convs
    for folded in first:
        x = conv(x, folded).relu_()
    return conv(x, last)


def shortcut(block: FoldedBlock, x: Tensor) -> Tensor:
    """What F_k(x) is added to; x itself where the shortcut is the identity."""
    if block.shortcut is None:
        return x
    if isinstance(block.shortcut, FoldedConv):
        return conv(x, block.shortcut)
    return block.shortcut(x).contiguous(memory_format=torch.channels_last)


def classifier(network: FoldedNetwork, x: Tensor) -> Tensor:
    """(B, C, H, W) output of block K -> (B, num_classes) logits."""
    return F.linear(x.mean((2, 3)), network.fc_weight, network.fc_bias)
