"""Which executor serves a network here, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from blockdrop_fast import triton_kernels
from blockdrop_fast._extension import build_record, extension_status
from blockdrop_fast.executors import Executor, proven
from blockdrop_fast.executors.crossover import Crossover
from blockdrop_fast.executors.dense import DenseExecutor
from blockdrop_fast.executors.gather import GatherExecutor
from blockdrop_fast.executors.gather_graph import GraphGatherExecutor, Launch
from blockdrop_fast.executors.walk import WalkExecutor
from blockdrop_fast.executors.walk_half import WalkHalfExecutor
from blockdrop_fast.executors.walk_imagenet import WalkImageNetExecutor
from blockdrop_fast.networks.folding import FoldedNetwork

OLDEST_GPU = (8, 0)  # that the walk's matrix instructions run on
ASKED_FOR = "asked for"


@dataclass(frozen=True)
class Choice:
    """What executes a network.

    Attributes:
        executor: at every batch size, but for those below.
        reason: why it is this one.
        where_walk_loses: for batch sizes at which ``table`` says that the walk does not win.
        table: what was measured of this network here.
    """

    executor: Executor
    reason: str
    where_walk_loses: Executor | None = None
    table: Crossover | None = None

    def for_batch(self, batch: int) -> Executor:
        """The executor for a batch of so many images, at least 1."""
        if self.where_walk_loses is not None and self.table.walk_wins(batch) is False:
            return self.where_walk_loses
        return self.executor


def choose(
    network: FoldedNetwork,
    asked: Literal["auto", "walk", "gather", "dense"],
    launch: Launch,
    table: Crossover | None,
    compact: bool = False,
) -> Choice:
    """Choose what executes a backbone.

    Args:
        network: folded, on the device and in the precision that it is executed in.
        asked: the strategy; "auto": the fastest that serves the network.
        launch: see ``GraphGatherExecutor``.
        table: what was measured of this network here, if anything was.
        compact: see ``WalkImageNetExecutor``.

    Raises:
        TypeError, ValueError: the strategy that was asked for does not serve the network.
    """
    if asked == "auto" and network.stem.weight.is_cuda:
        return _choose_on_gpu(network, launch, table)
    if asked == "walk":
        return Choice(_make_walk(network, compact), ASKED_FOR)
    if asked == "dense":
        return Choice(DenseExecutor(network), ASKED_FOR)
    if asked == "gather":
        gather, remark = _make_gather(network, table, launch)
        return Choice(gather, f"{ASKED_FOR}{remark}")
    walk, reason = _find_walk(network, compact)
    if walk is None:
        gather, remark = _make_gather(network, table, launch)
        return Choice(gather, f"{reason}{remark}")
    if table is None or not table.walk_loses_somewhere():
        return Choice(walk, reason)
    gather, remark = _make_gather(network, table, launch)
    reason = f"{reason}, but for batch sizes at which gather was faster{remark}"
    return Choice(walk, reason, gather, table)


def _choose_on_gpu(network: FoldedNetwork, launch: Launch, table: Crossover | None) -> Choice:
    """Our kernels where they have passed their tests and were measured, else plain PyTorch."""
    proof = proven.load(network.stem.weight.device)
    why_plain = proof.reason
    if proof.strategies and table is None:
        why_plain = "this network was not measured here: `blockdrop benchmark --calibrate`"
    if not proof.strategies or table is None:
        ask = "strategy='walk' and strategy='gather' ask for our kernels"
        return Choice(GatherExecutor(network), f"plain PyTorch, because {why_plain}; {ask}")
    if "gather" in proof.strategies:
        gather, remark = _make_gather(network, table, launch)
    else:
        gather, remark = GatherExecutor(network), "; gather by plain PyTorch"
    passed = f"; {proof.reason}"
    if "walk" not in proof.strategies:
        return Choice(gather, f"the walk has not passed its tests here{remark}{passed}")
    walk, reason = _find_walk(network)
    if walk is None:
        return Choice(gather, f"{reason}{remark}{passed}")
    if not table.walk_wins_somewhere():
        return Choice(gather, f"the walk was faster at no batch size{remark}{passed}")
    if not table.walk_loses_somewhere():
        return Choice(walk, f"{reason}{passed}")
    reason = f"{reason}, but for batch sizes at which gather was faster{remark}{passed}"
    return Choice(walk, reason, gather, table)


def choose_policy(
    policy: FoldedNetwork, backbone: Executor, compact: bool = False
) -> Callable[[Tensor], Tensor]:
    """How a policy network is run, complete: by the walk beside a walk where it can, else densely.

    Args:
        policy: folded.
        backbone: what executes the backbone.
        compact: see ``WalkImageNetExecutor``.

    Returns:
        (B, 3, H, W) images, pooled already, with B at least 1 -> (B, K) logits.
    """
    walk = None
    if backbone.strategy == "walk":
        walk, _ = _find_walk(policy, compact, is_policy=True)
    if walk is None:
        return DenseExecutor(policy).run_complete
    return partial(_run_all_blocks, walk, policy.config.num_blocks)


def _run_all_blocks(executor: Executor, num_blocks: int, images: Tensor) -> Tensor:
    keep = torch.ones(len(images), num_blocks, dtype=torch.bool, device=images.device)
    return executor.run(images, keep)


def _make_gather(
    network: FoldedNetwork, table: Crossover | None, launch: Launch
) -> tuple[Executor, str]:
    """The gather executor for the network's device and precision, and what to remark of it."""
    rule, remark = {}, ""
    if table is not None:
        rule, remark = {"dense_from": table.dense_from}, f" (measured: {table.source})"
    dtype, device = network.stem.weight.dtype, network.stem.weight.device
    if device.type != "cuda":
        return GatherExecutor(network, **rule), remark
    if dtype not in triton_kernels.KERNEL_DTYPES:
        plain = f"; by plain PyTorch, as our kernels do not compute in {dtype}"
        return GatherExecutor(network, **rule), f"{plain}{remark}"
    if network.config.groups != 1:
        # A table would be of our kernels, where there is one.
        plain = "; by plain PyTorch, as our kernels serve no convolutions of several groups"
        return GatherExecutor(network), plain
    if why_not := triton_kernels.why_not(device):
        # A table would be of the kernels that are missing.
        return GatherExecutor(network), f"; by plain PyTorch, without our kernels: {why_not}"
    return GraphGatherExecutor(network, launch=launch, **rule), remark


