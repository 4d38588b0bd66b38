"""Policies that decide on the way: an image's features say which blocks it runs next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from blockdrop_fast.networks.resnet import (
    ResNet,
    ResNetConfig,
    active_block,
    check_config,
    masked_block,
)


class Output(NamedTuple):
    """What a BlockDrop model or engine returns.

    Attributes:
        logits: (B, num_classes).
        decisions: (B, K) bool, True = the block was kept.
    """

    logits: Tensor
    decisions: Tensor


class GatedPolicy(nn.Module, ABC):
    """A policy whose gates are in the backbone, and need what it computes for the image at hand.

    Unlike a ``PolicyNetwork`` it cannot decide by itself: deciding is running.

    Args:
        backbone: architecture of the backbone.

    Attributes:
        backbone: as above.
        after, menu: 0 and None; see ``PolicyNetwork``.
    """

    after = 0
    menu = None

    def __init__(self, backbone: ResNetConfig):
        super().__init__()
        check_config("backbone", backbone)
        self.backbone = backbone

    @property
    def num_blocks(self) -> int:
        """K."""
        return self.backbone.num_blocks

    def check_backbone(self, config: ResNetConfig) -> None:
        """Raise ValueError unless the gates fit a backbone: those look at its features."""
        for what in ("layers", "channels", "stem"):
            expected, got = getattr(self.backbone, what), getattr(config, what)
            if got != expected:
                raise ValueError(
                    f"policy: its gates are for a backbone of {what} {expected}, got {got}"
                )

    @abstractmethod
    def run(self, backbone: ResNet, images: Tensor) -> Output:
        """Decide and run: the reference of every execution.

        Args:
            backbone: of the policy's architecture.
            images: (B, 3, H, W) normalised.

        Returns:
            ``Output``, or more under the same names.
        """

    def replay(self, backbone: ResNet, images: Tensor, output: Output) -> Tensor:
        """(B, 3, H, W) images -> (B, num_classes), the logits at what ``run`` decided, given again.

        Args:
            output: of ``run``, or of another execution; its logits are not read.
        """
        return backbone(images, output.decisions)


class PixelOutput(NamedTuple):
    """What a model returns whose gates decide for every pixel.

    Attributes:
        logits: (B, num_classes).
        decisions: (B, K) bool, True = the block was computed for some pixel of the image.
        densities: (B, K), the share of pixels for which a block's last convolution was.
        flops: (B,) float64, counted from the masks, gates included; 2 x multiply-adds.
    """

    logits: Tensor
    decisions: Tensor
    densities: Tensor
    flops: Tensor


class PixelGates(GatedPolicy):
    """Gates that decide for every pixel. Their references compute all and mask it, and count FLOPs.

    No time is saved so; what is left for an engine are blocks that no pixel of an image needs:
    decisions, which ``compile(model.backbone)`` runs. Replaying needs more than them.
    """

    @abstractmethod
    def run(self, backbone: ResNet, images: Tensor) -> PixelOutput:
        """As of ``GatedPolicy``."""

    def replay(self, backbone: ResNet, images: Tensor, output: Output) -> Tensor:
        raise TypeError("policy: decisions for blocks do not say which pixels were computed")


def block_runner(active_only: bool) -> Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]:
    """How one block is run for the images that keep it; see ``ResNet.forward``."""
    return active_block if active_only else masked_block


def pooled(x: Tensor) -> Tensor:
    """(B, C, H, W) features -> (B, C), their means over pixels: what gates see."""
    return x.mean((2, 3))
