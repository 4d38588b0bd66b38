"""The models that come with the package load by name and are what they are said to be."""

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.data.image_sets import IMAGENET_NORMALIZATION


def test_names():
    assert bdf.pretrained() == ("blockdrop32-cifar10-jpeg", "resnet32-cifar10-jpeg")


def test_blockdrop_by_name_drops_blocks():
    model = bdf.load("blockdrop32-cifar10-jpeg")
    assert model.backbone.config == bdf.resnet32(shortcut="subsample").config
    assert model.backbone.normalization == IMAGENET_NORMALIZATION
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    usage = bdf.compile(model)(images).decisions.sum(1)
    assert usage.max() < 15


def test_backbone_by_name():
    assert bdf.load_backbone("resnet32-cifar10-jpeg").num_blocks == 15


def test_a_file_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bdf.save(bdf.resnet_cifar(8), "resnet32-cifar10-jpeg")
    assert bdf.load_backbone("resnet32-cifar10-jpeg").num_blocks == 3


def test_an_unknown_name_is_a_missing_file():
    with pytest.raises(FileNotFoundError, match="resnet99"):
        bdf.load("resnet99")