def _make_walk(network: FoldedNetwork, compact: bool = False, is_policy: bool = False) -> Executor:
    """The walk for the network and its device.

    Raises:
        TypeError, ValueError: it does not serve this network or precision.
    """
    if network.stem.weight.device.type == "cuda":
        return WalkHalfExecutor(network)
    if network.config.stem == "imagenet":
        return WalkImageNetExecutor(network, compact, is_policy)
    return WalkExecutor(network)


def _find_walk(
    network: FoldedNetwork, compact: bool = False, is_policy: bool = False
) -> tuple[Executor | None, str]:
    """The walk where it serves a network here, else None; and why."""
    device = network.stem.weight.device
    if reason := _why_no_walk_kernels(device):
        return None, reason
    try:
        executor = _make_walk(network, compact, is_policy)
    except (TypeError, ValueError) as error:
        return None, str(error)
    padded = ""
    if network.config.block_widths is not None and not isinstance(executor, WalkImageNetExecutor):
        padded = "; narrower blocks are padded to their segment's width, and take its time"
    if isinstance(executor, WalkHalfExecutor):
        launch = "one kernel launch a batch; images of other sizes than 32x32 run by gather"
        return executor, f"{launch}{padded}"
    return executor, f"the fastest for this network on a CPU{padded}"


def _why_no_walk_kernels(device: torch.device) -> str:
    """Empty if there are compiled kernels of the walk for the device."""
    status = extension_status()
    if not status.loaded:
        return f"the walk needs the compiled extension: {status.reason}"
    if device.type != "cuda":
        return ""
    if status.build_info.get("cuda") is None:
        reason = build_record().get("why_no_cuda") or "the extension was built without CUDA"
        return f"the walk on a GPU needs CUDA kernels: {reason}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return "the walk needs a GPU of compute capability 8.0 or newer, got {}.{}".format(
            *capability
        )
    return ""
