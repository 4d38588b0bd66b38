"""Engines: all methods, in all surroundings, and beside other threads."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch
from torch import Tensor

import blockdrop_fast as bdf
from tests.fuzz.arguments import (
    MODELS,
    batch_of,
    config_of,
    describe,
    engine_of,
    given_decisions,
    given_images,
    model_of,
    strange,
    surroundings,
    valued,
)
from tests.fuzz.right import Wrong, check_logits
from tests.random_networks import make_images


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
