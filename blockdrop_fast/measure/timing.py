"""Timing contenders fairly: right logits first, then round-robin, then medians.

The one module that ``blockdrop benchmark`` and ``benchmarks/`` time with. It knows nothing of
what the contenders are; those are in ``contenders`` and ``baselines``.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from blockdrop_fast.measure.tolerance import Reference
from blockdrop_fast.networks.blockdrop import Output

# What a contender ran just before may still hold the cores (thread pools spin for some
# milliseconds after a call) and the caches: a contender faster than this gets one untimed call
# of its own before each timed one. For slower ones neither matters.
SETTLE_SECONDS = 0.1
# How long a GPU is kept busy before a timed call, so that the host is ahead of it when it begins:
# longer than any engine here takes to launch a batch.
HEAD_START_SECONDS = 5e-4
# Calls before any is timed, or so many seconds of them. On a GPU engines record CUDA graphs for
# what comes often enough, which is no part of a call; elsewhere the check of the logits will do.
WARM_CALLS = {"cuda": 400, "cpu": 0}
WARM_SECONDS = 2.0


@dataclass(frozen=True)
class Contender:
    """One way of computing a network's logits.

    Attributes:
        name: how tables and benchmarks call it.
        call: (images (B, 3, H, W), decisions (B, K) bool) -> logits (B, C). Images come
            contiguous (channels first); conversions to another layout are part of the call. The
            next call may overwrite the logits.
        kind: "baseline" is a complete ResNet of another engine, "all_kept" a complete ResNet in
            an engine of ours; both ignore the decisions. "blockdrop" executes the decisions, and
            pays for the policy network in the same call. "decides" executes what its own policy
            network decides, and returns an ``Output``: logits and decisions.
    """

    name: str
    call: Callable[[Tensor, Tensor], Tensor | Output]
    kind: Literal["baseline", "all_kept", "blockdrop", "decides"]


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
    check_own: Callable[[str, Output], None] | None = None,
) -> Tensor | None:
    """Run a contender over all batches and compare what it gives with its reference.

    Args:
        contender, batches, all_kept, at_decisions: see ``time_contenders``.
        check_own: (name, output of all images) -> raises unless the decisions are the policy
            network's and the logits right at them; needed for the kind "decides".

    Returns:
        (N, K) bool, the decisions that it executed; None of a complete network.

    Raises:
        WrongLogitsError: it is wrong.
    """
    logits, executed = [], []
    with torch.inference_mode():
        for images, keep in batches:
            output = contender.call(images, keep)
            if contender.kind == "decides":
                executed.append(output.decisions.clone())
                output = output.logits
            logits.append(output.clone())
    if contender.kind == "decides":
        decisions = torch.cat(executed)
        check_own(contender.name, Output(torch.cat(logits), decisions))
        return decisions
    reference = at_decisions if contender.kind == "blockdrop" else all_kept
    reference.check(contender.name, torch.cat(logits))
    given = [keep for _, keep in batches]
    return torch.cat(given) if contender.kind == "blockdrop" else None


@dataclass(frozen=True)
class Timed:
    """What was measured of contenders, by their names.

    Attributes:
        samples: seconds a call, one sample a round. On a GPU: of the device.
        host_samples: the same from call to synchronised result; empty if not asked for.
        decisions: (N, K) bool, the decisions executed; None of a complete network.
    """

    samples: dict[str, list[float]]
    host_samples: dict[str, list[float]]
    decisions: dict[str, Tensor | None]


Attempt = Callable[[str], AbstractContextManager]


def time_contenders(
    contenders: Sequence[Contender],
    batches: Sequence[tuple[Tensor, Tensor]],
    all_kept: Reference,
    at_decisions: Reference,
    check_own: Callable[[str, Output], None] | None = None,
    *,
    rounds: int = 10,
    min_seconds: float = 0.0,
    warmup: int = 1,
    host: bool = False,
    attempt: Attempt = nullcontext,
) -> Timed:
    """Check every contender and warm it up, then time all of them round-robin.

    Args:
        contenders: with different names.
        batches: of (images (B, 3, H, W), decisions (B, K) bool), together the images of the
            references in their order. Round i times all contenders on batch i, modulo their
            number.
        all_kept, at_decisions: what the contenders must give, by their kind.
        check_own: see ``check_contender``.
        rounds, min_seconds, warmup: see ``interleave``.
        host: time on the host, too (see ``interleave``), in a round-robin of its own.
        attempt: of a contender's name; in this context it is checked and warmed up. If the context
            swallows what it raises, the others are timed without it.

    Raises:
        WrongLogitsError: a contender is wrong; none is timed then.
        ValueError: two contenders of the same name.
    """
    device = batches[0][0].device
    calls, decisions = {}, {}
    for contender in contenders:
        if contender.name in calls:
            raise ValueError(f"contenders: two are called {contender.name!r}")

        def call(index: int, run: Callable = contender.call) -> Tensor | Output:
            return run(*batches[index % len(batches)])

        with attempt(contender.name):
            executed = check_contender(contender, batches, all_kept, at_decisions, check_own)
            _warm_up(call, len(batches), device)
            decisions[contender.name], calls[contender.name] = executed, call
    options = {"rounds": rounds, "min_seconds": min_seconds, "device": device}
    with torch.inference_mode():
        samples = interleave(calls, warmup=warmup, **options)
        host_samples = interleave(calls, warmup=0, host=True, **options) if host else {}
    return Timed(samples, host_samples, decisions)


@torch.inference_mode()
def _warm_up(call: Callable[[int], object], num_batches: int, device: torch.device) -> None:
    """All batches twice, and more while there is time; what fails late fails in here."""
    until = time.perf_counter() + WARM_SECONDS
    for index in range(WARM_CALLS[device.type]):
        if index >= 2 * num_batches and time.perf_counter() > until:
            break
        call(index)
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def interleave(
    calls: Mapping[str, Callable[[int], object]],
    *,
    rounds: int,
    min_seconds: float = 0.0,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    host: bool = False,
) -> dict[str, list[float]]:
    """Time calls round-robin (A B C A B C …), so that drift of the machine hits all alike.

    Args:
        calls: by name; each gets the number of the round.
        rounds: timed rounds, at least.
        min_seconds: go on with more rounds until so much time has passed.
        warmup: untimed rounds before.
        device: where the calls compute. On CUDA, events on the current stream time the device,
            and the L2 cache is flushed before each timed call.
        host: on CUDA, time on the host's clock instead, from the call to the synchronised result:
            what one caller waits for, launches included.

    Returns:
        Seconds a call, one sample a round, by name.

    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    device = torch.device(device)
    stopwatch = _CudaStopwatch(device, host) if device.type == "cuda" else _host_stopwatch
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
    """Times what a call does on the device, or takes until its result is there, from a cold L2."""

    def __init__(self, device: torch.device, host: bool):
        self._device, self._host = device, host
        properties = torch.cuda.get_device_properties(device)
        self._flush = torch.empty(
            max(4 * properties.L2_cache_size, 1), dtype=torch.uint8, device=device
        )
        # Of the device's clock, which ticks at 1 to 2 GHz.
        self._head_start = int(HEAD_START_SECONDS * 2e9)

    def __call__(self, call: Callable[[int], object], index: int) -> float:
        with torch.cuda.device(self._device):
            self._flush.zero_()
            return (self._on_host if self._host else self._on_device)(call, index)

    def _on_device(self, call: Callable[[int], object], index: int) -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        # While the device waits, the host gets ahead: what is timed is the device's work and,
        # where the host cannot keep up or waits for the device, the waiting for it.
        torch.cuda._sleep(self._head_start)
        start.record()
        call(index)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _on_host(self, call: Callable[[int], object], index: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        call(index)
        torch.cuda.synchronize()
        return time.perf_counter() - started


def median(samples: Sequence[float]) -> float:
    """The median of a contender's samples, in seconds."""
    return statistics.median(samples)
