"""What the tests of the CPU walks share beside the fixtures of conftest.py."""

import copy

import pytest
import torch

from blockdrop_fast._extension import extension_status

compiled = pytest.mark.skipif(
    not extension_status().loaded, reason=f"no compiled kernels: {extension_status().reason}"
)


def assert_within_tolerance(logits, network, images, decisions):
    """max|y - y64| <= 2 max|y_pt - y64| + 4 eps max|y64|, y_pt eager with unfolded batch norm."""
    exact = copy.deepcopy(network).double()
    with torch.no_grad():
        y64 = exact(images.double(), decisions)
        y_pt = network(images.contiguous(), decisions)
    error = (logits - y64).abs().max()
    limit = 2 * (y_pt - y64).abs().max() + 4 * torch.finfo(torch.float32).eps * y64.abs().max()
    assert error <= limit, f"error {error:.3g}, limit {limit:.3g}"
