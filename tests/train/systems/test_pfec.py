"""The stage pfec: which filters go, what it saves, that it learns, alone and under a policy."""

import json
from dataclasses import replace

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.data.image_sets import NO_NORMALIZATION
from tests.random_networks import BOTTLENECK, CIFAR, make_images, make_network, make_policy
from tests.train.conftest import FEW
from train.systems.config import Pfec
from train.systems.pfec import VARIANTS, _block_widths, pfec, prune

SMALL = FEW | {"epochs": 2, "schedule": "one_cycle", "lr": 0.05}
HALF = {"ratios": (0.5, 0.5, 0.5), "skip": (2,)}


def last_row(out):
    return json.loads((out / "metrics.json").read_text())[-1]


@pytest.mark.parametrize(
    ("depth", "variant", "widths", "saved"),
    [
        (56, "A", (14, 28, 57), 10.4),
        (56, "B", (6, 22, 57), 27.6),
        (110, "A", (8, 32, 64), 15.9),
        (110, "B", (8, 19, 44), 38.6),
        (32, "A", (8, 32, 64), 13.7),
        (32, "B", (8, 19, 44), 33.4),
    ],
)
def test_variants_cut_off_what_the_paper_says(depth, variant, widths, saved):
    """Li et al. 2017, table 1; 110-B comes to 38.7 by its own widths."""
    with torch.device("meta"):
        whole = bdf.resnet_cifar(depth)
        narrower = _block_widths(Pfec(variant=variant), whole.config)
        pruned = bdf.ResNet(replace(whole.config, block_widths=narrower))
    assert set(narrower) <= {*widths, 16, 32, 64}
    _, skipped = VARIANTS[whole.config.layers][variant]
    assert all(narrower[k - 1] == whole.config.inner_widths[k - 1] for k in skipped)
    share = 100 * (1 - float(bdf.flops(pruned)) / float(bdf.flops(whole)))
    assert share == pytest.approx(saved, abs=0.11)


def test_widths_of_whole_vectors():
    config = Pfec(ratios=(0.5, 0.4, 0.3), skip=(1,), multiple=8)
    assert _block_widths(config, CIFAR) == (16, 8, 24, 48, 48)


def test_the_weakest_filters_go():
    """A filter of zeros is worth nothing, and its norm is the smallest."""
    network = make_network(CIFAR)
    widths = [8, 15, 19, 64, 40]
    for (block, _), width in zip(network.blocks(), widths, strict=True):
        gone = torch.randperm(block.conv1.out_channels)[width:]
        with torch.no_grad():
            block.conv1.weight[gone] = 0
            block.bn1.bias[gone] = 0
            block.bn1.running_mean[gone] = 0
    images = make_images(CIFAR, 4)
    pruned = prune(network, widths)
    assert pruned.config.block_widths == (8, 15, 19, 64, 40)
    torch.testing.assert_close(pruned.eval()(images), network(images))
    again = prune(pruned, [4, 4, 4, 4, 4])
    assert again.config.inner_widths == (4, 4, 4, 4, 4)


@pytest.fixture(scope="module")
def trained(pretrained, tmp_path_factory):
    out = tmp_path_factory.mktemp("pfec")
    pfec(Pfec(model=pretrained / "model.safetensors", out=out, **HALF, **SMALL))
    return out


def test_a_narrower_network_learns(trained, pretrained):
    row, network = last_row(trained), bdf.load_backbone(trained / "model.safetensors")
    assert network.config.block_widths == (8, 32, 32)
    assert network.normalization is not None
    assert row["test_accuracy"] > 0.3
    assert row["test_flops"] == float(bdf.flops(network))
    whole = bdf.load_backbone(pretrained / "model.safetensors")
    assert row["pruned"] == pytest.approx(1 - row["test_flops"] / float(bdf.flops(whole)))
    torch.testing.assert_close(
        bdf.compile(network.eval(), strategy="gather")(torch.zeros(1, 3, 32, 32)).logits,
        network(torch.zeros(1, 3, 32, 32)),
    )


