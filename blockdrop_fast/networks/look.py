"""A policy that looks at what the backbone computes anyway: after its first blocks, then decides.

A second network that looks at the image costs as much as several blocks. The first blocks of a
backbone run for nearly every image, and what they see serves a small head as well.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from blockdrop_fast.decisions import check_features
from blockdrop_fast.networks.menu import Menu
from blockdrop_fast.networks.policy import decisions_of, probabilities_of
from blockdrop_fast.networks.resnet import ResNetConfig, check_config

# Features are average-pooled to at most this height and width: a quarter of a CIFAR image's pixels.
SIZE = 16
WIDTHS = (32, 64)


class LookPolicy(nn.Module):
    """A small head on the backbone's features after block ``after``, which decides on the rest.

    3x3 convolutions of stride 2 with batch norm and ReLU, global average pooling, and a linear
    layer: on a CIFAR ResNet an eighth of the FLOPs of one block. Blocks 1 to ``after`` always run.

    Args:
        backbone: architecture of the backbone.
        after: block of the first segment behind which the head looks, 1-based.
        menu: the sets of blocks to choose from, as of ``PolicyNetwork``; None: decides on each
            block by itself.
        widths: channels of the convolutions.

    Attributes:
        num_blocks: K, the number of blocks of the backbone.
        channels: C, of the features.
        after, menu: as above.
        fc: the linear layer, with an output a set, or K.

    Raises:
        ValueError: no such block, or a menu that does not fit the backbone or drops a block that
            always runs.
    """

    def __init__(
        self,
        backbone: ResNetConfig,
        after: int,
        menu: Menu | None = None,
        widths: tuple[int, ...] = WIDTHS,
    ):
        super().__init__()
        check_config("backbone", backbone)
        if menu is not None and not isinstance(menu, Menu):
            raise TypeError(f"menu: expected a Menu, got {type(menu).__name__}")
        if not 1 <= after <= backbone.layers[0]:
            raise ValueError(
                f"after: expected a block of the first segment, 1 to {backbone.layers[0]}, "
                f"got {after}"
            )
        if menu is not None and menu.num_blocks != backbone.num_blocks:
            raise ValueError(
                f"menu: expected sets of {backbone.num_blocks} blocks, got {menu.num_blocks}"
            )
        if menu is not None and not menu.sets[:, :after].all():
            raise ValueError(
                f"menu: expected blocks 1 to {after}, after which the policy looks, in every set"
            )
        self.num_blocks = backbone.num_blocks
        self.channels = channels = backbone.channels[0]
        self.after = after
        self.menu = menu
        self.convs, self.bns = nn.ModuleList(), nn.ModuleList()
        for width in widths:
            self.convs.append(nn.Conv2d(channels, width, 3, 2, 1, bias=False))
            self.bns.append(nn.BatchNorm2d(width))
            nn.init.kaiming_normal_(self.convs[-1].weight, mode="fan_out", nonlinearity="relu")
            channels = width
        self.fc = nn.Linear(channels, self.num_blocks if menu is None else len(menu.sets))

    def logits_from(self, features: Tensor) -> Tensor:
        """(B, C, H, W) features after block ``after`` -> (B, K) logits of keeping each block.

        With a menu: (B, M) logits of being right with each of its sets.

        Raises:
            TypeError, ValueError: see ``blockdrop_fast.decisions.check_features``.
        """
        check_features(features, self.channels, self.fc.weight)
        x = pooled(features)
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = F.relu(bn(conv(x)))
        return self.fc(x.mean((2, 3)))

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) features -> (B, K) probabilities s of keeping each block.

        1 for blocks that always run, and with a menu as of ``PolicyNetwork``.
        """
        return probabilities_of(self.logits_from(features), self.menu, self.after)

    def decide(self, features: Tensor, budget: float | None = None) -> Tensor:
        """(B, C, H, W) features -> (B, K) bool decisions; otherwise as of ``PolicyNetwork``."""
        return decisions_of(self.logits_from(features), self.menu, budget, self.after)


def pooled(features: Tensor) -> Tensor:
    """(B, C, H, W) features, average-pooled to at most 16x16."""
    return F.adaptive_avg_pool2d(features, pooled_size(features.shape[2:]))


def pooled_size(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of features -> those of the pooled ones."""
    return min(size[0], SIZE), min(size[1], SIZE)
