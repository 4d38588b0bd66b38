"""benchmarks/pruning.py: a table of both savings, and a word on models with all filters."""

import json
from dataclasses import replace

import pytest
import torch

import blockdrop_fast as bdf
from benchmarks import pruning
from benchmarks.pruning import Arguments


def save(path, **options):
    torch.manual_seed(0)
    backbone = bdf.ResNet(replace(bdf.resnet_cifar(14).config, **options))
    bdf.save(bdf.BlockDrop(backbone, bdf.policy_resnet8(backbone.num_blocks)), path)
    return path


@pytest.fixture
def whole(tmp_path):
    return save(tmp_path / "whole.safetensors")


@pytest.mark.slow
def test_both_savings_are_counted_and_timed(whole, tmp_path, capsys):
    pruned = save(tmp_path / "pruned.safetensors", block_widths=(8, 8, 16, 16, 32, 32))
    pruning.main(Arguments(pruned, whole, out=tmp_path / "out", rounds=2, min_seconds=0))
    text = (tmp_path / "out.md").read_text()
    assert text.strip() in capsys.readouterr().out
    (fewer,) = (line for line in text.splitlines() if line.startswith("| fewer filters"))
    content = json.loads((tmp_path / "out.json").read_text())
    counted = content["flops"]["whole complete"] / content["flops"]["pruned complete"]
    assert 1.5 < counted < 2
    assert f"{counted:.2f}x" in fewer
    times = content["milliseconds"]["64"]
    measured = times["whole gather-all"] / times["pruned gather-all"]
    assert f"{measured:.2f}x" in fewer


def test_a_model_with_all_filters_is_refused(whole, tmp_path):
    with pytest.raises(SystemExit, match=r"pruning: error: pruned: .* has all its filters"):
        pruning.main(Arguments(whole, whole, out=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [whole]
