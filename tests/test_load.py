"""Engines under load, for a moment; `make load` takes minutes."""

import pytest
import torch

import blockdrop_fast as bdf
from tests import load


@pytest.mark.parametrize("count", [1, load.THREADS])
@pytest.mark.parametrize("name", ["tiny CIFAR", "tiny ImageNet"])
def test_threads_get_the_bits_of_one(name, count):
    model, batches = load.LOADS[name]()
    calls, growth = load.run([bdf.compile(model) for _ in range(count)], batches, 1.2)
    assert calls >= load.THREADS
    assert growth <= load.GROWTH


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet-110", "ResNet-50"])
def test_real_networks_keep_about_half_of_their_blocks(name):
    model, batches = load.LOADS[name]()
    engine = bdf.compile(model)
    calls, _ = load.run([engine], batches, 2)
    assert calls >= load.THREADS
    kept = torch.cat([engine.decide(images) for images in batches])
    assert 0.4 < kept.double().mean() < 0.6
