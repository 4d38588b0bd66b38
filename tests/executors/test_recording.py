"""What is recorded when, on a make-believe GPU."""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager

import pytest
import torch

from blockdrop_fast.executors import recording
from blockdrop_fast.executors.recording import Recorded

GPU, POOL = torch.device("cuda", 1), (0, 7)


class FakeGraphs:
    """Stands in for torch.cuda: what runs while capturing only leaves a recording."""

    def __init__(self, monkeypatch):
        self.stream = "caller's"
        self.captured_by_others = False
        self.recording = None  # the graph under way
        self.allocating: set[tuple[int, int]] = set()
        self.replays = 0
        self.gives_up = False  # as CUDA does after a call that a capture does not allow
        graphs = self

        class Graph:
            def capture_begin(self, pool, mode):
                assert graphs.recording is None
                assert (pool, mode, graphs.stream) == (POOL, "thread_local", ("stream", GPU, -2))
                assert recording._one_at_a_time.locked()
                assert not gc.isenabled()
                graphs.recording = self
                graphs.allocating.add(pool)

            def capture_end(self):
                if graphs.recording is not self:
                    raise RuntimeError("nothing is captured")
                graphs.recording = None
                if graphs.gives_up:
                    raise RuntimeError("capture invalidated")
                graphs.allocating.discard(POOL)

            def replay(self):
                graphs.replays += 1

        @contextmanager
        def stream(new):
            before, self.stream = self.stream, new
            try:
                yield
            finally:
                self.stream = before

        def end_allocating(index, pool):
            assert index == GPU.index
            if pool not in self.allocating:
                raise RuntimeError("not allocating to this pool")
            self.allocating.discard(pool)

        @contextmanager
        def device(new):
            assert new == GPU
            yield

        def make_stream(device, priority):
            return ("stream", device, priority)

        def is_capturing():
            return self.captured_by_others

        for name, fake in {
            "CUDAGraph": Graph,
            "Stream": make_stream,
            "stream": stream,
            "device": device,
            "empty_cache": lambda: None,
            "is_current_stream_capturing": is_capturing,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocating, raising=False)
        recording._capture_stream.cache_clear()


@pytest.fixture
def graphs(monkeypatch):
    yield FakeGraphs(monkeypatch)
    recording._capture_stream.cache_clear()
    recording._failed.clear()


def make_recorded():
    return Recorded(GPU, POOL, priority=-2)


def test_runs_then_captures_then_replays(graphs):
    calls, tuned = [], []

    def function():
        calls.append(graphs.recording is not None)
        tuned.append(torch.backends.cudnn.benchmark)
        return len(calls)

    before = torch.backends.cudnn.benchmark
    recorded = make_recorded()
    assert [recorded(function) for _ in range(4)] == [1, 2, 2, 2]
    assert calls == [False, True]
    assert graphs.replays == 3  # capturing does not execute
    assert tuned == [True, True]
    assert torch.backends.cudnn.benchmark == before
    assert gc.isenabled()


def test_captures_in_a_thread_that_has_run(graphs):
    """Another thread's choices of algorithms are not known, and a capture cannot make them."""
    calls, recorded = [], make_recorded()

    def function():
        calls.append(graphs.recording is not None)

    recorded(function)
    for _ in range(2):
        thread = threading.Thread(target=recorded, args=(function,))
        thread.start()
        thread.join()
    assert calls == [False] * 3
    recorded(function)
    assert calls == [False] * 3 + [True]
    assert graphs.replays == 1


def test_runs_in_the_graph_of_somebody_else(graphs):
    calls, recorded = [], make_recorded()
    for graphs.captured_by_others in (False, False, True):
        recorded(lambda: calls.append(graphs.recording is not None))
    assert calls == [False, True, False]
    assert graphs.replays == 1


def test_first_run_in_the_graph_of_somebody_else(graphs):
    """It would compile, and try algorithms, which a capture does not survive."""
    recorded, calls = make_recorded(), []
    graphs.captured_by_others = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="images: this thread meets a batch of their size"):
            recorded(lambda: calls.append(0))
    assert not calls


@pytest.mark.parametrize("gives_up", [False, True])
@pytest.mark.parametrize("raises", [RuntimeError("in a kernel"), KeyboardInterrupt()])
def test_failed_capture_leaves_nothing_behind(graphs, raises, gives_up):
    recorded, calls = make_recorded(), []

    def function():
        calls.append(graphs.recording is not None)
        graphs.gives_up = gives_up and len(calls) == 2
        if len(calls) == 2:
            raise raises

    recorded(function)
    with pytest.raises(type(raises)) as caught:
        recorded(function)
    assert caught.value is raises
    assert graphs.stream == "caller's"
    assert not graphs.allocating
    assert gc.isenabled()
    assert not recording._one_at_a_time.locked()
    graphs.gives_up = False
    recorded(function)
    assert calls == [False, True, True]
    assert graphs.replays == 1


def test_capture_that_cuda_gives_up(graphs):
    """Nothing is raised before its end."""
    recorded = make_recorded()
    recorded(lambda: None)
    graphs.gives_up = True
    with pytest.raises(RuntimeError, match="invalidated"):
        recorded(lambda: None)
    assert graphs.stream == "caller's"
    assert not graphs.allocating
