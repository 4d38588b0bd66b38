"""Walk execution of ImageNet networks: image-major, each image along its own path."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

from blockdrop_fast.executors import Executor
from blockdrop_fast.networks.folding import FoldedConv, FoldedNetwork
from blockdrop_fast.ops.walk_imagenet import (
    STEM_CHANNELS,
    Description,
    pack_conv,
    walk_imagenet,
    walk_imagenet_policy,
)


class WalkImageNetExecutor(Executor):
    """Runs an ImageNet network of float32 on the CPU by the walk, and a policy network with it.

    Args:
        network: folded; basic or bottleneck blocks behind the ImageNet stem, without groups;
            shortcuts that change shape are projections; float32, on the CPU.
        compact: 3x3 convolutions stay in their plain form: ResNet-101 takes 178 MB instead of 235,
            and longer.
        is_policy: a policy network, whose last segment has few pixels: there 3x3 convolutions stay
            in their plain form, as to read Winograd's larger one takes longer than it saves.

    Raises:
        TypeError: weights of another dtype.
        ValueError: another architecture or device; the message says which part does not fit.
    """

    strategy = "walk"
    logits_dtype = torch.float32

    def __init__(self, network: FoldedNetwork, compact: bool = False, is_policy: bool = False):
        _check_network(network)
        self._num_blocks = network.config.num_blocks
        self._compact = compact
        self._network = pack(network, _winograd_segments(network, compact, is_policy))
        self._policy: tuple | None = None

    def run(self, images: Tensor, decisions: Tensor) -> Tensor:
        return walk_imagenet(images, decisions, *self._network)

    run_sets = run

    def run_weighted(self, images: Tensor, decisions: Tensor, weights: Tensor) -> Tensor:
        raise ValueError(
            "weights: the walk of ImageNet networks runs none, compile with strategy='gather'"
        )

    def set_policy(self, policy: FoldedNetwork, pool: int) -> bool:
        """Take ``policy`` if it is a network as the constructor takes them, see ``Executor``."""
        self._policy = None
        if policy.config.num_classes != self._num_blocks:
            return False
        try:
            _check_network(policy)
        except (TypeError, ValueError):
            return False
        *described, _, winograd = pack(policy, _winograd_segments(policy, self._compact, True))
        self._policy = (*described, winograd, pool)
        return True

    def run_policy(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Decide and execute, see ``Executor``."""
        if self._policy is None:
            return super().run_policy(images)
        logits, decisions, _ = walk_imagenet_policy(images, *self._network, *self._policy)
        return logits, decisions


def pack(network: FoldedNetwork, winograd: int) -> tuple:
    """A network as ``walk_imagenet`` takes it, from ``weights`` to ``winograd``."""
    config = network.config
    described = Description(
        config.block == "bottleneck",
        config.layers,
        config.channels,
        config.inner_widths,
        config.num_classes,
        winograd,
    )
    shapes = list(described.convs())
    sizes = [shape.packed_size() for shape in shapes]
    weights = _empty_in_large_pages(sum(sizes) + 1, network.stem.weight.dtype)
    for conv, shape, out in zip(_convs(network), shapes, weights[:-1].split(sizes), strict=True):
        pack_conv(*conv, shape, out)
    weights[-1] = described.signature()
    return weights, *described


def _winograd_segments(network: FoldedNetwork, compact: bool, is_policy: bool) -> int:
    return 0 if compact else len(network.config.layers) - is_policy


def _empty_in_large_pages(count: int, dtype: torch.dtype) -> Tensor:
    """A vector in pages of 2 MB where the system has them.

    A call reads all weights: those of ResNet-101 lie in 60,000 pages of 4 KB, and to look each up
    takes 1.5 % of the time.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype)
    memory = mmap.mmap(-1, count * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def _convs(network: FoldedNetwork):
    """(weight, bias) in the order of packed weights."""
    yield network.stem.weight, network.stem.bias
    for block in network.blocks:
        *first, last = block.convs
        shortcut = [block.shortcut] if isinstance(block.shortcut, FoldedConv) else []
        for conv in (*first, *shortcut, last):
            yield conv.weight, conv.bias
    yield network.fc_weight[:, :, None, None], network.fc_bias


def _check_network(network: FoldedNetwork) -> None:
    config, weight = network.config, network.stem.weight
    if config.stem != "imagenet":
        raise ValueError(f"network: this walk supports stem 'imagenet' only, got {config.stem!r}")
    if weight.shape[:2] != (STEM_CHANNELS, 3):
        raise ValueError(
            f"network: this walk supports a stem of 3 to {STEM_CHANNELS} channels only, got "
            f"{weight.shape[1]} to {weight.shape[0]}"
        )
    if config.shortcut != "projection":
        raise ValueError(
            f"network: this walk supports shortcut 'projection' only, got {config.shortcut!r}"
        )
    if config.groups != 1:
        raise ValueError(
            f"network: this walk supports 3x3 convolutions of one group only, got {config.groups}"
        )
    if weight.dtype != torch.float32:
        raise TypeError(f"network: the walk on a CPU runs torch.float32 only, got {weight.dtype}")
    if weight.device.type != "cpu":
        raise ValueError(f"network: expected on the CPU, got on {weight.device}")