@pytest.mark.parametrize("policy", ["network", "fixed"])
def test_a_policy_stays(policy, pretrained, tmp_path):
    backbone = bdf.load_backbone(pretrained / "model.safetensors")
    model = bdf.BlockDrop(
        backbone,
        make_policy(3)
        if policy == "network"
        else bdf.FixedPolicy(torch.tensor([True, True, False])),
    )
    bdf.save(model, tmp_path / "model.safetensors")
    pfec(Pfec(model=tmp_path / "model.safetensors", out=tmp_path / "run", **HALF, **SMALL))
    after = bdf.load(tmp_path / "run" / "model.safetensors")
    assert after.backbone.config.block_widths == (8, 32, 32)
    for name, value in model.policy.state_dict().items():
        assert torch.equal(after.policy.state_dict()[name], value), name
    row = last_row(tmp_path / "run")
    assert 0 <= row["test_sparsity"] <= 3
    if policy == "fixed":
        assert row["test_sparsity"] == 2
        dropped, before = after.backbone.segments[2][0], prune(backbone, (8, 32, 32)).segments[2][0]
        assert torch.equal(dropped.conv1.weight, before.conv1.weight)


def test_a_killed_run_goes_on_to_the_same_model(pretrained, trained, killed, tmp_path):
    config = Pfec(model=pretrained / "model.safetensors", out=tmp_path, **HALF, **SMALL)
    killed(pfec, config)
    with pytest.raises(FileExistsError, match="--resume"):
        pfec(config)
    pfec(replace(config, resume=True))
    whole, resumed = (
        bdf.load_backbone(out / "model.safetensors").state_dict() for out in (trained, tmp_path)
    )
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_the_papers_schedule(pretrained, tmp_path):
    options = FEW | {"epochs": 1, "limit": 64}
    pfec(Pfec(model=pretrained / "model.safetensors", out=tmp_path, **HALF, **options))
    assert last_row(tmp_path)["epoch"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "model: a backbone or BlockDrop checkpoint is required"),
        ({"ratios": None, "skip": None}, r"variant: known for .* layers=\(1, 1, 1\)"),
        ({"ratios": None}, "skip: expected with --ratios|variant: known"),
        ({"ratios": (0.5,)}, r"ratios: expected 3 of 0 to below 1, got \(0.5,\)"),
        ({"ratios": (0.5, 1.0, 0.5)}, "ratios: expected 3 of 0 to below 1"),
        ({"skip": (4,)}, r"skip: expected blocks out of 1 to 3, got \(4,\)"),
        ({"multiple": 0}, "multiple: expected 1 or more, got 0"),
    ],
)
def test_bad_options(options, message, pretrained, tmp_path):
    config = Pfec(model=pretrained / "model.safetensors", out=tmp_path / "run", **HALF, **SMALL)
    with pytest.raises(ValueError, match=message):
        pfec(replace(config, **options))
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_pruned(tmp_path):
    with pytest.raises(ValueError, match="expected basic blocks to prune, got bottleneck ones"):
        prune(make_network(BOTTLENECK), (4, 4, 6, 8, 8))
    with pytest.raises(
        ValueError, match="block 2 has 16 filters, expected at most as many, got 17"
    ):
        prune(make_network(CIFAR), (16, 17, 32, 64, 64))
    with pytest.raises(ValueError, match="expected a width of 1 or more for each of 5 blocks"):
        prune(make_network(CIFAR), (16, 16))
    backbone = make_network(CIFAR)
    backbone.normalization = NO_NORMALIZATION
    path = tmp_path / "model.safetensors"
    bdf.save(bdf.BlockDrop(backbone, bdf.SequentialPolicy(CIFAR)), path)
    with pytest.raises(ValueError, match="decides by what its backbone sees"):
        pfec(Pfec(model=path, out=tmp_path / "run", **HALF, **SMALL))
