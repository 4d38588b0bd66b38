"""What several tests of measurements need."""

from __future__ import annotations

import contextlib
import time
import types

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.measure.workload import Workload, settle


@pytest.fixture
def workload() -> Workload:
    """ResNet-8 on 64 tiny images, each block dropped by about half of them."""
    torch.manual_seed(0)
    backbone = bdf.resnet_cifar(8)
    settle(backbone)
    model = bdf.BlockDrop(backbone, bdf.policy_resnet8(3)).eval().requires_grad_(False)
    return Workload("resnet8", model, torch.randn(64, 3, 8, 8), torch.rand(64, 3) < 0.5)


class FakeGraph:
    """A CUDA graph without CUDA: what ``capture`` records, ``replay`` runs again."""

    current = None

    def __init__(self):
        self.recorded = []

    def replay(self):
        for operation in self.recorded:
            operation()


@pytest.fixture
def fake_cuda(monkeypatch):
    """Just enough of torch.cuda, on CPU tensors, for code that captures and times."""

    class Nothing(contextlib.nullcontext):
        def __init__(self, *_, **__):
            super().__init__()

        def wait_stream(self, _):
            pass

    class Capture:
        def __init__(self, graph, **_):
            self.graph = graph

        def __enter__(self):
            FakeGraph.current = self.graph

        def __exit__(self, *_):
            FakeGraph.current = None

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = time.perf_counter()

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1e3 * (end.time - self.time)

    properties = types.SimpleNamespace(L2_cache_size=1024)
    fakes = {
        "device": Nothing, "Stream": Nothing, "stream": Nothing, "current_stream": Nothing,
        "CUDAGraph": FakeGraph, "graph": Capture, "Event": Event,
        "get_device_properties": lambda _: properties,
        "_sleep": lambda cycles: time.sleep(cycles / 2e9), "synchronize": lambda: None,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return FakeGraph
