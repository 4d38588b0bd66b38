"""What the commands' tests share: the embedded digits, and a model of them."""

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.commands import cli
from blockdrop_fast.data.batches import batches_of, load_digits


@pytest.fixture(autouse=True)
def _digits(monkeypatch):
    monkeypatch.delenv("BLOCKDROP_DATA", raising=False)
    monkeypatch.delenv(cli.TRACEBACK_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """ResNet-8 of random weights whose policy keeps about half of the blocks of digits."""
    torch.manual_seed(0)
    model = bdf.BlockDrop(bdf.resnet_cifar(8), bdf.policy_resnet8(3)).eval()
    images, _ = next(batches_of(load_digits().test, 64))
    with torch.no_grad():
        model.policy.network.fc.bias -= model.policy.logits(images).median(0).values
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    bdf.save(model, path)
    return path
