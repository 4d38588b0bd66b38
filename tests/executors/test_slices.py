"""Batches cut into slices on a CPU."""

from __future__ import annotations

import platform
import resource
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.executors.slices import BUDGET, Slices, live_bytes
from blockdrop_fast.measure.tolerance import make_reference
from blockdrop_fast.networks.folding import fold_network
from tests.random_networks import (
    BOTTLENECK,
    CIFAR,
    CUSTOM,
    GATED,
    GROUPED,
    IMAGES,
    make_decisions,
    make_gated_model,
    make_images,
    make_network,
    random_images,
)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_engine(model, images: int, shape, **options) -> bdf.Engine:
    """Whose gather or dense cuts batches of images of this shape (3, H, W) into so many each."""
    engine = bdf.compile(model, **options)
    network = fold_network(engine.backbone, engine.dtype)
    one = live_bytes(network, *shape[1:])
    engine._gated._slices = engine._choice.executor._slices = Slices(network, images * one)
    return engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_image_holds(dtype):
    """By hand: ResNet-50 holds most in the first block of segment 2, whose input is gathered."""
    with torch.device("meta"):
        network = fold_network(bdf.resnet50(), dtype)
    wide, half = 256 * 56 * 56, 28 * 28
    most = 2 * (wide + 512 * half) + 128 * 56 * 56 + 128 * half + 512 * half
    assert live_bytes(network, 224, 224) == most * dtype.itemsize
    with torch.device("meta"):
        small = fold_network(make_network(CIFAR), dtype)
    assert live_bytes(small, 8, 12) == (2 + 2) * 16 * 8 * 12 * dtype.itemsize


@pytest.mark.parametrize("threads", [1, 5])
def test_slices_are_alike(threads):
    torch.set_num_threads(threads)
    network = fold_network(make_network(CIFAR), torch.float32)
    slices, seen = Slices(network, 3 * live_bytes(network, 8, 8)), []

    def call(images, numbers):
        seen.append(len(images))
        assert images.shape[1:] == (3, 8, 8)
        return numbers * 2, numbers[:, 0] > 4

    images, numbers = torch.zeros(10, 3, 8, 8), torch.arange(20).view(10, 2)
    doubled, larger = slices.run(call, images, numbers)
    assert seen == ([3, 3, 2, 2] if threads == 1 else [5, 5])
    assert torch.equal(doubled, 2 * numbers)
    assert torch.equal(larger, numbers[:, 0] > 4)
    seen.clear()
    slices.run(call, images, numbers, rows=3)
    assert seen == ([1] * 10 if threads == 1 else [5, 5])
    seen.clear()
    slices.run(call, images[:3], numbers[:3])
    assert seen == [3]


def test_batches_within_budget_stay_whole():
    """Those of CIFAR networks are small: cutting them would cost launches."""
    with torch.device("meta"):
        small = fold_network(bdf.resnet110(), torch.float32)
        large = fold_network(bdf.resnet101(), torch.float32)
    assert BUDGET // live_bytes(small, 32, 32) >= 256
    assert 2 <= BUDGET // live_bytes(large, 224, 224) <= 8


@pytest.mark.parametrize("strategy", ["gather", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [CIFAR, BOTTLENECK, GROUPED, CUSTOM["imagenet average pool"]])
@pytest.mark.parametrize("images_each", [1, 7])
def test_same_logits(strategy, dtype, config, images_each):
    network = make_network(config)
    images = make_images(config, IMAGES, dtype=dtype)
    decisions = make_decisions("random", IMAGES, config.num_blocks)
    engine = make_engine(network, images_each, images.shape[1:], strategy=strategy, dtype=dtype)
    logits = engine.run(images, decisions)
    make_reference(network, images, decisions, dtype).check("sliced", logits)
    sets = torch.stack([decisions, decisions.roll(1, 0), decisions])
    sets[1, :, 0] = decisions[:, 0]
    for one, result in zip(sets, engine.run_sets(images, sets), strict=True):
        make_reference(network, images, one, dtype).check("sliced sets", result)
    assert torch.equal(engine.run_sets(images, sets)[0], engine.run_sets(images, sets)[2])
    if dtype == torch.float32:
        whole = bdf.compile(network, strategy=strategy)
        torch.testing.assert_close(logits, whole.run(images, decisions))


@pytest.mark.parametrize("kind", GATED)
def test_same_decisions_on_the_way(kind):
    """In float64, where no gate is on its threshold."""
    model, images = make_gated_model(kind, BOTTLENECK)
    images = images.double()
    options = {"strategy": "gather", "dtype": torch.float64}
    expected = bdf.compile(model, **options)(images)
    engine = make_engine(model, 5, images.shape[1:], **options)
    output = engine(images)
    assert torch.equal(output.decisions, expected.decisions)
    torch.testing.assert_close(tuple(output), tuple(expected))
    again = engine.run(images, output.decisions, *output[2:])
    torch.testing.assert_close(again, output.logits)


def count_faults(sets: int) -> tuple[int, int]:
    """Of one call, cut into slices and whole."""
    config = bdf.ResNetConfig("bottleneck", (2,), (64,), "imagenet", "projection", 10, groups=4)
    torch.set_num_threads(1)
    engine = bdf.compile(make_network(config), strategy="gather")
    images = random_images(48, torch.float32, 128)
    decisions = make_decisions("random", 48, 2)
    if sets:
        decisions = torch.stack([decisions, ~decisions])
    run = engine.run_sets if sets else engine.run

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        run(images, decisions)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    sliced = min(faults() for _ in range(4))
    executor = engine._choice.executor
    executor._slices = Slices(fold_network(engine.backbone, torch.float32), 1 << 40)
    faults()
    return sliced, max(faults() for _ in range(4))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries keep other amounts")
@pytest.mark.parametrize("sets", [0, 2])
def test_no_page_faults(sets):
    """From the second call on; cut into larger slices, each layer's activations fault.

    In a new process: where earlier tests left a large free piece in the heap, nothing faults.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        sliced, whole = pool.submit(count_faults, sets).result()
    # Most often more than 20,000; how many depends on what the heap happens to keep.
    assert sliced < 1000 < whole
