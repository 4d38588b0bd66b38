"""Operators by themselves, against their references in float64."""

from __future__ import annotations

import random
import re
from contextlib import ExitStack

import torch
from torch import Tensor

from blockdrop_fast import ops
from tests.fuzz.arguments import ALLOWED, describe, mutated, operator_calls, strange, surroundings
from tests.fuzz.right import Wrong

REFERENCES = {
    name.removesuffix("_reference"): getattr(ops, name)
    for name in ops.__all__
    if name.endswith("_reference")
}

# What PyTorch's dispatcher and its Python binding say of a call before any code of ours runs.
REFUSED = re.compile(
    r"blockdrop_fast::\w+\(\) Expected a value of type '|"
    r"There were no tensor arguments to this function|"
    r"Could not run 'blockdrop_fast::\w+' with arguments from the '\w*NestedTensor\w*' backend"
)


def call_operator(rng: random.Random, operator: str, args: list) -> object:
    """An operator, by PyTorch's name or by ours."""
    try:
        return getattr(rng.choice([torch.ops.blockdrop_fast, ops]), operator)(*args)
    except RuntimeError as error:  # NotImplementedError is one
        if REFUSED.match(str(error)):
            raise TypeError(str(error).split("\n")[0]) from None
        raise


def fuzz_operator(rng: random.Random, about: list) -> None:
    """An operator by itself, against its reference in float64."""
    operator, args = rng.choice(operator_calls())
    args = list(args)
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        at = rng.randrange(len(args))
        args[at] = mutated(rng, args[at])
    about += [operator, *map(describe, args)]
    with ExitStack() as stack:
        about.append(surroundings(rng, stack))
        isa = ops.walk_isa()
        if isa not in ("avx512", "avx2", "portable", "reference"):
            raise Wrong(f"runs with {isa}")
        found = call_operator(rng, operator, args)
        try:
            expected = run_reference(operator, args, torch.float64)
        except ALLOWED as error:
            raise Wrong(f"the kernel takes what the reference refuses: {error}") from None
        found = found if isinstance(found, tuple) else (found,)
        for one, other in zip(found, expected, strict=True):
            if one.shape != other.shape:
                raise Wrong(f"shape {tuple(one.shape)}, expected {tuple(other.shape)}")
        if any(one.is_meta for one in found):
            return  # shapes are all there is
        if all(is_close(one, other, 0.0) for one, other in zip(found, expected, strict=True)):
            return
        decided = [
            pair for pair in zip(found, expected, strict=True) if pair[0].dtype == torch.bool
        ]
        if any(not torch.equal(one, other) for one, other in decided):
            return  # a logit close to a threshold; decisions have tests of their own
        # Where values are huge, float32 is far off, whoever computes.
        eager = run_reference(operator, args, torch.float32)
        for one, other, third in zip(found, expected, eager, strict=True):
            error = float((third.double() - other.double()).abs().max()) if one.numel() else 0.0
            if not is_close(one, other, 2 * error):
                raise Wrong(
                    f"off by {(one.double() - other).abs().max():.3g}, eager by {error:.3g}"
                )


def run_reference(operator: str, args: list, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """In a precision; ones stand for tensors without values."""
    wide = not operator.startswith("walk_half")  # whose weights are bytes of a precision

    def exact(one: object) -> object:
        if not isinstance(one, Tensor):
            return one
        one = one.detach()
        one = torch.ones(one.shape, dtype=one.dtype) if one.is_meta else one
        return one.to(dtype) if wide and one.is_floating_point() else one

    with torch.autocast("cpu", enabled=False):
        found = REFERENCES[operator](*map(exact, args))
    return found if isinstance(found, tuple) else (found,)


def is_close(one: Tensor, other: Tensor, error: float) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    if not one.numel() or not one.isfinite().all() or not other.isfinite().all():
        return True
    limit = 1e-4 * max(1e-30, float(other.abs().max())) + error
    return float((one.double() - other).abs().max()) <= limit


def fuzz_gathered_conv(rng: random.Random, about: list) -> None:
    """The convolution of active images, whose reference serves the CPU."""
    dtype, kernel = rng.choice([torch.float32, torch.float64, torch.bfloat16]), rng.choice([1, 3])
    rows, c_in, c_out, stride = rng.randint(1, 5), rng.randint(1, 9), rng.randint(1, 9), 1
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layout = {"memory_format": torch.channels_last}
    x, out = (torch.randn(rows, c, 4, 6).to(dtype).contiguous(**layout) for c in (c_in, c_out))
    weight = torch.randn(c_out, c_in, kernel, kernel).to(dtype)
    weight = strange(rng, weight) if rng.random() < 0.1 else weight
    active = torch.randperm(rows)[: rng.randint(1, rows)].int()
    args = [
        out, x, ops.pack_conv(weight), torch.randn(c_out, dtype=wide), active,
        torch.tensor([len(active)], dtype=torch.int32), kernel, stride, True, True,
    ]  # fmt: skip
    for _ in range(rng.choice([0, 1, 1, 2])):
        at = rng.randrange(len(args))
        args[at] = mutated(rng, args[at])
    about += list(map(describe, args))
    exact = list(args)
    if isinstance(args[0], Tensor) and args[0].numel() < 2**30:
        exact[0] = args[0].detach().clone()
    with torch.no_grad():
        call_operator(rng, "gathered_conv_", args)
    if any(isinstance(one, Tensor) and one.is_meta for one in args):
        return
    exact = [
        one.detach().double() if isinstance(one, Tensor) and one.is_floating_point() else one
        for one in exact
    ]
    ops.gathered_conv_reference_(*exact)
    error = torch.finfo(args[0].dtype).eps * float(exact[0].abs().max())
    if not is_close(args[0].detach(), exact[0], error):
        raise Wrong(f"off by {(args[0].double() - exact[0]).abs().max():.3g}")
