"""Gather execution on a GPU, with a CUDA graph for every way through the network.

    images -> policy network -> decisions -> plan -> counts to the host    (a stream of its own)
    images -> stem ------------------------------------------------------> blocks -> logits

A block can be run in four ways, and the counts of active images say which one is best. How they
get to say it is a choice of launch:

* "counts": the host waits for them, K integers, copied while the stem still runs. A pattern of ways
  that comes back gets a graph of its own; until then a batch runs by the universal graph.
* "universal": nobody asks. One graph for all batches of a size, in which every block gathers, by
  kernels that read its count on the device.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from enum import IntEnum
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdrop_fast.executors import Executor
from blockdrop_fast.executors.dense import DenseExecutor
from blockdrop_fast.executors.gather import GatherExecutor
from blockdrop_fast.executors.layers import Layers
from blockdrop_fast.executors.recording import (
    CallOrder,
    Recorded,
    SideStream,
    is_capturing,
)
from blockdrop_fast.networks.folding import FoldedBlock, FoldedConv, FoldedNetwork
from blockdrop_fast.networks.policy import threshold
from blockdrop_fast.ops.gathered_conv import gathered_conv_, pack_conv
from blockdrop_fast.ops.plan import plan

Launch = Literal["counts", "universal"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Patterns with a graph of their own, for each batch size. A policy trained for ImageNet has some
# ten policies, and at larger batches most blocks are run in the same way by each batch.
MAX_PATTERNS = 32
# Patterns that were seen once are remembered up to so many.
MAX_SEEN = 4096


class Way(IntEnum):
    """How a block is run."""

    NONE = 0  # no image keeps it: a shape-changing shortcut runs, nothing else
    SOME = 1  # gathered inside the convolutions, which read the count on the device
    MASKED = 2  # nearly all keep it: computed for all, thrown away where it is dropped
    ALL = 3  # all keep it: the vendor's convolutions


class GraphGatherExecutor(Executor):
    """Gathers a block's active images inside of its convolutions, whole networks a launch.

    Also runs on a CPU, with the operator's reference and without graphs, so that the tests reach
    it. Calls from several threads wait for each other.

    Args:
        network: folded, of any architecture; float32, float16 or bfloat16.
        dense_from: images of a batch -> the share of active ones from which a block runs on all
            of them, masked; above 1: never.
        launch: how a block's way is chosen, see above. Only "counts" waits for the device. Where
            somebody else captures a call in a graph, "counts" is "universal".

    Raises:
        TypeError: weights of another dtype.
        ValueError: another launch.
    """

    strategy = "gather"

    def __init__(
        self,
        network: FoldedNetwork,
        dense_from: Callable[[int], float] = lambda batch: 2.0,
        launch: Launch = "counts",
    ):
        self.dtype = self.logits_dtype = network.stem.weight.dtype
        if self.dtype not in DTYPES:
            raise TypeError(f"network: expected a dtype out of {DTYPES}, got {self.dtype}")
        self.device = network.stem.weight.device
        self.num_blocks = network.config.num_blocks
        self.dense_from = dense_from
        if launch not in get_args(Launch):
            raise ValueError(f"launch: expected one of {get_args(Launch)}, got {launch!r}")
        self.launch = launch
        self.layers = Layers(network)
        self.gathered = [_GatheredBlock(block) for block in network.blocks]
        self.policy: DenseExecutor | None = None
        self.policy_pool = 1
        on_gpu = self.device.type == "cuda"
        # Graphs of one stream never run at the same time and share memory; the side stream's do.
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self.side_pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self.side = SideStream(self.device)
        self._order = CallOrder(self.device)
        self._eager = GatherExecutor(network, dense_from)
        self._batches: dict[tuple[int, ...], _Batch] = {}
        self._lock = threading.Lock()

    def set_policy(self, policy: FoldedNetwork, pool: int) -> bool:
        """Take any ``policy`` to decide by, see ``Executor``; it runs on a stream of its own."""
        self.policy, self.policy_pool = DenseExecutor(policy), pool
        return True

    def run(self, images: Tensor, decisions: Tensor) -> Tensor:
        """(B, 3, H, W) images and their (B, K) bool decisions -> (B, num_classes) logits."""
        return self._run(images, decisions)[0]

    def run_policy(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Decide and execute, see ``Executor``."""
        if self.policy is None:
            return super().run_policy(images)
        return self._run(images, None)

    def run_sets(self, images: Tensor, decisions: Tensor) -> Tensor:
        """(B, 3, H, W) images, (S, B, K) bool -> (S, B, num_classes) logits, prefixes shared.

        Forks change the number of rows at every block, so nothing is recorded.
        """
        return self._eager.run_sets(images, decisions)

    def run_weighted(self, images: Tensor, decisions: Tensor, weights: Tensor) -> Tensor:
        """See ``Executor``; nothing is recorded."""
        return self._eager.run_weighted(images, decisions, weights)

    def _run(self, images: Tensor, decisions: Tensor | None) -> tuple[Tensor, Tensor]:
        guard = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with self._lock, guard, self._order.call():
            shape = (padded_batch(len(images)), *images.shape[1:])
            if shape not in self._batches:
                self._batches[shape] = _Batch(self, shape)
            return self._batches[shape].run(images, decisions)


