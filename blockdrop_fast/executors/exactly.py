"""How an engine's methods run, whatever mode and precision their caller is in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


def exactly(method: Method) -> Method:
    """Run a method without gradients and at the engine's own precision, whatever autocast says.

    Not in inference mode, not even in the caller's: what is returned are ordinary tensors, and what
    an executor allocates once serves later calls in whatever mode.

    Args:
        method: of an object with a ``device``.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        casts = torch.is_autocast_enabled(self.device.type)
        exactly = torch.autocast(self.device.type, enabled=False) if casts else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), exactly:
            return method(self, *args, **kwargs)

    return cast(Method, call)
