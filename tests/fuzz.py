"""Public calls with random arguments, right and wrong ones, each checked against float64.

    python -m tests.fuzz --cases 10000 [--first N]

Allowed: the right result, TypeError, ValueError (OSError of paths, and of operators what PyTorch's
dispatcher refuses with NotImplementedError). What is right: logits within the tolerance of
docs/architecture.md from the float64 reference at the decisions that were returned. A case is a
function of its number, so ``--first N --cases 1`` is case N again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import functools
import os
import random
import resource
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import blockdrop_fast as bdf
from blockdrop_fast.networks.gated import GatedPolicy
from blockdrop_fast.networks.policy import PolicyNetwork
from blockdrop_fast.ops.gathered_conv import pack_conv
from tests.random_networks import (
    BOTTLENECK,
    CIFAR,
    CUSTOM,
    GATED,
    NARROWER,
    make_gated_model,
    make_images,
    make_look_model,
    make_menu_policy,
    make_model,
    make_network,
)

ALLOWED = (TypeError, ValueError)
MEMORY = 12 << 30  # bytes of address space: what a wrong number asks for fails at once
SECONDS = 900  # a case that takes longer hangs
SETS = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 1, 1]]).bool()


class Wrong(AssertionError):
    """A call gave what it must not."""


# ------------------------------------------------------------------ models


def _cascade() -> bdf.Cascade:
    cascade = bdf.Cascade([make_network(CIFAR, seed) for seed in range(3)]).eval()
    cascade.set_thresholds([0.2, 0.3])
    return cascade


def _fixed() -> bdf.BlockDrop:
    keep = torch.tensor([True, False, True, False, True])
    return bdf.BlockDrop(make_network(CIFAR), bdf.FixedPolicy(keep)).eval()


def _menu() -> bdf.BlockDrop:
    policy = make_menu_policy(SETS, make_images(CIFAR, 64))
    return bdf.BlockDrop(make_network(CIFAR), policy).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "backbone": lambda: make_network(CIFAR),
    "bottleneck": lambda: make_network(BOTTLENECK),
    "narrower": lambda: make_network(NARROWER),
    **{name: lambda config=config: make_network(config) for name, config in CUSTOM.items()},
    "policy": lambda: make_model(CIFAR)[0],
    "policy of a bottleneck": lambda: make_model(BOTTLENECK)[0],
    "menu": _menu,
    "fixed": _fixed,
    "look": lambda: make_look_model()[0],
    "look, menu": lambda: make_look_model(sets=SETS)[0],
    **{kind: lambda kind=kind: make_gated_model(kind)[0] for kind in GATED},
    "cascade": _cascade,
}


@functools.cache
def model_of(name: str) -> nn.Module:
    return MODELS[name]()


@functools.cache
def engine_of(name: str, dtype: torch.dtype, strategy: str) -> bdf.Engine | None:
    """None where a model, a precision and a strategy do not go together."""
    try:
        return bdf.compile(model_of(name), dtype=dtype, strategy=strategy)
    except ALLOWED:
        return None


@functools.cache
def in_dtype(name: str, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model_of(name)).to(dtype)


def config_of(name: str) -> bdf.ResNetConfig:
    model = model_of(name)
    if isinstance(model, bdf.Cascade):
        return model.networks[0].config
    return (model.backbone if isinstance(model, bdf.BlockDrop) else model).config


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


# ------------------------------------------------------------------ tensors


def strange(rng: random.Random, tensor: Tensor) -> object:
    """Something else than a call expects in the place of a tensor."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        return tensor  # strange already
    choices: list[Callable[[], object]] = [
        lambda: None,
        lambda: tensor.tolist() if tensor.numel() < 1000 else [],
        lambda: tensor.resolve_neg().numpy() if tensor.dtype != torch.bfloat16 else "tensor",
        lambda: tensor.to("meta"),
        lambda: tensor.to_sparse() if tensor.numel() else None,
        lambda: tensor.unsqueeze(0),
        lambda: tensor[0] if tensor.ndim and len(tensor) else tensor.new_zeros(0),
        lambda: tensor.flatten(),
        lambda: tensor.to(rng.choice([torch.int64, torch.uint8, torch.float64, torch.float16])),
        lambda: tensor.to(torch.complex64),
        lambda: tensor[..., :-1],
        lambda: tensor[:0] if tensor.ndim else tensor,
        lambda: torch.cat([tensor, tensor], rng.randrange(tensor.ndim)) if tensor.ndim else None,
        lambda: tensor.new_zeros(tensor.shape[:-1] + (0,)),
        lambda: tensor.new_zeros(()),
        lambda: torch.nested.nested_tensor([tensor.float()]) if tensor.numel() else None,
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
    ]
    return rng.choice(choices)()


