"""Time of systems: logits checked, then all of them round-robin."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blockdrop_fast.data.batches import batches_of
from blockdrop_fast.data.image_sets import ImageFolder, ImageSet
from blockdrop_fast.measure import timing
from blockdrop_fast.measure.tolerance import make_output_reference, make_reference
from train.frontier.systems import Loaded
from train.images import normalization_of

BATCHES = (64, 1)
# Images of a timed call: one batch, or all of them one by one. Calls go through several such
# chunks, so that no time is that of lucky images.
CHUNK = max(BATCHES)
CHUNKS = 4


def timed_images(test: ImageSet | ImageFolder) -> ImageSet | ImageFolder:
    """Some of a split's images, in random order: splits often are sorted by class.

    Raises:
        ValueError: fewer than a batch.
    """
    count = min(CHUNKS, len(test) // CHUNK) * CHUNK
    if count == 0:
        raise ValueError(
            f"limit: expected at least {CHUNK} test images to time, got {len(test)} (--no-times "
            "evaluates only)"
        )
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    return test.take(order[:count])


def time_systems(
    loaded: Sequence[Loaded], test: ImageSet | ImageFolder, rounds: int
) -> list[dict[int, list[list[float]]]]:
    """Check the logits of all systems, then time them round-robin at each batch size.

    Args:
        loaded: the systems.
        test: the split to draw images from.
        rounds: timed calls of each chunk of images.

    Returns:
        For each system, by batch size: for each chunk of images, the seconds of its calls. A call
        is one batch, or at batch 1 all images of the chunk one after the other. Empty for systems
        that no engine runs.

    Raises:
        WrongLogitsError: a system is wrong; none is timed then.
        ValueError: too few images, or less than one round.
    """
    drawn = timed_images(test)
    chunks = {}
    executed = [one for one in loaded if one.engine is not None]
    for one in executed:
        normalization = normalization_of(one.model)
        if normalization not in chunks:
            images, _ = next(batches_of(drawn, len(drawn), normalization=normalization))
            chunks[normalization] = images.contiguous().split(CHUNK)
        check(one, chunks[normalization][0])
    timed = [{} for _ in loaded]
    for batch in BATCHES:
        calls = {}
        for one in executed:
            parts = [chunk.split(batch) for chunk in chunks[normalization_of(one.model)]]

            def call(index: int, one: Loaded = one, parts: list = parts) -> None:
                for images in parts[index % len(parts)]:
                    one.run(images)

            calls[one.system.name] = call
        count = len(drawn) // CHUNK
        with torch.inference_mode():
            samples = timing.interleave(calls, rounds=rounds * count)
        for one, values in zip(loaded, timed, strict=True):
            if one.engine is not None:
                own = samples[one.system.name]
                values[batch] = [own[first::count] for first in range(count)]
    return timed


def check(one: Loaded, images: Tensor) -> None:
    """Raise unless a system's logits are right, at the decisions that came with them.

    Raises:
        WrongLogitsError: naming system and batch size.
    """
    reference, decided = None, None
    for batch in BATCHES:
        outputs = [one.run(part) for part in images.split(batch)]
        output = type(outputs[0])(*map(torch.cat, zip(*outputs, strict=True)))
        if decided is None or not torch.equal(output.decisions, decided):
            decided = output.decisions
            reference = (
                make_output_reference(one.model, images, output, images.dtype)
                if one.keep is None
                else make_reference(one.engine.backbone, images, decided, images.dtype)
            )
        reference.check(f"{one.system.name}, batch {batch}", output.logits)
