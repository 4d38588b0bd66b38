"""Policy networks: an image -> which residual blocks to keep."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockdrop_fast.decisions import check_images, check_tensor
from blockdrop_fast.networks.menu import Menu
from blockdrop_fast.networks.resnet import ResNet, ResNetConfig


class PolicyNetwork(nn.Module):
    """A small ResNet with one output a block, and a sigmoid (BlockDrop section 3.2, eq. 2).

    Args:
        network: ResNet whose classifier has K outputs.
        input_pool: average pooling of the image by this factor first (1: none).
        menu: the sets of blocks to choose from; the classifier then has an output a set, and
            decisions can be had at any budget. None: decides on each block by itself.

    Attributes:
        after: 0, the block after which it looks: it looks at the image.

    Raises:
        TypeError: an argument of another type.
        ValueError: a pooling below 1, or a menu of another number of sets.
    """

    after = 0

    def __init__(self, network: ResNet, input_pool: int = 1, menu: Menu | None = None):
        super().__init__()
        if not isinstance(network, ResNet):
            raise TypeError(f"network: expected a ResNet, got {type(network).__name__}")
        if not isinstance(input_pool, int):
            raise TypeError(f"input_pool: expected an integer, got {input_pool!r}")
        if menu is not None and not isinstance(menu, Menu):
            raise TypeError(f"menu: expected a Menu, got {type(menu).__name__}")
        if input_pool < 1:
            raise ValueError(f"input_pool: expected at least 1, got {input_pool}")
        if menu is not None and len(menu.sets) != network.config.num_classes:
            raise ValueError(
                f"menu: expected {network.config.num_classes} sets, an output of the network "
                f"each, got {len(menu.sets)}"
            )
        self.network = network
        self.input_pool = input_pool
        self.menu = menu

    @property
    def num_blocks(self) -> int:
        """K, the number of blocks that this policy decides on."""
        return self.network.config.num_classes if self.menu is None else self.menu.num_blocks

    @property
    def fc(self) -> nn.Linear:
        """The last layer, an output a block or a set."""
        return self.network.fc

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images -> (B, K) logits of keeping each block.

        With a menu: (B, M) logits of being right with each of its sets.
        """
        if self.input_pool > 1:
            first = self.network.conv1
            check_images(
                images, channels=first.in_channels, size_multiple=1, dtype=first.weight.dtype
            )
            if min(images.shape[2:]) < self.input_pool:
                raise ValueError(
                    f"images: expected height and width of at least {self.input_pool}, "
                    f"got {images.shape[2]}x{images.shape[3]}"
                )
            images = F.avg_pool2d(images, self.input_pool)
        return self.network(images)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images -> (B, K) probabilities s of keeping each block.

        With a menu, whose choice is certain: 1 for the blocks of the chosen set, else 0.
        """
        return probabilities_of(self.logits(images), self.menu)

    def decide(self, images: Tensor, budget: float | None = None) -> Tensor:
        """(B, 3, H, W) normalised images -> (B, K) bool decisions.

        Args:
            budget: mean kept blocks, see ``Menu.choose``.

        Raises:
            ValueError: a budget of a policy network without a menu, or one that is out of reach.
        """
        return decisions_of(self.logits(images), self.menu, budget)


def decisions_of(
    logits: Tensor, menu: Menu | None, budget: float | None = None, always: int = 0
) -> Tensor:
    """A policy's decisions (B, K) from its logits.

    Args:
        logits, menu, budget: as of ``PolicyNetwork.logits`` and ``decide``.
        always: so many first blocks are kept whatever the logits say; a menu's sets contain them.
    """
    if menu is not None:
        return menu.choose(logits, budget)
    if budget is not None:
        raise ValueError(
            f"budget: this policy network decides at one usage only, expected none, got {budget}"
        )
    decisions = threshold(logits)
    if always:
        decisions[:, :always] = True
    return decisions


def probabilities_of(logits: Tensor, menu: Menu | None, always: int = 0) -> Tensor:
    """A policy's probabilities (B, K) of keeping each block; arguments as of ``decisions_of``."""
    if menu is not None:
        return menu.choose(logits).to(logits)
    probabilities = logits.sigmoid()
    if not always:
        return probabilities
    runs_anyway = torch.arange(logits.shape[1], device=logits.device) < always
    return probabilities.masked_fill(runs_anyway, 1)


def threshold(logits: Tensor) -> Tensor:
    """Decisions from a policy network's logits: keep where the logit is >= 0, i.e. s >= 0.5.

    The authors' code; the paper writes > 0.5. By the logit, as sigmoids are rounded: at 16 bits
    those from -0.004 on are 0.5.
    """
    return logits >= 0


def decide(probabilities: Tensor) -> Tensor:
    """``threshold`` for who has probabilities s only: keep where s >= 0.5.

    Raises:
        TypeError: no dense tensor of a floating-point dtype.
    """
    check_tensor("probabilities", probabilities, None)
    if not probabilities.is_floating_point():
        raise TypeError(
            f"probabilities: expected a floating-point dtype, got {probabilities.dtype}"
        )
    return probabilities >= 0.5


def policy_resnet8(num_blocks: int) -> PolicyNetwork:
    """The CIFAR policy network: ResNet-8 on the full image, average-pooling shortcuts."""
    config = ResNetConfig("basic", (1, 1, 1), (16, 32, 64), "cifar", "average_pool", num_blocks)
    return PolicyNetwork(ResNet(config))


def policy_resnet10(num_blocks: int) -> PolicyNetwork:
    """The ImageNet policy network: ResNet-10 on the image average-pooled by 2."""
    config = ResNetConfig(
        "basic", (1, 1, 1, 1), (64, 128, 256, 512), "imagenet", "projection", num_blocks
    )
    return PolicyNetwork(ResNet(config), input_pool=2)
