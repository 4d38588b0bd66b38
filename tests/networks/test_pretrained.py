"""The models that come with the package load by name and are what they are said to be."""

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.data.image_sets import IMAGENET_NORMALIZATION
from blockdrop_fast.networks.cascade import blocks_of


def test_names():
    kinds = [("blockdrop", 32), ("blockdrop", 56), ("resnet", 32), ("resnet", 56)]
    kinds += [("static", 32), ("static", 56)]
    names = [f"{kind}{depth}-cifar10-jpeg" for kind, depth in kinds]
    assert bdf.pretrained() == tuple(sorted([*names, "cascade-cifar10-jpeg"]))


@pytest.mark.parametrize(("depth", "policies"), [(32, 2), (56, 2)])
def test_blockdrop_by_name_decides_by_the_image(depth, policies):
    model = bdf.load(f"blockdrop{depth}-cifar10-jpeg")
    assert model.backbone.config == bdf.resnet_cifar(depth, shortcut="subsample").config
    assert model.backbone.normalization == IMAGENET_NORMALIZATION
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    decisions = bdf.compile(model)(images).decisions
    assert decisions.sum(1).max() < model.backbone.num_blocks
    assert len(decisions.unique(dim=0)) >= policies


@pytest.mark.parametrize("budget", [4.0, 7.0, 10.0])
def test_blockdrop32_serves_budgets(budget):
    model = bdf.load("blockdrop32-cifar10-jpeg")
    assert model.policy.menu.usages[0] >= budget >= model.policy.menu.usages[-1]
    assert bdf.compile(model)(torch.randn(2, 3, 32, 32), budget=budget).logits.shape == (2, 10)


@pytest.mark.parametrize(("depth", "blocks"), [(32, 7), (56, 5)])
def test_one_set_by_name(depth, blocks):
    policy = bdf.load(f"static{depth}-cifar10-jpeg").policy
    assert isinstance(policy, bdf.FixedPolicy)
    assert policy.keep.sum() == blocks


@pytest.mark.parametrize(("depth", "blocks"), [(32, 15), (56, 27)])
def test_backbone_by_name(depth, blocks):
    assert bdf.load_backbone(f"resnet{depth}-cifar10-jpeg").num_blocks == blocks


def test_cascade_by_name(tmp_path, monkeypatch):
    """Of the models that come with the package, whatever else is called like them."""
    monkeypatch.chdir(tmp_path)
    bdf.save(bdf.resnet_cifar(8), "resnet56-cifar10-jpeg")
    cascade = bdf.load("cascade-cifar10-jpeg").eval()
    blocks = [blocks_of(network) for network in cascade.networks]
    assert blocks == [5, 7, 27]
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    decisions = bdf.compile(cascade)(images).decisions
    assert len(decisions.unique(dim=0)) == 3


def test_a_file_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bdf.save(bdf.resnet_cifar(8), "resnet32-cifar10-jpeg")
    assert bdf.load_backbone("resnet32-cifar10-jpeg").num_blocks == 3


def test_an_unknown_name_is_a_missing_file():
    with pytest.raises(FileNotFoundError, match="resnet99"):
        bdf.load("resnet99")
