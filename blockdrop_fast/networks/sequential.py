"""A sequential policy: a gate before every block, which looks at the block's input."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockdrop_fast.networks.gated import GatedPolicy, Output, block_runner, pooled
from blockdrop_fast.networks.policy import threshold
from blockdrop_fast.networks.resnet import ResNet, ResNetConfig


class SequentialPolicy(GatedPolicy):
    """BlockDrop-seq (BlockDrop section 4.2 and supplement): decides on each block when it is due.

    A linear gate on the block's input, averaged over pixels, gives the logit of keeping the block.
    The paper's softmax over two outputs is the same with the difference of their weights.

    Args:
        backbone: architecture of the backbone.

    Attributes:
        gates: K linear layers, from the channels of a block's input to 1.
    """

    def __init__(self, backbone: ResNetConfig):
        super().__init__(backbone)
        self.gates = nn.ModuleList(
            nn.Linear(channels, 1) for channels, _ in backbone.block_channels
        )

    def run(self, backbone: ResNet, images: Tensor) -> Output:
        """(B, 3, H, W) images -> logits (B, num_classes) and decisions (B, K) bool."""
        logits, decisions, _ = self.run_with(backbone, images, lambda _, logit: threshold(logit))
        return Output(logits, decisions)

    def run_with(
        self,
        backbone: ResNet,
        images: Tensor,
        choose: Callable[[int, Tensor], Tensor],
        *,
        forced: int = 0,
        copies: int = 1,
        active_only: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One differentiable run at decisions that are chosen on the way.

        Args:
            backbone, images: as of ``run``.
            choose: (k, the (N,) logits of keeping block k, counted from 0) -> (N,) bool.
            forced: so many first blocks are kept, whatever the gates say.
            copies: each image goes on so many times behind those, which run once.
            active_only: see ``ResNet.forward``.

        Returns:
            (N, num_classes) logits, (N, K) bool decisions, (N, K) logits of the gates; N is B times
            ``copies``, all images of one copy in a row. Gradients reach the backbone through the
            last of these, too.
        """
        run = block_runner(active_only)
        x, decisions, gate_logits = backbone.stem(images), [], []
        for k, (block, shortcut) in enumerate(backbone.blocks()):
            if k == forced:
                x = torch.cat([x] * copies)
            logit = self.gates[k](pooled(x)).squeeze(1)
            if k < forced:
                x = F.relu(shortcut(x) + block(x))
                logit = logit.repeat(copies)
                keep = torch.ones_like(logit, dtype=torch.bool)
            else:
                keep = choose(k, logit)
                x = run(block, shortcut, x, keep)
            decisions.append(keep)
            gate_logits.append(logit)
        logits = backbone.classifier(x)
        if forced == self.num_blocks:
            logits = logits.repeat(copies, 1)
        return logits, torch.stack(decisions, 1), torch.stack(gate_logits, 1)