def valued(rng: random.Random, tensor: Tensor) -> Tensor:
    """The tensor with other values, of which NaN and infinity are wrong ones."""
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    kind = rng.choice(["zero", "denormal", "small", "large", "huge", "nan", "inf", "one huge"])
    scales = {"zero": 0.0, "denormal": 1e-41, "small": 1e-20, "large": 1e4, "huge": 1e30}
    if kind in scales:
        return tensor * scales[kind]
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    value = {"nan": float("nan"), "inf": float("-inf"), "one huge": 3e38}[kind]
    tensor.view(-1)[rng.randrange(tensor.numel())] = value
    return tensor


def laid_out(rng: random.Random, tensor: Tensor) -> Tensor:
    """The same values in another layout."""
    kind = rng.choice(["as is", "last", "steps", "offset", "turned", "negative", "parameter"])
    if kind == "last" and tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if kind == "steps" and tensor.ndim:
        room = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1)
        room[..., 1::2] = tensor
        return room[..., 1::2]
    if kind == "offset":
        room = tensor.new_zeros(tensor.numel() + 3)
        room[3:] = tensor.reshape(-1)
        return room[3:].view(tensor.shape)
    if kind == "turned" and tensor.ndim > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "negative" and tensor.is_floating_point():
        return torch._neg_view(-tensor)
    if kind == "parameter" and tensor.is_floating_point():
        return nn.Parameter(tensor.clone())
    return tensor


def given_images(rng: random.Random, name: str, dtype: torch.dtype) -> object:
    """Images for a model, mostly such as it takes."""
    config = config_of(name)
    batch = rng.choice([0, 1, 1, 2, 3, 5, 9, rng.choice([17, 33, 150])])
    if config.stem == "imagenet":
        size = rng.choice([(24, 32), (1, 1), (7, 33), (32, 32), (40, 16)])
    else:
        size = rng.choice([(8, 12), (4, 4), (32, 32), (12, 8), (36, 4), (6, 10)])
    if rng.random() < 0.1:
        size = (rng.randrange(40), rng.randrange(40))
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    images = torch.randn(batch, 3, *size, generator=generator).to(dtype)
    if batch and rng.random() < 0.1:
        images = images[:1].expand(batch, -1, -1, -1)
    if rng.random() < 0.2:
        images = valued(rng, images)
    if rng.random() < 0.5:
        images = laid_out(rng, images)
    return strange(rng, images.detach()) if rng.random() < 0.12 else images


def batch_of(images: object) -> int:
    if not isinstance(images, Tensor) or images.is_nested or not images.ndim:
        return 1
    return len(images)


def given_decisions(rng: random.Random, batch: int, blocks: int, sets: int | None = None) -> object:
    shape = (batch, blocks) if sets is None else (sets, batch, blocks)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    share = rng.choice([0.0, 0.2, 0.5, 0.9, 1.0])
    decisions = torch.rand(*shape, generator=generator) < share
    if batch and rng.random() < 0.1:
        decisions = decisions[..., :1, :].expand(shape)
    if rng.random() < 0.3:
        kinds = [torch.uint8, torch.int64, torch.float32, torch.float16, torch.int8]
        decisions = decisions.to(rng.choice(kinds))
    if rng.random() < 0.3:
        decisions = laid_out(rng, decisions)
    if rng.random() < 0.08 and decisions.numel() and decisions.dtype != torch.bool:
        decisions = decisions.detach().clone(memory_format=torch.contiguous_format)
        wrong = [2, -1, float("nan"), 0.5] if decisions.is_floating_point() else [2, -1, 7]
        decisions.view(-1)[rng.randrange(decisions.numel())] = rng.choice(wrong)
    return strange(rng, decisions.detach()) if rng.random() < 0.08 else decisions


