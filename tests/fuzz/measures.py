"""What is said of a model: FLOPs, evaluation, its file; and the command line."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import tempfile

import torch
from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.commands import cli
from tests.fuzz.arguments import (
    MODELS,
    VALUES,
    batch_of,
    config_of,
    describe,
    engine_of,
    given_decisions,
    given_images,
    model_of,
    pick,
    strange,
)
from tests.fuzz.right import Wrong


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
    said, here = io.StringIO(), os.getcwd()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        os.chdir(folder)  # where --json and --out write what junk names
        try:
            status = cli.main(arguments)
        except SystemExit as stop:  # of the parser
            status = stop.code
        finally:
            os.chdir(here)
    if status not in (0, 1, 2) or not said.getvalue():
        raise Wrong(f"exit status {status}, {said.getvalue()[:100]!r}")
    if status:
        raise ValueError(f"exit status {status}")
