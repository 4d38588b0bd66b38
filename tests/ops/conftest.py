"""Operators meet the worst of fresh memory; walks also every instruction set."""

import pytest
import torch

from blockdrop_fast._extension import extension_status
from blockdrop_fast.ops.walk import walk_isa


@pytest.fixture(autouse=True)
def _poison_fresh_memory():
    """Fresh memory is NaN or the largest integer, so that no element can be forgotten or read.

    PyTorch fills it so as long as it is asked for deterministic algorithms, in C++ kernels too.
    """
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request, monkeypatch):
    """Each instruction set that runs here; elsewhere the test is skipped with the reason."""
    if not extension_status().loaded:
        pytest.skip(f"no compiled kernels: {extension_status().reason}")
    monkeypatch.setenv("BLOCKDROP_CPU_ISA", request.param)
    try:
        assert walk_isa() == request.param
    except RuntimeError as error:
        pytest.skip(str(error))
    return request.param
