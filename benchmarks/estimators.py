"""``python -m benchmarks.estimators``: how far does each estimator of the policy gradient get?

Trains a policy network on one frozen backbone with each estimator for the same minutes, from the
same weights, on the same batches and with no block forced, and draws the test reward that each
reaches over that time.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import count
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import tyro
from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.data.image_sets import ImageFolder, ImageSet
from blockdrop_fast.files import atomic_write, write_json
from blockdrop_fast.machine import machine_info
from train.config import Curriculum
from train.curriculum import make_model, train_step
from train.evaluation import evaluate_test, evaluation_metrics
from train.images import device_of, prepare, training_batches
from train.loop import sampling_generator
from train.optimization import engine_dtype

Estimator = Literal["self_critical", "leave_one_out", "rloo", "arms", "flips"]
# All but the paper's try four decision sets an image and step.
OPTIONS = {
    "self_critical": {"samples": 1},
    "leave_one_out": {"samples": 3},
    "rloo": {"samples": 4},
    "arms": {"samples": 4},
    "flips": {"samples": 1, "flips": 3},
}
# What may differ between the calls that fill one file.
FREE = {"estimators", "out"}


@dataclass(frozen=True)
class Arguments:
    """Compare estimators at the same minutes of training; those in OUT.json are not run again."""

    backbone: Path
    """Backbone checkpoint."""
    data: Path | None = None
    """Data set folder; default: BLOCKDROP_DATA, else the embedded handwritten digits."""
    minutes: float = 20.0
    """Of training with each estimator; evaluations are not counted."""
    interval: float = 1.0
    """Minutes of training between evaluations."""
    estimators: tuple[Estimator, ...] = tuple(OPTIONS)
    images: int = 2000
    """Test images."""
    entropy_form: Literal["authors", "bernoulli"] = "authors"
    entropy: float = 0.1
    reward_of: Literal["right", "probability"] = "right"
    penalty: float = 1.0
    """gamma, also of the test reward."""
    alpha: float = 0.8
    batch_size: int = 256
    lr: float = 1e-3
    seed: int = 0
    threads: int | None = None
    """CPU threads; default: torch's choice."""
    out: Path = Path("estimators")
    """Writes OUT.json and OUT.png."""


def train(arguments: Arguments, estimator: Estimator) -> list[dict]:
    """Train with one estimator: what the test split gave, at the start and every interval.

    The test reward is that of the training logs: of right predictions, at thresholded decisions.
    """
    of_stage = {field.name for field in fields(Curriculum)} - FREE
    shared = {name: value for name, value in vars(arguments).items() if name in of_stage}
    config = Curriculum(estimator=estimator, **OPTIONS[estimator], **shared)
    device, dataset = prepare(config)
    test = dataset.test.subset(min(arguments.images, len(dataset.test)))
    dataset = replace(dataset, test=test)
    model = make_model(config).to(device, memory_format=torch.channels_last)
    model.policy.train()
    engine = bdf.compile(model, dtype=engine_dtype(config, device))
    optimizer = torch.optim.Adam(model.policy.parameters(), lr=config.lr)
    points, images_seen, trained = [], 0, 0.0

    def evaluate() -> None:
        engine.refresh()
        evaluation = evaluate_test(engine, dataset, config.workers)
        points.append(
            {"minutes": trained / 60, "images": images_seen}
            | evaluation_metrics(evaluation, config.penalty)
        )
        print(
            f"{estimator}, {trained / 60:.2f} minutes, {images_seen} images: "
            f"{evaluation.reward(config.penalty):.3f}, {100 * evaluation.accuracy:.2f} % at "
            f"{evaluation.block_usage:.2f} blocks",
            flush=True,
        )

    evaluate()
    batches = endless_batches(config, model, dataset.train)
    while trained < 60 * arguments.minutes:
        started = time.monotonic()
        left = 60 * min(arguments.minutes, len(points) * arguments.interval) - trained
        while time.monotonic() - started < left:
            images, labels, generator = next(batches)
            step = train_step(engine, images, labels, config, 0, generator)
            optimizer.zero_grad(set_to_none=True)
            step.loss.backward()
            optimizer.step()
            images_seen += len(images)
        trained += time.monotonic() - started
        evaluate()
    return points


def endless_batches(
    config: Curriculum, model: bdf.BlockDrop, image_set: ImageSet | ImageFolder
) -> Iterator[tuple[Tensor, Tensor, torch.Generator]]:
    """Epoch after epoch: images, labels, and the generator of the epoch's decisions."""
    for epoch in count(1):
        generator = sampling_generator(config.seed, epoch, device_of(model))
        for batch in training_batches(model, image_set, config, epoch, config.batch_size):
            yield *batch, generator


def load(arguments: Arguments) -> dict:
    """What OUT.json holds, or a result without any estimators.

    Raises:
        ValueError: it was measured with other options.
    """
    settings = {name: value for name, value in vars(arguments).items() if name not in FREE}
    settings = json.loads(json.dumps(settings, default=str))
    path = arguments.out.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {"settings": settings, "estimators": {}}
    result = json.loads(path.read_text())
    changed = [
        f"{name} {result['settings'].get(name)} -> {value}"
        for name, value in settings.items()
        if result["settings"].get(name) != value
    ]
    if changed:
        raise ValueError(f"out: {path} was measured with other options: {', '.join(changed)}")
    return result


def draw(result: dict, path: Path) -> None:
    """The test reward over minutes, and over images, which leaves out what a step costs."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, (x, label) in zip(
        axes, (("minutes", "minutes of training"), ("images", "training images")), strict=True
    ):
        for name, run in result["estimators"].items():
            points = run["points"]
            axis.plot(
                [point[x] for point in points],
                [point["test_reward"] for point in points],
                marker=".",
                label=", ".join([name, *(f"{option} {n}" for option, n in run["options"].items())]),
            )
        axis.set_xlim(0)
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"test reward, γ = {result['settings']['penalty']:g}")
    axes[1].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def main(arguments: Arguments) -> None:
    """Run the estimators that are missing, and write both files after each."""
    result = load(arguments)
    for estimator in arguments.estimators:
        if estimator not in result["estimators"]:
            run = {"options": OPTIONS[estimator], "machine": machine_info()}
            result["estimators"][estimator] = run | {"points": train(arguments, estimator)}
        write_json(arguments.out.with_suffix(".json"), result)
        draw(result, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, prog="python -m benchmarks.estimators"))
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"estimators: {error}")
