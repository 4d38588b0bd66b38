"""Kernels on a GPU meet the worst of fresh memory."""

import os

import pytest
import torch

from tests.gpu import bounded


def pytest_configure(config) -> None:
    bounded.configure(config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    return bounded.num_processes()


def _poison() -> None:
    """What kernels forget to write, or read without need, is NaN.

    Deterministic algorithms, as the tests of the CPU use, would run other kernels and fills between
    ours. The caching allocator hands out this memory again: one large piece, and many small ones,
    which it keeps apart.
    """
    if "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:
        return
    poison = [torch.full((1 << 28,), torch.nan, device="cuda")]
    poison += [torch.full((1 << 18,), torch.nan, device="cuda") for _ in range(64)]
    del poison


@pytest.fixture(autouse=True)
def poison_free_memory():
    """Free memory is NaN when a test begins, and again whenever it calls this."""
    _poison()
    return _poison
