"""CUDA graphs and streams behind plain calls, which do without where there is no GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")


def is_capturing(device: torch.device) -> bool:
    """Whether somebody captures the current stream of ``device`` in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Recorded(Generic[Result]):
    """A function of tensors that stay where they are, cheap to call again and again.

    On a GPU the first call just runs the function, which compiles kernels and lets cuDNN choose
    its algorithms; the second one captures it in a CUDA graph; from then on a call is one launch,
    and returns the tensors of the capture with new values in them. Calls from another thread before
    the capture start over, as torch keeps cuDNN's choices for each thread. On a CPU, and while
    somebody else captures a graph, every call runs the function.

    Args:
        function: without arguments. It must neither wait for the device nor use other streams.
        pool: of memory, shared with graphs that never run at the same time as this one
            (``torch.cuda.graph_pool_handle()``); None where there is no GPU.
    """

    def __init__(self, function: Callable[[], Result], pool: tuple[int, int] | None):
        self._function = function
        self._pool = pool
        self._in_thread = threading.local()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Result | None = None

    def __call__(self) -> Result:
        """Run or replay on the current stream."""
        if self._pool is None or torch.cuda.is_current_stream_capturing():
            return self._function()
        if self._graph is None:
            with tuned_convolutions():
                if not hasattr(self._in_thread, "has_run"):
                    self._in_thread.has_run = True
                    return self._function()
                self._capture()
        self._graph.replay()
        return self._result

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on to allocate memory while this one captures.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._result = self._function()
        self._graph = graph


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
    """A stream beside the caller's. On a CPU, work there runs in between.

    Args:
        device: of the stream.
    """

    def __init__(self, device: torch.device):
        self._device = device
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._done = torch.cuda.Event()

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


class CallOrder:
    """Keeps calls that share buffers in order, whatever streams they come on.

    Args:
        device: of the buffers.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._finished = torch.cuda.Event() if device.type == "cuda" else None

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call's work on the current stream: waits for the one before."""
        # Inside of somebody's capture, events of outside are out of reach, and the other way round.
        outside = self._finished is not None and not is_capturing(self._device)
        if outside:
            torch.cuda.current_stream(self._device).wait_event(self._finished)
        yield
        if outside:
            self._finished.record(torch.cuda.current_stream(self._device))
