"""Batches cut into slices on a CPU, where a layer's activations would not stay in the process.

Block-major execution holds a layer's activations of the whole batch. Freed memory goes back to the
system beyond what the C library keeps, and is faulted in again for the next layer, zeroed page by
page: measured, that is half of a ResNet-101's time at batch 64 (docs/architecture.md). A slice that
is smaller than it has to be costs next to nothing, as convolutions of large images are as fast for
few of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from blockdrop_fast.networks.folding import FoldedConv, FoldedNetwork

# The C library (glibc) maps allocations from a size on apart from its heap, and returns what is
# free at the heap's end beyond twice that size. Both limits grow as programs need, the size up to
# this (M_MMAP_THRESHOLD and M_TRIM_THRESHOLD in mallopt(3)).
LARGEST_IN_HEAP = 32 << 20
# Bytes of activations that a slice may hold at a time.
BUDGET = 2 * LARGEST_IN_HEAP


class Slices:
    """How a network's batches are cut.

    Args:
        network: folded, of any architecture.
        budget: bytes of activations that a slice may hold at a time.
    """

    def __init__(self, network: FoldedNetwork, budget: int = BUDGET):
        self._budget = budget
        self._bytes = cache(lambda height, width: live_bytes(network, height, width))

    def run(self, call: Callable, images: Tensor, *others: Tensor, rows: int = 1):
        """What ``call(images, *others)`` gives, slice by slice.

        A slice has an image a thread, if need be over budget: threads share out fewer less well.

        Args:
            call: gives a tensor, or a tuple of them, with a row an image.
            images: (B, 3, H, W); on a GPU they stay together.
            others: (B, ...) each.
            rows: of activations an image.
        """
        batch = len(images)
        if batch <= 1 or images.is_cuda:
            return call(images, *others)
        most = self._budget // (rows * self._bytes(*images.shape[2:]))
        count = -(-batch // max(most, torch.get_num_threads()))
        if count == 1:
            return call(images, *others)
        _raise_limits()
        # Slices of one size, or one image less.
        parts = zip(*(one.tensor_split(count) for one in (images, *others)), strict=True)
        results = [call(*part) for part in parts]
        if isinstance(results[0], Tensor):
            return torch.cat(results)
        return tuple(map(torch.cat, zip(*results, strict=True)))


@cache
def _raise_limits() -> None:
    """Bring the C library's limits to where they end: they follow what is freed."""
    torch.empty(LARGEST_IN_HEAP - (1 << 16), dtype=torch.uint8)  # never touched: no memory


def live_bytes(network: FoldedNetwork, height: int, width: int) -> int:
    """At most so many bytes of an image's activations are alive at a time when blocks are gathered.

    A block's are its input, its shortcut, gathered copies of both, and what its convolutions give.
    """

    def convolve(conv: FoldedConv, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """Values, height and width."""
        padded = 2 * conv.padding - conv.weight.shape[2]
        height, width = ((length + padded) // conv.stride + 1 for length in size)
        return conv.weight.shape[0] * height * width, (height, width)

    values, size = convolve(network.stem, (height, width))
    most = 3 * height * width + values
    if network.config.stem == "imagenet":
        size = tuple((length - 1) // 2 + 1 for length in size)  # max pooling
        most += len(network.stem.weight) * size[0] * size[1]
    channels = len(network.stem.weight)
    for block in network.blocks:
        entering = channels * size[0] * size[1]
        inside = 0
        for conv in block.convs:
            values, size = convolve(conv, size)
            inside += values
        shortcut = 0 if block.shortcut is None else values
        most = max(most, 2 * (entering + shortcut) + inside)
        channels = len(block.convs[-1].weight)
    return most * network.stem.weight.element_size()