def surroundings(rng: random.Random, stack: ExitStack) -> str:
    """Enter a mode that a caller may be in, and say which."""
    kind = rng.choice(["", "", "no_grad", "inference", "autocast", "threads", "anomaly"])
    if kind == "no_grad":
        stack.enter_context(torch.no_grad())
    elif kind == "inference":
        stack.enter_context(torch.inference_mode())
    elif kind == "autocast":
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
    elif kind == "anomaly":
        stack.enter_context(torch.autograd.set_detect_anomaly(True))
    elif kind == "threads":
        before = torch.get_num_threads()
        stack.callback(torch.set_num_threads, before)
        torch.set_num_threads(rng.choice([1, 2, 3, 5]))
    return kind


# ------------------------------------------------------------------ engines


def fuzz_engine(rng: random.Random, about: list) -> None:
    """A method of an engine."""
    name = rng.choice(list(MODELS))
    dtype = rng.choice([torch.float32] * 5 + [torch.float64, torch.bfloat16, torch.float16])
    strategy = rng.choice(["auto", "auto", "walk", "gather", "dense"])
    engine = engine_of(name, dtype, strategy)
    about += [name, str(dtype), strategy]
    if engine is None:
        raise ValueError("no such engine")
    blocks = config_of(name).num_blocks
    images = given_images(rng, name, dtype)
    batch = batch_of(images)
    methods = ["call", "call", "decide", "refresh"]
    if not isinstance(model_of(name), bdf.Cascade):
        methods += ["run", "run", "sets", "weighted"]
    method = rng.choice(methods)
    with ExitStack() as stack:
        about += [method, surroundings(rng, stack), describe(images)]
        if method == "refresh":
            engine.refresh()
            method = "call"
        if method in ("call", "decide"):
            options = {} if rng.random() < 0.8 else {"budget": rng.choice([2.5, 0.0, -1, 1e9, "x"])}
            about.append(options)
            if method == "decide":
                decisions = engine.decide(images, **options)
                check_decided(name, images, decisions)
                return
            output = engine(images, **options)
            check_ordinary(*output)
            check_decided(name, images, output.decisions)
            check_logits(name, dtype, images.detach(), output)
            return
        if method == "sets":
            decisions = given_decisions(rng, batch, blocks, rng.choice([0, 1, 2, 4]))
            about.append(describe(decisions))
            try:
                logits = engine.run_sets(images, decisions)
            except RuntimeError as error:
                if "run_sets: the model has" in str(error):  # as documented
                    raise ValueError(str(error)) from None
                raise
            for one, keep in zip(logits, decisions, strict=True):
                check_run(name, dtype, images, keep, one)
            return
        decisions = given_decisions(rng, batch, blocks)
        about.append(describe(decisions))
        weights = None
        if method == "weighted":
            weights = torch.rand(batch, blocks).to(rng.choice([dtype, torch.float32]))
            weights = valued(rng, weights) if rng.random() < 0.2 else weights
            weights = strange(rng, weights) if rng.random() < 0.1 else weights
            about.append(describe(weights))
        logits = engine.run(images, decisions, **({} if weights is None else {"weights": weights}))
        check_ordinary(logits)
        check_run(name, dtype, images, decisions, logits, weights)


