"""A backbone with more than one block a segment."""

import pytest

from tests.train.conftest import FEW
from train.config import Pretrain
from train.pretrain import pretrain


@pytest.fixture(scope="session")
def deep(tmp_path_factory):
    """The folder of a ResNet-14 that knows some digits, but not a hundred that are held out."""
    out = tmp_path_factory.mktemp("deep")
    pretrain(Pretrain(arch="resnet14", epochs=6, out=out, lr=0.1, held_out=100, **FEW))
    return out
