"""Looking, then deciding: the first blocks of a backbone, and the head on what they give."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from blockdrop_fast.executors.layers import Conv, Layers
from blockdrop_fast.networks.folding import FoldedHead, FoldedNetwork
from blockdrop_fast.networks.look import pooled


class Look:
    """Runs what a ``LookPolicy`` decides by; any executor runs the rest.

    Args:
        network: the folded backbone.
        head: of the policy.

    Attributes:
        after: the block behind which the head looks.
    """

    def __init__(self, network: FoldedNetwork, head: FoldedHead):
        self.after = head.after
        self._layers = Layers(replace(network, blocks=network.blocks[: head.after]))
        self._convs = [Conv(conv) for conv in head.convs]
        self._head = head

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, C, H', W') channels-last, of block ``after``; B at least 1."""
        x = self._layers.stem(images)
        for block in self._layers.blocks:
            x = block.kept(x, block.shortcut(x))
        return x

    def logits(self, features: Tensor) -> Tensor:
        """(B, C, H', W') features, which stay as they are -> (B, M or K) logits of the policy."""
        x = pooled(features)
        for conv in self._convs:
            x = conv.relu(x)
        return F.linear(x.mean((2, 3)), self._head.fc_weight, self._head.fc_bias)