def check_ordinary(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.requires_grad or tensor.is_inference():
            raise Wrong("an output is no ordinary tensor")


def check_decided(name: str, images: Tensor, decisions: Tensor) -> None:
    model, columns = model_of(name), config_of(name).num_blocks
    if isinstance(model, bdf.Cascade):
        columns = decisions.shape[1]
    if decisions.shape != (len(images), columns) or decisions.dtype != torch.bool:
        raise Wrong(f"decisions {tuple(decisions.shape)} {decisions.dtype}")
    menu = getattr(getattr(model, "policy", None), "menu", None)
    if menu is not None and len(decisions):
        known = (decisions[:, None] == menu.sets).all(2).any(1)
        if not known.all():
            raise Wrong("decisions that are no set of the menu")


def check_run(name, dtype, images, decisions, logits, weights=None) -> None:
    keep = decisions.detach() != 0
    if isinstance(model_of(name), bdf.BlockDrop):
        policy = model_of(name).policy
        if isinstance(policy, bdf.HaltingPolicy) or weights is not None:
            if weights is None:
                check_shape(name, images, logits)
                return
            if not isinstance(policy, bdf.HaltingPolicy):
                check_shape(name, images, logits)
                return
            if policy.hard:
                check_shape(name, images, logits)
                return
            output = bdf.WeightedOutput(logits, keep, weights.detach() * keep)
        else:
            output = bdf.Output(logits, keep)
    elif weights is not None:
        check_shape(name, images, logits)
        return
    else:
        output = bdf.Output(logits, keep)
    check_logits(name, dtype, images.detach(), output)


def check_shape(name: str, images: Tensor, logits: Tensor) -> None:
    if logits.shape != (len(images), config_of(name).num_classes):
        raise Wrong(f"logits of shape {tuple(logits.shape)}")


def fuzz_threads(rng: random.Random, about: list) -> None:
    """Several threads on one engine: each gets what it gets alone."""
    name, strategy = rng.choice(list(MODELS)), rng.choice(["auto", "gather"])
    engine = engine_of(name, torch.float32, strategy)
    about += [name, strategy]
    if engine is None:
        raise ValueError("no such engine")
    batches = [make_images(config_of(name), rng.randint(1, 6), seed) for seed in range(6)]
    alone = [engine(images) for images in batches]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(engine, batches), alone, strict=True):
            for one, other in zip(found, expected, strict=True):
                if not torch.equal(one, other):
                    raise Wrong("other bits beside other threads")


def fuzz_module(rng: random.Random, about: list) -> None:
    """A network as it is, with gradients or without."""
    name = rng.choice(list(MODELS))
    model, config = model_of(name), config_of(name)
    images = given_images(rng, name, torch.float32)
    batch = batch_of(images)
    with ExitStack() as stack:
        mode = surroundings(rng, stack)
        about += [name, mode, describe(images)]
        if isinstance(model, bdf.ResNet):
            decisions = given_decisions(rng, batch, config.num_blocks)
            about.append(describe(decisions))
            logits = model(images, decisions)
            output = bdf.Output(logits, decisions.detach() != 0)
        else:
            output = model(images)
        if mode == "autocast":
            return
        check_logits(name, torch.float32, images.detach(), output)
        if output.logits.requires_grad and output.logits.isfinite().all():
            output.logits.sum().backward()
            model.zero_grad()


def fuzz_policy(rng: random.Random, about: list) -> None:
    """A policy network by itself, and what decides from probabilities."""
    name = rng.choice(["policy", "policy of a bottleneck", "menu"])
    policy: PolicyNetwork = model_of(name).policy
    images = given_images(rng, name, torch.float32)
    what = rng.choice(["logits", "forward", "decide", "function"])
    about += [name, what, describe(images)]
    if what == "function":
        bdf.decide(images)
        return
    budget = rng.choice([None, None, 2.5, 1e9, float("nan"), "x"])
    call = {"logits": policy.logits, "forward": policy, "decide": policy.decide}[what]
    with torch.no_grad():
        found = call(images, budget) if what == "decide" else call(images)
    if len(found) != len(images):
        raise Wrong(f"{len(found)} rows of {len(images)} images")


# ------------------------------------------------------------------ operators


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "blockdrop_fast":
            self.calls.append((func._schema.name.split("::")[1], args, kwargs or {}))
        return func(*args, **kwargs or {})


OPERATORS = ("plan", "walk", "walk_gates", "walk_imagenet")  # modules, not functions of their names
REFERENCES = {
    name.removesuffix("_reference"): getattr(module, name)
    for module in map(import_module, (f"blockdrop_fast.ops.{stem}" for stem in OPERATORS))
    for name in vars(module)
    if name.endswith("_reference")
}


