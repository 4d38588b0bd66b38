"""Gather execution on a GPU, with CUDA graphs for whole networks.

    images -> policy network -> decisions -> plan -> counts to the host    (a stream of its own)
    images -> stem ------------------------------------------------------> blocks -> logits

A block can be run in four ways, and the counts of active images say which one is best. How they
get to say it is a choice of launch:

* "counts": the host waits for them, K integers, copied while the stem still runs, and takes the
  best of a few graphs (``graph_choice.py``).
* "universal": nobody asks. One graph for all batches of a size, in which every block gathers, by
  kernels that read its count on the device.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdrop_fast.executors import Executor
from blockdrop_fast.executors.dense import DenseExecutor
from blockdrop_fast.executors.gather import GatherExecutor
from blockdrop_fast.executors.graph_choice import UNIVERSAL, GraphChoice, Way, ways_by_count
from blockdrop_fast.executors.layers import Layers
from blockdrop_fast.executors.recording import Recorded, SideStream, is_capturing
from blockdrop_fast.networks.folding import FoldedBlock, FoldedNetwork
from blockdrop_fast.networks.policy import threshold
from blockdrop_fast.ops.gathered_conv import gathered_conv_, pack_conv
from blockdrop_fast.ops.plan import plan
from blockdrop_fast.triton_kernels import KERNEL_DTYPES

Launch = Literal["counts", "universal"]


class GraphGatherExecutor(Executor):
    """Gathers a block's active images inside of its convolutions, whole networks a launch.

    Also runs on a CPU, with the operator's reference and without graphs, so that the tests reach
    it. Calls from several threads wait for each other. What fails here and not in plain PyTorch is
    run by that from then on, and ``remark`` says why. While a call captures a graph, other threads
    must not draw random numbers on the device.

    Calls may be captured in somebody else's graph, if the same thread has called with as many
    images before. It gets buffers of its own, and is "universal", on one stream.

    Args:
        network: folded, of any architecture without groups; on a GPU float16 or bfloat16.
        dense_from: images of a batch -> the share of active ones from which a block runs on all
            of them, masked; above 1: never.
        launch: how a block's way is chosen, see above. Only "counts" waits for the device.

    Raises:
        TypeError: weights of another dtype.
        ValueError: another launch, or grouped convolutions.
    """

    strategy = "gather"

    def __init__(
        self,
        network: FoldedNetwork,
        dense_from: Callable[[int], float] = lambda batch: 2.0,
        launch: Launch = "counts",
    ):
        self.logits_dtype = network.stem.weight.dtype
        self.device = network.stem.weight.device
        on_gpu = self.device.type == "cuda"
        if on_gpu and self.logits_dtype not in KERNEL_DTYPES:
            raise TypeError(
                f"network: expected a dtype out of {KERNEL_DTYPES}, got {self.logits_dtype}"
            )
        if network.config.groups != 1:
            raise ValueError(
                "network: expected convolutions of one group, our gathered ones serve no others, "
                f"got {network.config.groups} groups"
            )
        if launch not in get_args(Launch):
            raise ValueError(f"launch: expected one of {get_args(Launch)}, got {launch!r}")
        self.num_blocks = network.config.num_blocks
        self.launch = launch
        self.layers = Layers(network)
        self.gathered = [_GatheredBlock(block) for block in network.blocks]
        self.policy: DenseExecutor | None = None
        self.policy_pool = 1
        kind = {"dtype": self.logits_dtype, "device": self.device}
        self._buffers = partial(_Buffers, num_blocks=self.num_blocks, **kind)
        self._ways = cache(lambda batch: ways_by_count(batch, dense_from(batch)))
        self._eager = GatherExecutor(network, dense_from)
        self._side = SideStream(self.device)
        # Graphs of one stream never run at the same time and share memory; the side stream's do.
        pools = [torch.cuda.graph_pool_handle() if on_gpu else None for _ in range(2)]
        self._record = partial(Recorded, self.device, pools[0])
        # The policy's kernels are waited for. Not -1, so that no stream that runs them captures.
        self._record_aside = partial(Recorded, self.device, pools[1], priority=-2)
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
        with self._lock, guard:
            if self.remark:
                return self._run_eagerly(images, decisions)
            shape = (padded_batch(len(images)), *images.shape[1:])
            if shape not in self._batches:
                choice = GraphChoice(self.num_blocks, shape[0])
                self._batches[shape] = _Batch(self._record, self._record_aside, choice)
            batch = self._batches[shape]
            if is_capturing(self.device):
                buffers = self._buffers(shape, waits=False)
                return self._launch(batch, buffers, images, decisions, captured=True)
            try:
                with self._side.call():
                    if batch.buffers is None:
                        batch.buffers = self._buffers(shape, waits=self.launch == "counts")
                    return self._launch(batch, batch.buffers, images, decisions, captured=False)
            except Exception as error:
                if self.device.type == "cuda":
                    torch.cuda.synchronize()  # nothing uses the buffers from here on
                self._batches.clear()
                result = self._run_eagerly(images, decisions)  # fails, too, where the input is bad
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                self.remark = f"; by plain PyTorch since our kernels or graphs failed: {why}"
                warnings.warn(f"strategy 'gather'{self.remark}", RuntimeWarning, stacklevel=2)
                return result

    def _run_eagerly(self, images: Tensor, decisions: Tensor | None) -> tuple[Tensor, Tensor]:
        decisions = self._decisions(images) if decisions is None else decisions
        return self._eager.run(images, decisions), decisions

    def _launch(
        self,
        batch: _Batch,
        buffers: _Buffers,
        images: Tensor,
        decisions: Tensor | None,
        captured: bool,
    ) -> tuple[Tensor, Tensor]:
        """Logits and decisions of a batch; without decisions the policy makes them."""
        count, pattern = len(images), UNIVERSAL
        buffers.take(images, decisions)
        with nullcontext() if captured else self._side.fork():
            if decisions is None:
                batch.policy(partial(self._run_policy, buffers))
            else:
                batch.plan(partial(self._run_plan, buffers))
        buffers.x = batch.stem(partial(self.layers.stem, buffers.images))
        if not captured:
            if buffers.host_counts is not None:
                self._side.wait()
                pattern = batch.choose(buffers.host_counts, self._ways(count))
            self._side.join()
        logits = batch.blocks(pattern)(partial(self._run_blocks, buffers, pattern))
        return logits[:count].clone(), buffers.decisions[:count].clone()

    # -------------------------------------------------------------- what is recorded

    def _decisions(self, images: Tensor) -> Tensor:
        if self.policy_pool > 1:
            images = F.avg_pool2d(images, self.policy_pool)
        return threshold(self.policy.run_complete(images))

    def _run_policy(self, buffers: _Buffers) -> None:
        keep = self._decisions(buffers.images)
        torch.logical_and(keep, buffers.is_image, out=buffers.decisions)
        self._run_plan(buffers)

    def _run_plan(self, buffers: _Buffers) -> None:
        indices, counts, _ = plan(buffers.decisions)
        buffers.indices.copy_(indices)
        buffers.counts.copy_(counts)
        if buffers.host_counts is not None:
            buffers.host_counts.copy_(counts, non_blocking=True)

    def _run_blocks(self, buffers: _Buffers, pattern: int) -> Tensor:
        """All blocks, in the ways of a pattern, and the classifier."""
        x, ways = buffers.x, pattern.to_bytes(self.num_blocks, "little")
        for k, (block, way) in enumerate(zip(self.layers.blocks, ways, strict=True)):
            shortcut = block.shortcut(x)
            if way == Way.NONE:
                x = shortcut
            elif way == Way.SOME:
                active, count = buffers.indices[k], buffers.counts[k : k + 1]
                x = self.gathered[k].run(x, shortcut, active, count)
            elif way == Way.MASKED:
                keep = buffers.decisions[:, k, None, None, None]
                x = torch.where(keep, block.kept(x, shortcut), shortcut)
            else:
                x = block.kept(x, shortcut)
        return self.layers.classifier(x)


def padded_batch(batch: int) -> int:
    """The rows that ``batch`` images run in: up to an eighth more, so that few sizes do for all."""
    step = 1 << max(0, batch.bit_length() - 4)
    return -(-batch // step) * step


class _Batch:
    """Graphs for batches of one padded size, and their buffers.

    Nothing here refers to the executor: what an engine holds of the GPU goes with its last
    reference, not when garbage is collected.
    """

    def __init__(
        self,
        record: Callable[[], Recorded],
        record_aside: Callable[[], Recorded],
        choice: GraphChoice,
    ):
        self.buffers: _Buffers | None = None
        self.policy, self.plan, self.stem = record_aside(), record_aside(), record()
        self._record = record
        self._choice = choice
        self._blocks: dict[int, Recorded[Tensor]] = {}

    def choose(self, counts: Tensor, ways: bytes) -> int:
        """(K,) int32 counts on the host and the way of each count -> the pattern to run."""
        pattern = bytes(map(ways.__getitem__, counts.tolist()))
        return self._choice.choose(int.from_bytes(pattern, "little"))

    def blocks(self, pattern: int) -> Recorded[Tensor]:
        """The graph of a pattern. Those that are no longer chosen from go."""
        if pattern not in self._blocks:
            kept = [one for one in self._choice.graphs if one in self._blocks]
            self._blocks = {one: self._blocks[one] for one in kept} | {pattern: self._record()}
        return self._blocks[pattern]


class _Buffers:
    """What the recorded functions read and write.

    Rows beyond the batch hold images of earlier calls. No block is active for them; what is
    computed for all rows is computed for them, too, and cut off at the end.
    """

    x: Tensor  # output of the stem

    def __init__(
        self,
        shape: tuple[int, ...],
        waits: bool,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        rows, empty = shape[0], partial(torch.empty, device=device)
        self.images = empty(shape, dtype=dtype, memory_format=torch.channels_last).zero_()
        self.is_image = torch.zeros(rows, 1, dtype=torch.bool, device=device)
        self._num_images = 0
        self.decisions = torch.zeros(rows, num_blocks, dtype=torch.bool, device=device)
        self.indices = empty((num_blocks, rows), dtype=torch.int32)
        self.counts = empty((num_blocks,), dtype=torch.int32)
        self.host_counts: Tensor | None = None
        if waits:
            pinned = device.type == "cuda"
            self.host_counts = torch.empty(num_blocks, dtype=torch.int32, pin_memory=pinned)

    def take(self, images: Tensor, decisions: Tensor | None) -> None:
        """Copy a batch, and its decisions if they are there already."""
        batch = len(images)
        self.images[:batch].copy_(images)
        if batch != self._num_images:
            self.is_image[:batch].fill_(True)
            self.is_image[batch:].fill_(False)
            self._num_images = batch
        if decisions is not None:
            self.decisions[:batch].copy_(decisions)
            self.decisions[batch:].fill_(False)


class _GatheredBlock:
    """F_k on the active rows, its last convolution adding to the shortcut in place."""

    def __init__(self, folded: FoldedBlock):
        self._convs = [
            (pack_conv(conv.weight), conv.bias.float(), conv.weight.shape[2], conv.stride)
            for conv in folded.convs
        ]

    def run(self, x: Tensor, shortcut: Tensor, active: Tensor, count: Tensor) -> Tensor:
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
        for index, (weight, bias, kernel_size, stride) in enumerate(self._convs):
            is_last = index == len(self._convs) - 1
            out = shortcut
            if not is_last:
                size = (len(x), len(bias), *(-(-length // stride) for length in x.shape[2:]))
                like = {"dtype": x.dtype, "device": x.device}
                out = torch.empty(size, memory_format=torch.channels_last, **like)
            operands = (weight, bias, active, count, kernel_size, stride)
            gathered_conv_(out, x, *operands, gather=index == 0, scatter=is_last)
            x = out
        return x
