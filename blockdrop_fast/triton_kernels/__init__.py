"""Kernels in Triton, for NVIDIA GPUs. Importing this needs neither triton nor a GPU."""

from __future__ import annotations

import functools

import torch

# Not float32: tensor cores take it for TF32, with errors of several times the tolerance.
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
# Tensor cores with bfloat16, and asynchronous copies into shared memory.
OLDEST_CAPABILITY = (8, 0)


@functools.cache
def why_not(device: torch.device | None = None) -> str:
    """Why the Triton kernels do not run on a device; empty if they do.

    Args:
        device: a CUDA device; None: the current one.
    """
    reason = _why_no_triton()
    if reason:
        return reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None:
        return "they are written for NVIDIA GPUs"
    if capability < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return "{} has compute capability {}.{}; they need 8.0".format(name, *capability)
    return ""


def _why_no_triton() -> str:
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken installation raises anything
        return f"triton cannot be imported: {error}"
    return ""
