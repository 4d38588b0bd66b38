"""Timing contenders fairly: right logits first, then round-robin, then medians.

The one module that ``blockdrop benchmark`` and ``benchmarks/`` time with. It knows nothing of
what the contenders are; those are in ``blockdrop_fast.baselines`` and ``blockdrop_fast.benchmark``.
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from blockdrop_fast.models import ResNet

# What a contender ran just before may still hold the cores (thread pools spin for some
# milliseconds after a call) and the caches: a contender faster than this gets one untimed call
# of its own before each timed one. For slower ones neither matters.
SETTLE_SECONDS = 0.1


class WrongLogitsError(AssertionError):
    """A contender's logits are outside of the tolerance, so it is not timed."""


@dataclass(frozen=True)
class Contender:
    """One way of computing a network's logits.

    Attributes:
        name: how tables and benchmarks call it.
        call: (images (B, 3, H, W), decisions (B, K) bool) -> logits (B, C). Images come
            contiguous (channels first); conversions to another layout are part of the call.
        kind: "baseline" is a complete ResNet of another engine, "all_kept" a complete ResNet in
            an engine of ours; both ignore the decisions. "blockdrop" executes the decisions, and
            pays for the policy network in the same call.
    """

    name: str
    call: Callable[[Tensor, Tensor], Tensor]
    kind: Literal["baseline", "all_kept", "blockdrop"]


@dataclass(frozen=True)
class Reference:
    """The logits that a contender must give.

    Attributes:
        logits: (N, C) float64.
        tolerance: the largest absolute error allowed: twice that of eager PyTorch with unfolded
            batch norm at the contenders' precision, and four roundings of the largest logit.
    """

    logits: Tensor
    tolerance: float

    def check(self, name: str, logits: Tensor) -> None:
        """Raise unless ``logits`` (N, C) are right.

        Raises:
            WrongLogitsError: naming the contender, its error and the tolerance.
        """
        if logits.shape != self.logits.shape:
            raise WrongLogitsError(
                f"{name}: expected logits of shape {tuple(self.logits.shape)}, "
                f"got {tuple(logits.shape)}"
            )
        error = float((logits.double() - self.logits).abs().max())
        if not error <= self.tolerance:  # NaN is wrong, too
            raise WrongLogitsError(
                f"{name}: logits are off by {error:.3g}, the tolerance is {self.tolerance:.3g}; "
                "not timed"
            )


@torch.no_grad()
def make_reference(
    backbone: ResNet, images: Tensor, decisions: Tensor | None, dtype: torch.dtype
) -> Reference:
    """The reference for images at given decisions (None: all blocks kept).

    Args:
        backbone: in eval mode; its forward defines what is right.
        images: (N, 3, H, W) of ``dtype``; the tolerance means something from 64 images on.
        decisions: (N, K) bool, or None.
        dtype: the contenders' precision.
    """
    # float64 convolutions take half the time in channels-last.
    layout = torch.channels_last
    exact = copy.deepcopy(backbone).to(dtype=torch.float64, memory_format=layout)(
        images.to(dtype=torch.float64, memory_format=layout), decisions
    )
    eager = copy.deepcopy(backbone).to(dtype)(images, decisions)
    error = float((eager.double() - exact).abs().max())
    return Reference(exact, 2 * error + 4 * torch.finfo(dtype).eps * float(exact.abs().max()))