def padded_batch(batch: int) -> int:
    """The rows that ``batch`` images run in: up to an eighth more, so that few sizes do for all."""
    step = 1 << max(0, batch.bit_length() - 4)
    return -(-batch // step) * step


class _Batch:
    """Buffers and graphs for batches of one padded size.

    Rows beyond the batch hold images of earlier calls. No block is active for them; what is
    computed for all rows is computed for them, too, and cut off at the end.
    """

    def __init__(self, executor: GraphGatherExecutor, shape: tuple[int, ...]):
        self._executor = executor
        rows, blocks, device = shape[0], executor.num_blocks, executor.device
        self._rows = rows
        empty = partial(torch.empty, device=device)
        self._images = empty(shape, dtype=executor.dtype, memory_format=torch.channels_last)
        self._images.zero_()
        self._is_image = torch.zeros(rows, 1, dtype=torch.bool, device=device)
        self._num_images = 0
        self._in_graph_of_caller = False
        self._decisions = torch.zeros(rows, blocks, dtype=torch.bool, device=device)
        self._indices = empty((blocks, rows), dtype=torch.int32)
        self._counts = empty((blocks,), dtype=torch.int32)
        self._host_counts = torch.empty(blocks, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._x: Tensor | None = None  # output of the stem
        self._stem = Recorded(self._run_stem, executor.pool)
        self._decide = Recorded(self._run_policy, executor.side_pool)
        self._plan = Recorded(self._run_plan, executor.side_pool)
        self._universal = Recorded(partial(self._run_blocks, None), executor.pool)
        self._patterns: OrderedDict[tuple[Way, ...], Recorded[Tensor]] = OrderedDict()
        self._seen: Counter[tuple[Way, ...]] = Counter()

    def run(self, images: Tensor, decisions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits and decisions of a batch; without decisions the policy makes them."""
        executor, batch = self._executor, len(images)
        self._take(images, decisions)
        with executor.side.fork():
            if decisions is None:
                self._decide()
            else:
                self._plan()
        self._x = self._stem()
        blocks = self._universal
        if executor.launch == "counts" and not is_capturing(executor.device):
            executor.side.wait()
            blocks = self._blocks_for(self._ways(batch))
        executor.side.join()
        logits = blocks()
        return logits[:batch].clone(), self._decisions[:batch].clone()

    def _take(self, images: Tensor, decisions: Tensor | None) -> None:
        batch = len(images)
        self._images[:batch].copy_(images)
        # Replays of a caller's graph bring their own number of images, and nobody tells us.
        self._in_graph_of_caller |= is_capturing(self._executor.device)
        if batch != self._num_images or self._in_graph_of_caller:
            self._is_image[:batch].fill_(True)
            self._is_image[batch:].fill_(False)
            self._num_images = batch
        if decisions is not None:
            self._decisions[:batch].copy_(decisions)
            self._decisions[batch:].fill_(False)

    def _ways(self, batch: int) -> tuple[Way, ...]:
        all_from = _all_from(batch, self._executor.dense_from(batch))
        return tuple(_way(count, batch, all_from) for count in self._host_counts.tolist())

    def _blocks_for(self, ways: tuple[Way, ...]) -> Recorded[Tensor]:
        """The pattern's own graph from its second sighting on, before that the universal one."""
        if ways not in self._patterns:
            if len(self._seen) == MAX_SEEN:
                self._seen.clear()
            self._seen[ways] += 1
            if self._seen[ways] == 1:
                return self._universal
            del self._seen[ways]
            if len(self._patterns) == MAX_PATTERNS:
                self._patterns.popitem(last=False)
            run = partial(self._run_blocks, ways)
            self._patterns[ways] = Recorded(run, self._executor.pool)
        self._patterns.move_to_end(ways)
        return self._patterns[ways]

    # -------------------------------------------------------------- what is recorded

    def _run_stem(self) -> Tensor:
        return self._executor.layers.stem(self._images)

    def _run_policy(self) -> None:
        executor, images = self._executor, self._images
        if executor.policy_pool > 1:
            images = F.avg_pool2d(images, executor.policy_pool)
        keep = threshold(executor.policy.run_complete(images))
        torch.logical_and(keep, self._is_image, out=self._decisions)
        self._run_plan()

    def _run_plan(self) -> None:
        indices, counts, _ = plan(self._decisions)
        self._indices.copy_(indices)
        self._counts.copy_(counts)
        self._host_counts.copy_(counts, non_blocking=True)

    def _run_blocks(self, ways: tuple[Way, ...] | None) -> Tensor:
        """All blocks and the classifier; ``ways`` None: by the counts on the device."""
        executor, x = self._executor, self._x
        for k, (block, gathered) in enumerate(
            zip(executor.layers.blocks, executor.gathered, strict=True)
        ):
            way = Way.SOME if ways is None else ways[k]
            shortcut = block.shortcut(x)
            if way is Way.NONE:
                x = shortcut
            elif way is Way.SOME:
                x = gathered.run(x, shortcut, self._indices[k], self._counts[k : k + 1])
            elif way is Way.MASKED:
                keep = self._decisions[:, k, None, None, None]
                x = torch.where(keep, block.kept(x, shortcut), shortcut)
            else:
                x = block.kept(x, shortcut)
        return executor.layers.classifier(x)


def _all_from(batch: int, dense_from: float) -> int:
    """The count of active images from which a block runs on all images."""
    return max(1, math.ceil(min(dense_from, 1.0) * batch))


def _way(count: int, batch: int, all_from: int) -> Way:
    if count == 0:
        return Way.NONE
    if count == batch:
        return Way.ALL
    return Way.MASKED if count >= all_from else Way.SOME


class _GatheredBlock:
    """F_k on the active rows, its last convolution adding to the shortcut in place."""

    def __init__(self, folded: FoldedBlock):
        self._convs = [_PackedConv(conv) for conv in folded.convs]

    def run(
        self,
        x: Tensor,
        shortcut: Tensor,
        active: Tensor,
        count: Tensor,
    ) -> Tensor:
        """Add to rows of ``shortcut``.

        Args:
            x: (R, C, H, W) channels-last, the block's input. It may be the shortcut: its rows are
                not read any more when they are written.
            shortcut: (R, C', H', W') channels-last.
            active: (R,) int32, the active rows, then -1.
            count: (1,) int32, how many there are.

        Returns:
            ``shortcut``, now relu(shortcut + F_k(x)) in its active rows.
        """
        *first, last = self._convs
        for index, conv in enumerate(first):
            out = conv.empty_output(x)
            conv.run(out, x, active, count, gather=index == 0)
            x = out
        last.run(shortcut, x, active, count, scatter=True)
        return shortcut


class _PackedConv:
    """A folded convolution as ``gathered_conv_`` takes it."""

    def __init__(self, folded: FoldedConv):
        self._weight = pack_conv(folded.weight)
        self._bias = folded.bias.float()
        self._channels, _, self._kernel_size, _ = folded.weight.shape
        self._stride = folded.stride

    def empty_output(self, x: Tensor) -> Tensor:
        """Uninitialised, (R, C_out, H', W') channels-last, for as many rows as x has."""
        height, width = (-(-size // self._stride) for size in x.shape[2:])
        return torch.empty(
            (len(x), self._channels, height, width),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )

    def run(
        self,
        out: Tensor,
        x: Tensor,
        active: Tensor,
        count: Tensor,
        gather: bool = False,
        scatter: bool = False,
    ) -> None:
        gathered_conv_(
            out, x, self._weight, self._bias, active, count, self._kernel_size, self._stride,
            gather, scatter,
        )  # fmt: skip
