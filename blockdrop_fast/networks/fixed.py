"""A policy that does not look: one set of blocks for all images, what any other has to beat."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blockdrop_fast.decisions import check_tensor
from blockdrop_fast.networks.policy import decisions_of, probabilities_of


class FixedPolicy(nn.Module):
    """Keeps the same blocks whatever the image is, at no cost.

    Args:
        keep: (K,) bool, 1 = keep.

    Attributes:
        keep: as above, a buffer.
        after, menu: 0 and None; see ``PolicyNetwork``.

    Raises:
        TypeError: not a dense tensor.
        ValueError: no such set.
    """

    after = 0
    menu = None

    def __init__(self, keep: Tensor):
        super().__init__()
        check_tensor("keep", keep, None)
        if keep.ndim != 1 or keep.dtype != torch.bool or len(keep) == 0:
            raise ValueError(
                f"keep: expected shape (K,) bool, got {tuple(keep.shape)} {keep.dtype}"
            )
        self.register_buffer("keep", keep.clone())

    @property
    def num_blocks(self) -> int:
        """K."""
        return len(self.keep)

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, K): 1 for blocks that are kept, -1 for others.

        Raises:
            TypeError, ValueError: see ``blockdrop_fast.decisions.check_tensor``, or images of
                another shape or dtype.
        """
        check_tensor("images", images, self.keep.device)
        if images.ndim != 4:
            raise ValueError(f"images: expected shape (B, 3, H, W), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images: expected a floating-point dtype, got {images.dtype}")
        return (self.keep.to(images.dtype) * 2 - 1).expand(len(images), -1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, K) probabilities; only their threshold means anything."""
        return probabilities_of(self.logits(images), None)

    def decide(self, images: Tensor, budget: float | None = None) -> Tensor:
        """(B, 3, H, W) images -> (B, K) bool decisions; no budget can be asked for."""
        return decisions_of(self.logits(images), None, budget)
