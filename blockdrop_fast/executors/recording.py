"""CUDA graphs and streams behind plain calls, which do without where there is no GPU."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

from blockdrop_fast._extension import build_record, extension_status

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
            with _tuned_convolutions():
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
def _tuned_convolutions() -> Iterator[None]:
    """Let cuDNN time its algorithms: worth it, as a recorded function's shapes never change."""
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


def why_no_switches() -> str:
    """Why CUDA graphs cannot choose by counts on the device; empty if they can."""
    status = extension_status()
    if not status.loaded:
        return f"switch nodes in CUDA graphs need the compiled extension: {status.reason}"
    if status.build_info.get("cuda") is None:
        reason = build_record().get("why_no_cuda") or "it was built without CUDA"
        return f"switch nodes in CUDA graphs need the extension's CUDA part: {reason}"
    return _conditional().why_not()


def _conditional():
    """The part of the extension that builds switch nodes; csrc/cuda/conditional.h documents it."""
    from blockdrop_fast import _C

    return _C.conditional


class Switches:
    """For each block of a network one of two bodies or none, by its count of active images.

    In a function that is captured in a CUDA graph each block's choice becomes a switch node of it,
    and each launch of the graph chooses by the counts of that moment; the host is not asked.
    Everywhere else the host chooses, and waits for the counts if they are on a GPU. Before that it
    runs both bodies for a count of 0: a capture needs kernels that are compiled, and convolutions
    that are tuned, for whatever body a later launch may choose.

    On a GPU ``why_no_switches`` has to be empty.

    Args:
        device: of the counts, and of the bodies' work.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._by_host: list[int] | None = None  # body of each block; 2: none of the two
        if device.type != "cuda":
            return
        conditional = _conditional()
        with torch.cuda.device(device):
            # A body is captured on a stream of its own and has a capture id of its own. So torch
            # does not take its allocations for the graph's, and would put them into memory that
            # others use by the time the graph runs, unless a pool is named. It cannot be the
            # graph's pool: torch refuses one that a capture is using already.
            self._pool = torch.cuda.MemPool()
            stream = conditional.make_stream()
        self._stream = torch.cuda.ExternalStream(stream, device)
        weakref.finalize(self, conditional.destroy_stream, stream).atexit = False

    def set(self, counts: Tensor, all_from: Tensor) -> None:
        """Say what the following ``run`` go by; captured, it is one kernel for all blocks.

        Args:
            counts: (K,) int32, how many images keep each block; in a capture, to stay in place.
            all_from: (1,) int32 above 0, the count from which ``everyone`` runs; likewise.
        """
        self._counts = counts
        self._by_host = None
        if is_capturing(self._device):
            self._handles = _conditional().set_handles(
                self._capturing_stream(), counts.data_ptr(), all_from.data_ptr(), len(counts)
            )
            return
        limit = int(all_from)
        self._by_host = [2 if count == 0 else int(count >= limit) for count in counts.tolist()]
        self._nobody = torch.zeros_like(all_from)

    def run(
        self, block: int, some: Callable[[Tensor], None], everyone: Callable[[Tensor], None]
    ) -> None:
        """Run ``some``, ``everyone`` or, if nobody keeps the block, neither.

        Args:
            block: its number, from 0; once for each ``set``.
            some: does the block's work in place, given its (1,) count; nothing for a count of 0.
            everyone: likewise, faster where most images keep the block.
        """
        bodies = (some, everyone)
        count = self._counts[block : block + 1]
        if self._by_host is None:
            graphs = _conditional().add_switch(self._capturing_stream(), self._handles[block])
            for body, graph in zip(bodies, graphs, strict=True):
                with self._captured_in(graph):
                    body(count)
            return
        for body in bodies:
            body(self._nobody)
        if self._by_host[block] < len(bodies):
            bodies[self._by_host[block]](count)

    def _capturing_stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream

    @contextmanager
    def _captured_in(self, graph: int) -> Iterator[None]:
        """Capture in the graph of a body, not in the one around it."""
        pool = torch.cuda.use_mem_pool(self._pool, self._device)
        with torch.cuda.stream(self._stream), pool:
            _conditional().begin_body(self._stream.cuda_stream, graph)
            try:
                yield
            finally:
                _conditional().end_body(self._stream.cuda_stream)
