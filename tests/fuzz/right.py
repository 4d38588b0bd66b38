"""What is right, and what a call must not give."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.networks.gated import GatedPolicy
from tests.fuzz.arguments import config_of, in_dtype, model_of
from tests.random_networks import make_images


class Wrong(AssertionError):
    """A call gave what it must not."""


def replayed(name: str, dtype: torch.dtype, images: Tensor, output: Sequence) -> Tensor:
    """Logits of the reference in a precision, at what an output says was decided."""
    model, inputs = in_dtype(name, dtype), images.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        if isinstance(model, bdf.Cascade):
            return model.replay(inputs, output)
        if isinstance(model, bdf.BlockDrop) and isinstance(model.policy, GatedPolicy):
            return model.policy.replay(model.backbone, inputs, output)
        backbone = model.backbone if isinstance(model, bdf.BlockDrop) else model
        return backbone(inputs, output.decisions)


@functools.cache
def relative_error(name: str, dtype: torch.dtype) -> float:
    """Of eager PyTorch on 64 images, all blocks kept: few images say little."""
    images, blocks = make_images(config_of(name), 64), config_of(name).num_blocks
    keep = torch.ones(64, blocks, dtype=torch.bool)
    model = model_of(name)
    backbone = model.networks[0] if isinstance(model, bdf.Cascade) else model
    backbone = backbone.backbone if isinstance(backbone, bdf.BlockDrop) else backbone
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        exact = copy.deepcopy(backbone).double()(images.double(), keep)
        eager = copy.deepcopy(backbone).to(dtype)(images.to(dtype), keep)
    return float((eager.double() - exact).abs().max() / exact.abs().max())


def check_logits(name: str, dtype: torch.dtype, images: Tensor, output: Sequence) -> None:
    logits = output.logits
    exact = replayed(name, torch.float64, images, output)
    if logits.shape != exact.shape:
        raise Wrong(f"logits of shape {tuple(logits.shape)}, expected {tuple(exact.shape)}")
    if not len(logits):
        return
    eager = replayed(name, dtype, images, output).double()
    if not eager.isfinite().all() or not exact.isfinite().all():
        return  # too large for the precision, whoever computes
    largest = float(exact.abs().max())
    error = max(float((eager - exact).abs().max()), relative_error(name, dtype) * largest)
    # In float64 the reference is no more exact than what it is compared with.
    roundings = 8 if dtype == torch.float64 else 4
    limit = 2 * error + roundings * torch.finfo(dtype).eps * largest
    found = float((logits.double() - exact).abs().max())
    if not found <= limit:
        raise Wrong(f"logits are off by {found:.3g}, the tolerance is {limit:.3g}")
