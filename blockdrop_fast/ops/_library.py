"""The dispatcher library that all operators of the package are defined in.

An op module defines its schema, registers its readable reference as the kernel of every device and
its shape function for tracing. The C++ and CUDA kernels in ``csrc/`` register themselves for their
device when the extension is loaded and then take precedence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch

from blockdrop_fast.decisions import check_tensor

LIBRARY = torch.library.Library("blockdrop_fast", "DEF")
# The dispatch key of references: it serves every device that has no kernel of its own.
REFERENCE = "CompositeExplicitAutograd"


def define(schema: str, reference: Callable, fake: Callable, check: Callable) -> None:
    """Define an operator.

    Args:
        schema: as of ``torch.library.define``, without the namespace.
        reference: what it computes, in PyTorch operations, on any device. Called outside autocast,
            of which kernels know nothing either.
        fake: its shape function.
        check: raises TypeError or ValueError for arguments that the operator does not take, as far
            as is known without the tensors' values. Called before ``fake``; the reference calls it
            itself.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def exact_reference(*args):
        kind = next(one.device.type for one in args if isinstance(one, torch.Tensor))
        if not torch.amp.is_autocast_available(kind):
            return reference(*args)
        with torch.autocast(kind, enabled=False):
            return reference(*args)

    def checked_fake(*args):
        check(*args)
        return fake(*args)

    LIBRARY.impl(name, _of_dense_tensors(name, exact_reference), REFERENCE)

    torch.library.register_fake(
        f"blockdrop_fast::{name}", _of_dense_tensors(name, checked_fake), lib=LIBRARY
    )


def _of_dense_tensors(name: str, kernel: Callable) -> Callable:
    """``kernel`` of an operator, which refuses tensors that are not dense, or on several devices.

    Kernels of a device need no such check: PyTorch calls them for dense tensors on it only. What
    else there is among the arguments leads it here.
    """
    arguments = getattr(torch.ops.blockdrop_fast, name).default._schema.arguments
    operands = [
        (at, one.name, str(one.type) != "Tensor")
        for at, one in enumerate(arguments)
        if "Tensor" in str(one.type)
    ]

    @wraps(kernel)
    def call(*args):
        device = None
        for at, argument, optional in operands:
            tensor = args[at] if at < len(args) else None
            if tensor is None and optional:
                continue
            check_tensor(argument, tensor, device)
            device = tensor.device
        return kernel(*args)

    return call
