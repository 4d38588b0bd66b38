"""Engines under load, for a moment; `make load` takes minutes."""

import pytest

import blockdrop_fast as bdf
from tests import load
from tests.random_networks import BOTTLENECK, CIFAR, make_images, make_model


@pytest.mark.parametrize("count", [1, load.THREADS])
@pytest.mark.parametrize("config", [CIFAR, BOTTLENECK], ids=["cifar", "imagenet"])
def test_threads_get_the_bits_of_one(config, count):
    model, _ = make_model(config)
    batches = [make_images(config, batch, batch) for batch in (1, 3, 8)]
    calls, growth = load.run([bdf.compile(model) for _ in range(count)], batches, 1.2)
    assert calls >= load.THREADS
    assert growth <= load.GROWTH
