"""What the tests of several stages share: the embedded digits, and networks trained on them."""

import pytest
import torch

from train.config import Pretrain
from train.loop import Run
from train.pretrain import pretrain

FEW = {"limit": 320, "batch_size": 32, "threads": 1}


@pytest.fixture(autouse=True)
def _digits(monkeypatch):
    monkeypatch.delenv("BLOCKDROP_DATA", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """The folder of a small backbone that knows some digits."""
    out = tmp_path_factory.mktemp("pretrain")
    pretrain(Pretrain(arch="resnet8", epochs=6, out=out, lr=0.1, **FEW))
    return out


class Killed(BaseException):
    """Nobody catches this."""


@pytest.fixture
def killed(monkeypatch):
    """Runs a stage that is killed after its first checkpoint."""

    def start(stage, config):
        save = Run._save

        def save_and_die(run, epoch):
            save(run, epoch)
            raise Killed

        monkeypatch.setattr(Run, "_save", save_and_die)
        with pytest.raises(Killed):
            stage(config)
        monkeypatch.setattr(Run, "_save", save)

    return start
