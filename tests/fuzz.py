"""Public calls with random arguments, right and wrong ones, each checked against float64.

    python -m tests.fuzz --cases 10000 [--first N]

Allowed: the right result, TypeError, ValueError; OSError of paths; RuntimeError where the
documentation promises one, or where PyTorch refuses a call of an operator before any code of ours
runs (``REFUSED``). What is right: logits within the tolerance of docs/architecture.md from the
float64 reference at the decisions that were returned. A case is a function of its number, so
``--first N --cases 1`` is case N again. What calls are made with is in ``fuzz_arguments.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import functools
import io
import os
import random
import re
import resource
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch
from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast import ops
from blockdrop_fast.commands import cli
from blockdrop_fast.networks import architectures
from blockdrop_fast.networks.gated import GatedPolicy
from blockdrop_fast.networks.menu import Menu
from tests.fuzz_arguments import (
    ALLOWED,
    MODELS,
    SETS,
    VALUES,
    batch_of,
    config_of,
    describe,
    engine_of,
    given_decisions,
    given_images,
    in_dtype,
    laid_out,
    model_of,
    mutated,
    operator_calls,
    pick,
    strange,
    surroundings,
    valued,
)
from tests.random_networks import make_images

MEMORY = 12 << 30  # bytes of address space: what a wrong number asks for fails at once
SECONDS = 900  # a case that takes longer hangs


class Wrong(AssertionError):
    """A call gave what it must not."""


# ------------------------------------------------------------------ what is right


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
        methods += ["run", "run", "sets", "weighted", "probabilities"]
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
        if method == "probabilities":
            with documented("probabilities: "):
                found = engine.probabilities(images)
            check_ordinary(found)
            if found.shape != (batch, blocks) or not ((found >= 0) & (found <= 1)).all():
                raise Wrong(f"probabilities {describe(found)}")
            return
        if method == "sets":
            decisions = given_decisions(rng, batch, blocks, rng.choice([0, 1, 2, 4]))
            about.append(describe(decisions))
            with documented("run_sets: the model has"):
                logits = engine.run_sets(images, decisions)
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


@contextlib.contextmanager
def documented(begin: str):
    """A RuntimeError that begins so is one that the called function's documentation promises."""
    try:
        yield
    except RuntimeError as error:
        if str(error).startswith(begin):
            raise ValueError(str(error)) from None
        raise


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
    """Several threads on one engine, in modes of their own: each gets what it gets alone."""
    name, strategy = rng.choice(list(MODELS)), rng.choice(["auto", "gather"])
    engine = engine_of(name, torch.float32, strategy)
    about += [name, strategy]
    if engine is None:
        raise ValueError("no such engine")
    batches = [make_images(config_of(name), rng.randint(1, 6), seed) for seed in range(6)]
    modes = [torch.no_grad, torch.inference_mode, torch.enable_grad, contextlib.nullcontext]
    alone = [engine(images) for images in batches]

    def run(images: Tensor, mode: type) -> Sequence[Tensor]:
        with mode():
            return engine(images)

    with ThreadPoolExecutor(4) as pool:
        found = pool.map(run, batches, rng.choices(modes, k=len(batches)))
        for output, expected in zip(found, alone, strict=True):
            for one, other in zip(output, expected, strict=True):
                if not torch.equal(one, other):
                    raise Wrong("other bits beside other threads")


# ------------------------------------------------------------------ modules


def fuzz_module(rng: random.Random, about: list) -> None:
    """A network as it is, with gradients or without."""
    name = rng.choice(list(MODELS))
    model, config = model_of(name), config_of(name)
    images = given_images(rng, name, torch.float32)
    batch = batch_of(images)
    with ExitStack() as stack:
        mode = surroundings(rng, stack)
        about += [name, mode, describe(images)]
        options = {} if rng.random() < 0.8 else {"budget": rng.choice([2.5, 0.0, -1, "x"])}
        about.append(options)
        if isinstance(model, bdf.ResNet):
            decisions = given_decisions(rng, batch, config.num_blocks)
            about.append(describe(decisions))
            logits = run_backbone(rng, about, model, images, decisions)
            if logits is None:
                return
            if decisions is None:
                decisions = torch.ones(batch, config.num_blocks)
            output = bdf.Output(logits, decisions.detach() != 0)
        elif isinstance(model, bdf.Cascade):
            output = model(images)
        else:
            output = model(images, **options)
        if mode in ("autocast", "half"):
            return
        check_logits(name, torch.float32, images.detach(), output)
        if output.logits.requires_grad and output.logits.isfinite().all():
            output.logits.sum().backward()
            model.zero_grad()


