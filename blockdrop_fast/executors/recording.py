"""CUDA graphs and streams behind plain calls, which do without where there is no GPU."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")
# Python's garbage and the state of torch's allocators are the process's.
_one_at_a_time = threading.Lock()
# torch's allocators may go on to ask a capture that failed which streams are its own.
_failed: list[torch.cuda.CUDAGraph] = []


def is_capturing(device: torch.device) -> bool:
    """Whether somebody captures the current stream of ``device`` in a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class Recorded(Generic[Result]):
    """A function of tensors that stay where they are, cheap to call again and again.

    On a GPU the first call just runs the function, which compiles kernels and lets cuDNN choose
    its algorithms; the second one captures it in a CUDA graph; from then on a call is one launch,
    and returns the tensors of the capture with new values in them. Calls from another thread before
    the capture start over, as torch keeps cuDNN's choices for each thread. On a CPU every call runs
    the function, and so does one that somebody else captures.

    Args:
        device: a GPU, which is the current device at each call, or a CPU.
        pool: of memory, shared with graphs that never run at the same time as this one
            (``torch.cuda.graph_pool_handle()``); None on a CPU.
        priority: of the kernels in the graph, 0 or less; the least comes first.
    """

    def __init__(self, device: torch.device, pool: tuple[int, int] | None, priority: int = 0):
        self._device, self._pool, self._priority = device, pool, priority
        self._in_thread = threading.local()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Result | None = None

    def __call__(self, function: Callable[[], Result]) -> Result:
        """Run or replay on the current stream.

        Args:
            function: the same at each call, but for calls that somebody else captures. It must
                neither wait for the device nor use other streams. It is not kept.

        Raises:
            RuntimeError: somebody else captures the first call of this thread.
        """
        if self._pool is None:
            return function()
        capturing = is_capturing(self._device)
        if self._graph is None or capturing:
            has_run = hasattr(self._in_thread, "has_run")
            if capturing and not has_run:
                raise RuntimeError(
                    "images: this thread meets a batch of their size for the first time while a "
                    "CUDA graph is captured; make the same call before the capture"
                )
            with tuned_convolutions():
                if capturing or not has_run:
                    result = function()
                    self._in_thread.has_run = True
                    return result
                self._capture(function)
        self._graph.replay()
        return self._result

    def _capture(self, function: Callable[[], Result]) -> None:
        """Whatever it raises, the current stream stays, and other graphs can be captured."""
        graph = torch.cuda.CUDAGraph()
        stream = _capture_stream(self._device, self._priority)
        with _one_at_a_time, _no_garbage_collection(), torch.cuda.stream(stream):
            torch.cuda.empty_cache()  # a capture cannot
            try:
                # Other threads may go on to allocate memory while this one captures.
                graph.capture_begin(self._pool, "thread_local")
                self._result = function()
                graph.capture_end()
            except BaseException:
                _failed.append(graph)
                with suppress(RuntimeError):
                    graph.capture_end()
                with suppress(RuntimeError):  # which leaves this out where CUDA gave up
                    torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
                raise
        self._graph = graph


@functools.cache
def _capture_stream(device: torch.device, priority: int) -> torch.cuda.Stream:
    """For all captures on a device: torch hands each of its streams out again after 32."""
    return torch.cuda.Stream(device, priority=priority)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Kernels or graphs of somebody else that it would free would break a capture."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def tuned_convolutions() -> Iterator[None]:
    """Let cuDNN time its algorithms for each new shape: worth it where shapes come again."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class SideStream:
    """A stream of high priority beside the caller's. On a CPU, work there runs in between.

    Args:
        device: of the stream.
    """

    def __init__(self, device: torch.device):
        self._device = device
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=-1)
            self._done, self._finished = torch.cuda.Event(), torch.cuda.Event()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Keep calls that share buffers in order, whatever streams they come on."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).wait_event(self._finished)
        yield
        if self._device.type == "cuda":
            self._finished.record(torch.cuda.current_stream(self._device))

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Put work on the side stream, after what is on the caller's so far."""
        if self._device.type != "cuda":
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
            self._done.record()

    def wait(self) -> None:
        """Make the host wait for what was forked last."""
        if self._device.type == "cuda":
            self._done.synchronize()

    def join(self) -> None:
        """Make the caller's stream wait for what was forked last."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).wait_event(self._done)
