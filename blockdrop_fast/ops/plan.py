"""The plan: all that an executor needs to know of a batch's decisions, computed once.

Kernels: ``csrc/cpu/plan.cpp``, ``csrc/cuda/plan.cu``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockdrop_fast.ops._library import define


def plan(decisions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn decisions into per-block lists of active images and an order of the images.

    Nothing here waits for the device: the counts stay on it.

    Args:
        decisions: (B, K) bool, True = the image keeps the block. B may be 0.

    Returns:
        indices: (K, B) int32. Row k lists the active images of block k in ascending order; the
            unused tail is -1.
        counts: (K,) int32, the number of active images of each block.
        order: (B,) int32, the images by descending block usage, equal ones in ascending order.

    Raises:
        TypeError: decisions are not a bool tensor.
        ValueError: decisions are not two-dimensional.
    """
    if not isinstance(decisions, Tensor):
        raise TypeError(f"decisions: expected a torch.Tensor, got {type(decisions).__name__}")
    _check(decisions)
    return torch.ops.blockdrop_fast.plan(decisions)


def plan_reference(decisions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What ``plan`` computes, in PyTorch operations; runs on any device."""
    _check(decisions)
    batch = decisions.shape[0]
    kept = decisions.t()  # (K, B)
    counts = kept.sum(dim=1, dtype=torch.int32)
    # A stable sort of "is dropped" brings the active images to the front, in ascending order.
    active_first = torch.argsort((~kept).to(torch.uint8), dim=1, stable=True)
    is_active = torch.arange(batch, device=decisions.device) < counts[:, None]
    indices = torch.where(is_active, active_first, -1).to(torch.int32)
    usage = decisions.sum(dim=1, dtype=torch.int32)
    order = torch.argsort(usage, descending=True, stable=True).to(torch.int32)
    return indices, counts, order


def _plan_fake(decisions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_blocks = decisions.shape
    return (
        decisions.new_empty((num_blocks, batch), dtype=torch.int32),
        decisions.new_empty((num_blocks,), dtype=torch.int32),
        decisions.new_empty((batch,), dtype=torch.int32),
    )


def _check(decisions: Tensor) -> None:
    if decisions.dtype != torch.bool:
        raise TypeError(f"decisions: expected dtype torch.bool, got {decisions.dtype}")
    if decisions.ndim != 2:
        raise ValueError(f"decisions: expected shape (B, K), got {tuple(decisions.shape)}")


define(
    "plan(Tensor decisions) -> (Tensor indices, Tensor counts, Tensor order)",
    plan_reference,
    _plan_fake,
    _check,
)