def run_backbone(rng, about: list, model: bdf.ResNet, images, decisions) -> Tensor | None:
    """In one go, or in two with features between; None where those are not the images' own."""
    active_only = rng.random() < 0.5
    if rng.random() < 0.6:
        return model(images, decisions, active_only=active_only)
    after = rng.choice([0, 1, 2, model.num_blocks, -1, model.num_blocks + 1, 1.5, "x"])
    features = model.features(images, after)
    others = rng.random() < 0.3
    if others:
        features = strange(rng, features.detach())
    about += [after, describe(features)]
    logits = model.forward_from(features, after, decisions, active_only=active_only)
    return None if others else logits


def fuzz_policy(rng: random.Random, about: list) -> None:
    """A policy by itself, and what decides from probabilities."""
    name = rng.choice(["policy", "policy of its own stem", "menu", "fixed", "look", "look, menu"])
    model = model_of(name)
    images = given_images(rng, name, torch.float32)
    what = rng.choice(["logits", "forward", "decide", "model", "function"])
    about += [name, what, describe(images)]
    if what == "function":
        if batch_of(images) == 1000:
            return  # a terabyte
        found = bdf.decide(images)
        if not images.is_meta and not torch.equal(found, images.detach() >= 0.5):
            raise Wrong("other decisions")
        return
    budget = rng.choice([None, None, 2.5, 1e9, float("nan"), "x"])
    with torch.no_grad(), ExitStack() as stack:
        about.append(surroundings(rng, stack))
        if what == "model":
            found = rng.choice(
                [lambda: model.decide(images, budget), lambda: model.policy_logits(images)]
            )()
        else:
            policy, inputs = model.policy, images
            if isinstance(policy, bdf.LookPolicy):
                inputs = model.backbone.features(images, policy.after)
                inputs = strange(rng, inputs) if rng.random() < 0.2 else inputs
                about.append(describe(inputs))
                logits = policy.logits_from
            else:
                logits = policy.logits
            call = {"logits": logits, "forward": policy, "decide": policy.decide}[what]
            found = call(inputs, budget) if what == "decide" else call(inputs)
            images = inputs
    if len(found) != len(images):
        raise Wrong(f"{len(found)} rows of {len(images)} images")


def fuzz_gates(rng: random.Random, about: list) -> None:
    """Policies that decide on the way, and cascades: run, and what was decided given again."""
    name = rng.choice(["sequential", "halting", "halting hard", "exits", "cascade", "pixels"])
    with ExitStack() as stack:
        if name == "pixels":
            fuzz_pixels(rng, about)
            return
        model = model_of(name)
        images = given_images(rng, name, torch.float32)
        about += [name, surroundings(rng, stack), describe(images)]
        with torch.no_grad():
            output = model(images)
            changed = list(output)
            for at in range(1, len(changed)):
                if rng.random() < 0.3:
                    changed[at] = strange(rng, valued(rng, laid_out(rng, changed[at])))
            about.append([describe(one) for one in changed])
            given = type(output)(*changed)
            if isinstance(model, bdf.Cascade):
                logits = model.replay(images, given)
            else:
                logits = model.policy.replay(model.backbone, images, given)
    if logits.shape != output.logits.shape:
        raise Wrong(f"logits {describe(logits)}")


