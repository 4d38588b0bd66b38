"""Operators meet the worst of fresh memory."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _poison_fresh_memory():
    """Fresh memory is NaN or the largest integer, so that no element can be forgotten or read.

    PyTorch fills it so as long as it is asked for deterministic algorithms, in C++ kernels too.
    """
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
