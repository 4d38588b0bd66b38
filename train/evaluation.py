"""The test split, as all stages evaluate on it and log it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.data.batches import Batches
from blockdrop_fast.data.image_sets import Dataset, ImageFolder, ImageSet
from blockdrop_fast.measure.evaluation import Evaluation, evaluate
from blockdrop_fast.measure.static_line import cached_accuracies, cached_static_line, default_images
from train import distributed
from train.images import EVALUATION_BATCH, plain_batches


def evaluate_test(
    engine: bdf.Engine,
    dataset: Dataset,
    workers: int,
    decide=None,
    routing_images: int = 0,
    static_accuracies: Tensor | None = None,
) -> Evaluation:
    """Evaluate on the test split; see ``evaluate``. Processes share the work."""
    return evaluate(
        distributed.shared(engine),
        plain_batches(engine.model, dataset.test, EVALUATION_BATCH, workers),
        decide,
        routing_images=routing_images,
        static_accuracies=static_accuracies,
    )


def evaluation_metrics(evaluation: Evaluation, penalty: float) -> dict[str, float]:
    """Test metrics, at thresholded decisions, under the authors' TensorBoard names.

    Behind them what the authors do not log: whether it pays that decisions depend on the image.
    """
    metrics = {
        "test_accuracy": evaluation.accuracy,
        "test_reward": evaluation.reward(penalty),
        "test_sparsity": evaluation.block_usage,
        "test_variance": evaluation.block_usage_std,
        "test_unique_policies": evaluation.unique_policies,
    }
    routing = {
        "effective_policies": evaluation.effective_policies,
        "routing_gain": evaluation.routing_gain,
        "routing_gain_std": evaluation.routing_gain_std,
        "margin_correlation": evaluation.margin_correlation,
        "static_accuracy": evaluation.static_accuracy,
        "envelope_accuracy": evaluation.envelope_accuracy,
    }
    return metrics | {f"test_{name}": x for name, x in routing.items() if x is not None}


def static_accuracies_of(
    checkpoint: Path, engine: bdf.Engine, dataset: Dataset, images: int | None, workers: int
) -> Tensor | None:
    """(K+1,) accuracies of the backbone's static line on the test split; None for 0 images.

    Args:
        checkpoint: beside which they are kept.
        engine: with the backbone's present weights.
        images: training images to find the line on; None: by the depth, and none of a data set of
            larger images, where it would take hours.
    """
    if images is None:
        in_memory = isinstance(dataset.train, ImageSet)
        images = default_images(engine.config.num_blocks) if in_memory else 0
    if images == 0:
        return None
    some = dataset.train.subset(min(images, len(dataset.train)))
    engine = distributed.shared(engine)

    def batches(split: ImageSet | ImageFolder) -> Batches:
        return plain_batches(engine.backbone, split, EVALUATION_BATCH, workers)

    keep = distributed.is_first()
    line = cached_static_line(checkpoint, engine, list(batches(some)), keep=keep)
    return cached_accuracies(checkpoint, engine, line, lambda: batches(dataset.test), keep=keep)