def fuzz_pixels(rng: random.Random, about: list) -> None:
    """Gates for every pixel, which no engine runs."""
    kind = rng.choice([bdf.LowCostMasks, bdf.SpatialHaltingPolicy])
    name = rng.choice(["backbone", "basic projection", "narrower", "bottleneck"])
    backbone, images = model_of(name), given_images(rng, name, torch.float32)
    about += [kind.__name__, name, describe(images)]
    model = bdf.BlockDrop(backbone, kind(backbone.config)).eval()
    output = model(images)
    if output.logits.shape != (len(images), config_of(name).num_classes):
        raise Wrong(f"logits {describe(output.logits)}")
    if (
        not (output.flops > 0).all()
        or not ((output.densities >= 0) & (output.densities <= 1)).all()
    ):
        raise Wrong(f"FLOPs {output.flops}, densities {output.densities}")
    if rng.random() < 0.3:
        bdf.compile(model)  # a TypeError or ValueError
        raise Wrong("an engine for gates of pixels")


# ------------------------------------------------------------------ operators

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


# ------------------------------------------------------------------ everything else


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
        options["device"] = rng.choice(["cpu", torch.device("cpu"), "meta", "x", 1.5])
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
    if not found.is_meta and not (found >= 0).all():
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
    kind = rng.choice(["network", "look", "fixed", "sequential", "halting", "exits", "pixels"])
    value, config = rng.choice(VALUES), pick(rng, config, 0.1)
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
        rng.choice([bdf.HaltingPolicy, bdf.SpatialHaltingPolicy])(config, epsilon=value)
    elif kind == "pixels":
        bdf.LowCostMasks(config)
    else:
        bdf.Exits(config, value)


def fuzz_models(rng: random.Random, about: list) -> None:
    """What is made of networks and policies, such as fit each other and such as do not."""
    names = rng.sample(list(MODELS), 3)
    models = [pick(rng, model_of(name), 0.1) for name in names]
    what = rng.choice(["blockdrop", "cascade", "policy", "rules", "thresholds", "menu"])
    about += [what, names, [type(one).__name__ for one in models]]
    backbones = [getattr(one, "backbone", one) for one in models]
    policies = [getattr(one, "policy", one) for one in models]
    if what == "blockdrop":
        model = bdf.BlockDrop(backbones[0], policies[rng.choice([0, 1])])
        if model.policy.num_blocks != model.backbone.num_blocks:
            raise Wrong("a policy for other blocks")
    elif what == "cascade":
        bdf.Cascade(pick(rng, models[: rng.choice([0, 1, 2, 3])], 0.1))
    elif what == "policy":
        menu = rng.choice([None, Menu(SETS), rng.choice(VALUES)])
        bdf.PolicyNetwork(backbones[0], pick(rng, rng.choice([0, 1, 2]), 0.3), menu)
    elif what == "menu":
        Menu(strange(rng, SETS) if rng.random() < 0.5 else rng.choice(VALUES))
    else:
        model = copy.deepcopy(model_of(rng.choice(["exits", "cascade"])))
        taker = model if isinstance(model, bdf.Cascade) else model.policy
        count = len(taker.rules)
        if what == "rules":
            rules = valued(rng, torch.randn(count, 6))
            taker.set_rules(strange(rng, rules) if rng.random() < 0.5 else rules)
        else:
            taker.set_thresholds(pick(rng, [rng.choice([0, 0.5, 1, 2, -1, "x"])] * count))
        if not taker.rules.isfinite().all():
            raise Wrong("rules that are not finite")


NAMED = [one for one in bdf.__all__ if re.match(r"(wide_)?resne[x]?t\d|policy_resnet", one)]


def fuzz_depths(rng: random.Random, about: list) -> None:
    """Named architectures."""
    name = rng.choice(["resnet_cifar", "resnet_imagenet", *NAMED])
    value = rng.choice([one for one in VALUES if one not in ((5, 5, 5), [2, 1, 2], 2**31)])
    about += [name, value]
    with torch.device("meta"):
        if rng.random() < 0.2:
            architectures.by_name(value if rng.random() < 0.5 else name)(rng.choice([5, value]))
            return
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
    if rng.random() < 0.1:
        model = copy.deepcopy(model_of(name)).to("meta")
    about += [name, options]
    engine = bdf.compile(model, **options)
    images = make_images(config_of(name), 2).to(options["dtype"])
    check_logits(name, options["dtype"], images, engine(images))


