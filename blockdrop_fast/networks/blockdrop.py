"""The BlockDrop model: a backbone and the policy network that decides on its blocks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from blockdrop_fast.networks.policy import PolicyNetwork
from blockdrop_fast.networks.resnet import ResNet


class Output(NamedTuple):
    """What a BlockDrop model or engine returns.

    Attributes:
        logits: (B, num_classes).
        decisions: (B, K) bool, True = the block was kept.
    """

    logits: Tensor
    decisions: Tensor


class BlockDrop(nn.Module):
    """Backbone and policy network together (BlockDrop figure 2); ``compile`` makes it fast.

    Raises:
        ValueError: the policy decides on another number of blocks than the backbone has.
    """

    def __init__(self, backbone: ResNet, policy: PolicyNetwork):
        super().__init__()
        if policy.num_blocks != backbone.num_blocks:
            raise ValueError(
                f"policy: decides on {policy.num_blocks} blocks, "
                f"but the backbone has {backbone.num_blocks}"
            )
        self.backbone = backbone
        self.policy = policy

    def forward(self, images: Tensor, budget: float | None = None) -> Output:
        """(B, 3, H, W) normalised images -> logits at the policy's decisions.

        Args:
            budget: mean kept blocks, of a policy network with a menu; see ``PolicyNetwork.decide``.
        """
        decisions = self.policy.decide(images, budget)
        return Output(self.backbone(images, decisions), decisions)
