"""The programs in examples/, as a reader runs them."""

from pathlib import Path

import pytest
import torch

import blockdrop_fast as bdf
from examples import own_checkpoint, own_decisions
from tests.networks.state_dicts import torchvision_keys


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["backbone of another project", "BlockDrop"])
def test_own_checkpoint(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("BLOCKDROP_DATA", raising=False)
    checkpoint = Path("blockdrop32-cifar10-jpeg")
    if kind != "BlockDrop":
        checkpoint = tmp_path / "resnet8.th"
        torch.save({"state_dict": torchvision_keys(bdf.resnet_cifar(8))}, checkpoint)
    own_checkpoint.main(checkpoint, data=None, epochs=1, out=tmp_path / "policy")
    printed = capsys.readouterr().out
    assert "all blocks: accuracy" in printed
    assert "policy: accuracy" in printed
    assert printed.count(" ms for 64 images") == 3
    assert (tmp_path / "policy").exists() == (kind != "BlockDrop")


@pytest.mark.slow
def test_own_decisions(capsys):
    own_decisions.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all("of 15 blocks, logits off by" in line for line in lines)