def fuzz_files(rng: random.Random, about: list) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = pick(rng, os.path.join(folder, "model.safetensors"), 0.3)
        model = pick(rng, model_of(rng.choice(list(MODELS))), 0.2)
        what = rng.choice(["save", "load", "load_backbone", "both", "pretrained"])
        about += [what, path, type(model).__name__]
        try:
            if what == "pretrained":
                name = rng.choice(bdf.pretrained())
                rng.choice([bdf.load, bdf.load_backbone])(pick(rng, name, 0.5))
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
    batch, blocks = batch_of(images), config_of(name).num_blocks
    labels = pick(rng, torch.zeros(batch, dtype=torch.int64), 0.2)
    labels = strange(rng, labels) if isinstance(labels, Tensor) and rng.random() < 0.1 else labels
    options = {key: pick(rng, 2, 0.2) for key in ("shuffles", "routing_images")}
    if isinstance(options["shuffles"], int) and options["shuffles"] > 100:
        options["shuffles"] = 3
    if rng.random() < 0.2:
        options["budget"] = rng.choice([2.5, -1, "x"])
    if rng.random() < 0.2:
        decisions = given_decisions(rng, batch, blocks)
        options["decide"] = pick(rng, lambda _: decisions, 0.2)
    if rng.random() < 0.2:
        options["static_accuracies"] = pick(rng, torch.linspace(0, 1, blocks + 1), 0.3)
    about += [name, describe(images), describe(labels), options]
    found = bdf.evaluate(pick(rng, engine, 0.05), [(images, labels)], **options)
    if not 0 <= found.accuracy <= 1 or found.images != batch:
        raise Wrong(f"{found}")
    if not found.format() or not found.to_dict():
        raise Wrong("nothing to print")


@functools.cache
def command_file() -> str:
    """A model for the commands, of two cheap blocks."""
    folder = tempfile.mkdtemp(prefix="blockdrop-fuzz-")
    path = os.path.join(folder, "model.safetensors")
    config = bdf.ResNetConfig("basic", (1, 1), (4, 8), "cifar", "subsample", 10)
    bdf.save(bdf.BlockDrop(bdf.ResNet(config), bdf.FixedPolicy(torch.tensor([True, False]))), path)
    return path


def fuzz_command(rng: random.Random, about: list) -> None:
    """The command line: exit status 0, or 1 or 2 and what is wrong, never a traceback."""
    junk = ["", "-1", "0", "nan", "x", "1e9", "/", ".", "--", "\x00", "ä", "2", "True"]
    name = rng.choice(["info", "evaluate", "visualize", "report", "benchmark", rng.choice(junk)])
    arguments = [name]
    if name in ("evaluate", "visualize", "report"):
        arguments.append(command_file() if rng.random() < 0.7 else rng.choice(junk))
    if name in ("visualize", "report"):
        arguments += ["--out", rng.choice([*junk, "/dev/null/x.png", "x.html.txt"])]
    options = ["--json", "--arch", "--limit", "--batch-size", "--budget", "--device", "--keep"]
    options += ["--strategy", "--heuristic", "--shuffles", "--data", "--model", "--batch", "--help"]
    for _ in range(rng.choice([0, 1, 1, 2])):
        arguments += [rng.choice(options)] + rng.choice([[], [rng.choice(junk)]])
    if name == "evaluate":
        arguments += ["--limit", "20", "--shuffles", "0"]
    if name == "benchmark":  # what is right takes too long
        arguments += ["--model", rng.choice(["x", "", "resnet9", "/"])]
    about += arguments
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = cli.main(arguments)
        except SystemExit as stop:  # of the parser
            status = stop.code
    if status not in (0, 1, 2) or not said.getvalue():
        raise Wrong(f"exit status {status}, {said.getvalue()[:100]!r}")
    if status:
        raise ValueError(f"exit status {status}")


TARGETS = {
    fuzz_engine: 40,
    fuzz_operator: 20,
    fuzz_module: 8,
    fuzz_threads: 2,
    fuzz_gathered_conv: 5,
    fuzz_policy: 4,
    fuzz_gates: 4,
    fuzz_heuristics: 3,
    fuzz_flops: 3,
    fuzz_configs: 4,
    fuzz_models: 4,
    fuzz_depths: 2,
    fuzz_compile: 3,
    fuzz_files: 3,
    fuzz_evaluate: 3,
    fuzz_command: 1,
}


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