def chunks(batch: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Split tensors of N images each into batches of exactly ``batch``.

    Raises:
        ValueError: N is not a multiple of the batch size.
    """
    total = len(tensors[0])
    if batch < 1 or total % batch:
        raise ValueError(f"batch: expected a divisor of the {total} images, got {batch}")
    return list(zip(*(tensor.split(batch) for tensor in tensors), strict=True))


def check_contender(
    contender: Contender,
    batches: Sequence[tuple[Tensor, Tensor]],
    all_kept: Reference,
    at_decisions: Reference,
) -> None:
    """Run a contender over all batches and compare what it gives with its reference.

    Raises:
        WrongLogitsError: it is wrong.
    """
    with torch.inference_mode():
        logits = torch.cat([contender.call(images, keep) for images, keep in batches])
    reference = at_decisions if contender.kind == "blockdrop" else all_kept
    reference.check(contender.name, logits)


def time_contenders(
    contenders: Sequence[Contender],
    batches: Sequence[tuple[Tensor, Tensor]],
    all_kept: Reference,
    at_decisions: Reference,
    *,
    rounds: int = 10,
    min_seconds: float = 0.0,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Check every contender, then time all of them round-robin.

    Args:
        contenders: with different names.
        batches: of (images (B, 3, H, W), decisions (B, K) bool), together the images of the
            references in their order. Round i times all contenders on batch i, modulo their
            number.
        all_kept, at_decisions: what the contenders must give, by their kind.
        rounds, min_seconds, warmup: see ``interleave``.

    Returns:
        Seconds a call, one sample a round, by contender's name.

    Raises:
        WrongLogitsError: a contender is wrong; none is timed then.
        ValueError: two contenders of the same name.
    """
    calls = {}
    for contender in contenders:
        if contender.name in calls:
            raise ValueError(f"contenders: two are called {contender.name!r}")
        check_contender(contender, batches, all_kept, at_decisions)

        def call(index: int, run: Callable = contender.call) -> Tensor:
            return run(*batches[index % len(batches)])

        calls[contender.name] = call
    device = batches[0][0].device
    with torch.inference_mode():
        return interleave(
            calls, rounds=rounds, min_seconds=min_seconds, warmup=warmup, device=device
        )


def interleave(
    calls: Mapping[str, Callable[[int], object]],
    *,
    rounds: int,
    min_seconds: float = 0.0,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> dict[str, list[float]]:
    """Time calls round-robin (A B C A B C …), so that drift of the machine hits all alike.

    Args:
        calls: by name; each gets the number of the round.
        rounds: timed rounds, at least.
        min_seconds: go on with more rounds until so much time has passed.
        warmup: untimed rounds before.
        device: where the calls compute. On CUDA, events on the current stream time the device,
            and the L2 cache is flushed before each timed call.

    Returns:
        Seconds a call, one sample a round, by name.

    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    device = torch.device(device)
    stopwatch = _CudaStopwatch(device) if device.type == "cuda" else _host_stopwatch
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(warmup):
        for call in calls.values():
            call(index)
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        started, index = time.perf_counter(), 0
        while index < rounds or time.perf_counter() - started < min_seconds:
            for name, call in calls.items():
                if not samples[name] or samples[name][-1] < SETTLE_SECONDS:
                    call(index)
                samples[name].append(stopwatch(call, index))
            index += 1
    finally:
        if collects:
            gc.enable()
    return samples


def _host_stopwatch(call: Callable[[int], object], index: int) -> float:
    started = time.perf_counter()
    call(index)
    return time.perf_counter() - started


class _CudaStopwatch:
    """Times what a call does on the device, from a cold L2 cache."""

    def __init__(self, device: torch.device):
        self._device = device
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(4 * cache_bytes, 1), dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[int], object], index: int) -> float:
        with torch.cuda.device(self._device):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            # While the device overwrites its cache, the host gets ahead: what is timed is the
            # device's work and, where the host cannot keep up, the waiting for it.
            self._flush.zero_()
            start.record()
            call(index)
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3


def median(samples: Sequence[float]) -> float:
    """The median of a contender's samples, in seconds."""
    return statistics.median(samples)


def machine_info(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a figure depends on beside the code: processor, threads, versions, commit, load."""
    device = torch.device(device)
    info: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(device),
        "commit": _commit(),
    }
    if hasattr(os, "getloadavg"):
        info["load_average"] = round(os.getloadavg()[0], 2)
    for package in ("onnxruntime", "openvino", "triton"):
        try:
            info[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            info[package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info |= {
            "gpu": properties.name,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return info


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that this package is imported from, or None if it is not."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