@functools.cache
def operator_calls() -> list[tuple]:
    """Right calls of the operators: those that engines make."""
    calls = {}
    for name in MODELS:
        engine = engine_of(name, torch.float32, "walk") or engine_of(name, torch.float32, "gather")
        if engine is None:
            continue
        images, blocks = make_images(config_of(name), 5), config_of(name).num_blocks
        keep = torch.rand(2, 5, blocks, generator=torch.Generator().manual_seed(0)) < 0.5
        # Not all models take all of these.
        with contextlib.suppress(*ALLOWED, RuntimeError), _Recorder() as recorder:
            output = engine(images)
            if not isinstance(model_of(name), bdf.Cascade):
                engine.run(images, output.decisions)
                if isinstance(output, bdf.WeightedOutput):
                    engine.run(images, output.decisions, output.weights)
                else:
                    engine.run_sets(images, keep)
                    engine.run(images, keep[0], torch.rand(5, blocks))
        for operator, args, _ in recorder.calls:
            calls[operator, name, len(args)] = (operator, args)
    keep = torch.rand(7, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    calls["plan", "", 1] = ("plan", (keep,))
    return list(calls.values())


def mutated(rng: random.Random, value: object) -> object:
    """An argument of an operator, changed; of the same type, as the dispatcher wants it."""
    if isinstance(value, Tensor):
        kind = rng.random()
        if value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_meta:
            return value
        if kind < 0.35:
            return laid_out(rng, value)
        if kind < 0.55:
            return valued(rng, value)
        found = strange(rng, value)
        return found if isinstance(found, Tensor) else value
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([0, 1, -1, value + 1, value - 1, 2**31 - 1, 2**31, 2**62, -(2**63)])
    if isinstance(value, float):
        return rng.choice([0.0, 1.0, -1.0, 0.5, float("nan"), float("inf")])
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
        value = list(value)
        kind = rng.choice(["less", "more", "none", "one", "all"])
        if kind == "less":
            return value[:-1]
        if kind == "more":
            return value + [1]
        if kind == "none":
            return []
        for at in range(len(value)) if kind == "all" else [rng.randrange(len(value))]:
            value[at] = mutated(rng, value[at])
        return value
    return value


def call_operator(operator: str, args: list) -> object:
    try:
        return getattr(torch.ops.blockdrop_fast, operator)(*args)
    except NotImplementedError as error:  # PyTorch's dispatcher
        raise TypeError(str(error).split("\n")[0]) from None


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
        found = call_operator(operator, args)
        exact = [
            one.detach().double() if isinstance(one, Tensor) and one.is_floating_point() else one
            for one in args
        ]
        try:
            expected = REFERENCES[operator](*exact)
        except ALLOWED as error:
            raise Wrong(f"the kernel takes what the reference refuses: {error}") from None
    found = found if isinstance(found, tuple) else (found,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            raise Wrong(f"shape {tuple(one.shape)}, expected {tuple(other.shape)}")
    if any(one.is_meta for one in found):
        return  # shapes are all there is
    decided = [
        (one, other) for one, other in zip(found, expected, strict=True) if one.dtype == torch.bool
    ]
    if any(not torch.equal(one, other) for one, other in decided):
        return  # a logit close to a threshold; decisions have tests of their own
    for one, other in zip(found, expected, strict=True):
        if not one.is_floating_point():
            if not torch.equal(one, other):
                raise Wrong("other integers than the reference")
        elif one.isfinite().all() and other.isfinite().all() and one.numel():
            limit = 1e-4 * max(1e-30, float(other.abs().max()))
            if not float((one.double() - other).abs().max()) <= limit:
                raise Wrong(f"off by {float((one.double() - other).abs().max()):.3g}")


def fuzz_gathered_conv(rng: random.Random, about: list) -> None:
    """The convolution of active images, whose reference serves the CPU."""
    dtype, kernel = rng.choice([torch.float32, torch.float64, torch.bfloat16]), rng.choice([1, 3])
    rows, c_in, c_out, stride = rng.randint(1, 5), rng.randint(1, 9), rng.randint(1, 9), 1
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layout = {"memory_format": torch.channels_last}
    x, out = (torch.randn(rows, c, 4, 6).to(dtype).contiguous(**layout) for c in (c_in, c_out))
    weight = torch.randn(c_out, c_in, kernel, kernel).to(dtype)
    active = torch.randperm(rows)[: rng.randint(1, rows)].int()
    args = [
        out, x, pack_conv(weight), torch.randn(c_out, dtype=wide), active,
        torch.tensor([len(active)], dtype=torch.int32), kernel, stride, True, True,
    ]  # fmt: skip
    for _ in range(rng.choice([0, 1, 1, 2])):
        at = rng.randrange(len(args))
        args[at] = mutated(rng, args[at])
    about += list(map(describe, args))
    with torch.no_grad():
        call_operator("gathered_conv_", args)


# ------------------------------------------------------------------ everything else

VALUES = (
    None, True, 0, 1, 2, 3, 5, 15, -1, 2**31, 2**70, 0.5, float("nan"), float("inf"), "x", "", b"y",
    (), (1,), (5, 5, 5), [2, 1, 2], (0,), (-1, 2), ("a",), (1.5,), {}, {1: 2}, {3}, object(), int,
)  # fmt: skip


def pick(rng: random.Random, right: object, share: float = 0.3) -> object:
    """The right argument, or any."""
    return rng.choice(VALUES) if rng.random() < share else right


def fuzz_heuristics(rng: random.Random, about: list) -> None:
    name = rng.choice(["first_k", "random_k", "distribute_k"])
    segments = tuple(rng.randint(1, 6) for _ in range(rng.randint(1, 4)))
    keep = rng.randint(0, sum(segments))
    args = [pick(rng, keep), pick(rng, segments), pick(rng, rng.randint(0, 5))]
    # As many images as fit a terabyte are no question of what is allowed.
    args[2] = 7 if isinstance(args[2], int) and args[2] > 1000 else args[2]
    options = {}
    if name == "random_k":
        options = {"seed": pick(rng, rng.randrange(9)), "per_image": rng.random() < 0.5}
    if rng.random() < 0.2:
        options["device"] = rng.choice(["cpu", torch.device("cpu"), "meta"])
    about += [name, args, options]
    found = getattr(bdf.heuristics, name)(*args, **options)
    if found.shape != (int(args[2]), sum(args[1])) or found.dtype != torch.bool:
        raise Wrong(f"decisions {tuple(found.shape)} {found.dtype}")
    if not found.is_meta and (found.sum(1) != args[0]).any():
        raise Wrong("another number of blocks")


def fuzz_flops(rng: random.Random, about: list) -> None:
    name = rng.choice(list(MODELS))
    size = rng.choice([None, 32, (32, 64), 0, -4, 33, (8,), "x", 2.5, (32, None)])
    decisions = given_decisions(rng, 3, config_of(name).num_blocks)
    decisions = None if rng.random() < 0.3 else decisions
    model = pick(rng, model_of(name), 0.1)
    about += [name, size, describe(decisions)]
    found = bdf.flops(model, decisions, image_size=size)
    if isinstance(found, Tensor) and not (found >= 0).all():
        raise Wrong(f"{found} FLOPs")


def fuzz_configs(rng: random.Random, about: list) -> None:
    """Architectures, and networks and policies of them."""
    right = {
        "block": "basic", "layers": (1, 2), "widths": (4, 8), "stem": "cifar",
        "shortcut": "subsample", "num_classes": 3,
    }  # fmt: skip
    options = {key: pick(rng, value, 0.15) for key, value in right.items()}
    if rng.random() < 0.2:
        options["block_widths"] = pick(rng, (4, 5, 6), 0.5)
    about.append(options)
    config = bdf.ResNetConfig(**options)
    if sum(config.layers) > 50 or max(config.widths) > 512 or config.num_classes > 10**6:
        return
    kind = rng.choice(["network", "look", "fixed", "sequential", "halting", "exits"])
    value = rng.choice(VALUES)
    about += [kind, value]
    if kind == "network":
        with torch.device("meta"):
            bdf.ResNet(config)
    elif kind == "look":
        bdf.LookPolicy(config, value)
    elif kind == "fixed":
        bdf.FixedPolicy(value if rng.random() < 0.5 else torch.tensor([True] * rng.randint(0, 3)))
    elif kind == "sequential":
        bdf.SequentialPolicy(config)
    elif kind == "halting":
        bdf.HaltingPolicy(config, False, value)
    else:
        bdf.Exits(config, value)


def fuzz_depths(rng: random.Random, about: list) -> None:
    name = rng.choice(["resnet_cifar", "resnet_imagenet", "policy_resnet8"])
    value = rng.choice([one for one in VALUES if one not in ((5, 5, 5), [2, 1, 2], 2**31)])
    about += [name, value]
    with torch.device("meta"):
        getattr(bdf, name)(value)


def fuzz_compile(rng: random.Random, about: list) -> None:
    name = rng.choice(list(MODELS))
    options = {
        "dtype": pick(rng, rng.choice([torch.float32, torch.float64, torch.int8]), 0.2),
        "strategy": pick(rng, rng.choice(["auto", "walk", "gather", "dense"]), 0.2),
        "launch": pick(rng, rng.choice(["counts", "universal"]), 0.2),
        "validate": rng.random() < 0.5,
        "compact": rng.random() < 0.5,
    }
    model = pick(rng, model_of(name), 0.1)
    about += [name, options]
    engine = bdf.compile(model, **options)
    images = make_images(config_of(name), 2).to(options["dtype"])
    check_logits(name, options["dtype"], images, engine(images))


def fuzz_files(rng: random.Random, about: list) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = pick(rng, os.path.join(folder, "model.safetensors"), 0.3)
        model = pick(rng, model_of(rng.choice(list(MODELS))), 0.2)
        what = rng.choice(["save", "load", "load_backbone", "both"])
        about += [what, path, type(model).__name__]
        try:
            if what in ("save", "both"):
                bdf.save(model, path)
            if what == "load" or (what == "both" and not isinstance(model, bdf.ResNet)):
                bdf.load(path)
            elif what in ("load_backbone", "both"):
                options = rng.choice([{}, {"layers": rng.choice(VALUES)}, {"num_classes": "x"}])
                bdf.load_backbone(path, **options)
        except OSError as error:
            raise ValueError(str(error)) from None
        finally:
            if path in ("x", b"y") and os.path.exists(path):
                os.remove(path)


def fuzz_evaluate(rng: random.Random, about: list) -> None:
    name = rng.choice(list(MODELS))
    engine = engine_of(name, torch.float32, "auto")
    images = given_images(rng, name, torch.float32)
    batch = batch_of(images)
    labels = pick(rng, torch.zeros(batch, dtype=torch.int64), 0.2)
    options = {key: pick(rng, 2, 0.2) for key in ("shuffles", "routing_images")}
    if isinstance(options["shuffles"], int) and options["shuffles"] > 100:
        options["shuffles"] = 3
    about += [name, describe(images), describe(labels), options]
    found = bdf.evaluate(engine, [(images, labels)], **options)
    if not 0 <= found.accuracy <= 1 or found.images != batch:
        raise Wrong(f"{found}")


TARGETS = {
    fuzz_engine: 40,
    fuzz_operator: 20,
    fuzz_module: 8,
    fuzz_threads: 2,
    fuzz_gathered_conv: 5,
    fuzz_policy: 4,
    fuzz_heuristics: 4,
    fuzz_flops: 3,
    fuzz_configs: 5,
    fuzz_depths: 2,
    fuzz_compile: 3,
    fuzz_files: 3,
    fuzz_evaluate: 3,
}


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout == torch.strided and not value.is_nested else "-"
        return f"{value.dtype} {'nested' if value.is_nested else tuple(value.shape)} {strides}"
    return repr(value)[:80]


def run(number: int) -> str:
    """Run a case and say what came of it: "right", or the name of an allowed error.

    Raises:
        Wrong: something else, naming the case.
    """
    rng = random.Random(number)
    (target,) = rng.choices(list(TARGETS), list(TARGETS.values()))
    torch.manual_seed(number)
    about: list = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target(rng, about)
    except ALLOWED as error:
        if "\n" in str(error).strip() and "Exception raised from" not in str(error):
            raise Wrong(f"case {number}, {target.__name__} {about}: lines {error}") from error
        return f"{target.__name__}: {type(error).__name__}"
    except Exception as error:
        raise Wrong(f"case {number}, {target.__name__} {about}: {error!r}") from error
    return f"{target.__name__}: right"


def main() -> None:
    """Run the cases, and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--trace", action="store_true", help="print where errors come from")
    given = parser.parse_args()
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    counts, failures = Counter(), []
    for number in range(given.first, given.first + given.cases):
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            counts[run(number)] += 1
        except Wrong as error:
            failures.append(str(error)[:500])
            print(failures[-1], flush=True)
            if given.trace:
                traceback.print_exc()
    faulthandler.cancel_dump_traceback_later()
    for name, count in sorted(counts.items()):
        print(f"{count:6} {name}")
    print(f"{counts.total()} cases as allowed, {len(failures)} not")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
