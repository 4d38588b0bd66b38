"""Networks and policies as modules, with gradients or without."""

from __future__ import annotations

import random
from contextlib import ExitStack

import torch
from torch import Tensor

import blockdrop_fast as bdf
from tests.fuzz.arguments import (
    MODELS,
    batch_of,
    config_of,
    describe,
    given_decisions,
    given_images,
    laid_out,
    model_of,
    strange,
    surroundings,
    valued,
)
from tests.fuzz.right import Wrong, check_logits


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
        # Of huge images logits may be finite where something on the way was not.
        calm = output.logits.isfinite().all() and (images.detach().abs() < 1e18).all()
        if output.logits.requires_grad and calm:
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
