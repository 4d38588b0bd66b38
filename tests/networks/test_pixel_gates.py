"""Gates that decide for every pixel: masks, what they cost, what of them is left for engines."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import blockdrop_fast as bdf
from blockdrop_fast.networks.checkpoints import CheckpointError
from tests.random_networks import (
    BOTTLENECK,
    CIFAR,
    NARROWER,
    make_gated_model,
    make_images,
    make_network,
    randomise_batch_norm,
)

CONFIGS = {"cifar": CIFAR, "bottleneck": BOTTLENECK, "narrower": NARROWER}


def make_masked(config=CIFAR, seed=0):
    """A model whose masks are 0 for about half of the pixels, and images; in float64."""
    backbone, images = make_network(config, seed).double(), make_images(config, 16, seed).double()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        policy = bdf.LowCostMasks(config).double()
        for mask in policy.masks:
            nn.init.normal_(mask.weight)
            seen = []
            hook = mask.register_forward_hook(lambda _, __, wanted, seen=seen: seen.append(wanted))
            policy.run(backbone, images)
            hook.remove()
            mask.bias -= seen[0].median() + 1e-4  # no pixel is right at 0
    return bdf.BlockDrop(backbone, policy).eval(), images


def make_spatial(config=CIFAR, seed=0):
    """A model in which positions halt at different blocks, and images; in float64."""
    backbone, images = make_network(config, seed).double(), make_images(config, 16, seed).double()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        policy = bdf.SpatialHaltingPolicy(config, bias=4.0).double()
        randomise_batch_norm(policy, seed)
        for head in policy.heads:
            if not isinstance(head, nn.Identity):
                nn.init.normal_(head.local[1].weight)
                nn.init.normal_(head.whole[1].weight)
    return bdf.BlockDrop(backbone, policy).eval(), images


# ------------------------------------------------------------------ low-cost masks


@torch.no_grad()
def test_new_masks_change_nothing():
    backbone, images = make_network(CIFAR), make_images(CIFAR, 4)
    output = bdf.BlockDrop(backbone, bdf.LowCostMasks(CIFAR)).eval()(images)
    assert torch.equal(output.logits, backbone(images))
    assert output.decisions.all()
    assert (output.densities == 1).all()
    size = tuple(images.shape[2:])
    masks = output.flops - bdf.flops(backbone, image_size=size)
    pixels = [8 * 12, 8 * 12, 8 * 12, 8 * 12, 24, 24, 6, 6, 6, 6]
    channels = [16, 16, 16, 16, 16, 32, 32, 64, 64, 64]
    expected = 2 * sum(p * c for p, c in zip(pixels, channels, strict=True))
    assert masks.tolist() == [expected] * 4


@torch.no_grad()
@pytest.mark.parametrize("name", ["cifar", "narrower"])
def test_masks_pixel_by_pixel(name):
    """One image at a time, every pixel looked at by itself; FLOPs counted one by one."""
    model, images = make_masked(CONFIGS[name])
    output = model(images)
    size = tuple(images.shape[2:])
    fixed = bdf.flops(model.backbone, torch.zeros(1, 5), image_size=size).item()
    for image in range(3):
        x, masks, flops = model.backbone.stem(images[image : image + 1]), model.policy.masks, fixed
        for k, (block, shortcut) in enumerate(model.backbone.blocks()):
            y = x
            for conv, bn, mask in (
                (block.conv1, block.bn1, masks[2 * k]),
                (block.conv2, block.bn2, masks[2 * k + 1]),
            ):
                inputs, y = y, bn(conv(y))
                weight, stride = mask.weight[0, :, 0, 0], mask.stride[0]
                for i in range(y.shape[2]):
                    for j in range(y.shape[3]):
                        at = weight @ inputs[0, :, i * stride, j * stride] + mask.bias[0]
                        y[:, :, i, j] *= min(max(at.item(), 0.0), 1.0)
                        flops += 2 * len(weight) + (2 * conv.weight.numel() if at > 0 else 0)
                y = y if conv is block.conv2 else F.relu(y)
            x = F.relu(shortcut(x) + y)
        torch.testing.assert_close(model.backbone.classifier(x)[0], output.logits[image])
        assert output.flops[image].item() == flops
    assert 0.2 < output.densities.mean() < 0.8


@torch.no_grad()
def test_masks_of_whole_blocks_are_decisions():
    """Where the masks are 1 but for blocks that they drop, an engine computes the same."""
    model, images = make_masked()
    model.float()
    images = images.float()
    dropped = [1, 2, 4]
    for k in range(5):
        for mask, bias in ((model.policy.masks[2 * k], 1.0), (model.policy.masks[2 * k + 1], 1.0)):
            mask.weight.zero_()
            mask.bias.fill_(bias)
        if k in dropped:
            model.policy.masks[2 * k + 1].bias.fill_(-1.0)
    output = model(images)
    expected = [k not in dropped for k in range(5)]
    assert output.decisions.tolist() == [expected] * len(images)
    assert (output.densities == torch.tensor(expected)).all()
    run = bdf.compile(model.backbone).run(images, output.decisions)
    torch.testing.assert_close(run, output.logits, rtol=1e-4, atol=1e-4)


def test_flops_have_a_gradient():
    model, images = make_masked()
    output = model.policy.run_with(model.backbone, images)
    assert torch.equal(output.flops, model(images).flops)
    (bias,) = torch.autograd.grad(output.flops.sum(), model.policy.masks[1].bias)
    assert bias.item() > 0
    assert not model(images).logits.requires_grad


# ------------------------------------------------------------------ spatial halting


@torch.no_grad()
@pytest.mark.parametrize("name", ["cifar", "bottleneck"])
def test_positions_halt_one_by_one(name):
    """Each position by itself: what it runs, its mean; FLOPs counted one by one."""
    model, images = make_spatial(CONFIGS[name])
    output, ponder = model.policy.run_with(model.backbone, images)
    size = tuple(images.shape[2:])
    costs = [
        (bdf.flops(model.backbone, row[None], image_size=size) - fixed).item()
        for fixed in [bdf.flops(model.backbone, torch.zeros(1, 5), image_size=size)]
        for row in torch.eye(5)
    ]
    for image in range(3):
        x, k, found = model.backbone.stem(images[image : image + 1]), 0, 0.0
        flops = bdf.flops(model.backbone, torch.zeros(1, 5), image_size=size).item()
        for segment, shortcut in zip(
            model.backbone.segments, model.backbone.shortcuts, strict=True
        ):
            sums = mean = None
            for index, block in enumerate(segment):
                y = F.relu((x if index else shortcut(x)) + block(x))
                if index == 0:
                    x, flops = y, flops + costs[k]
                    height, width = y.shape[2:]
                    sums = [[0.0] * width for _ in range(height)]
                    runs = {(i, j) for i in range(height) for j in range(width)}
                    mean = torch.zeros_like(y)
                else:
                    x = x.clone()
                    beside = {
                        (i + a, j + b) for i, j in runs for a in (-1, 0, 1) for b in (-1, 0, 1)
                        if 0 <= i + a < height and 0 <= j + b < width
                    }  # fmt: skip
                    for i, j in runs:
                        x[:, :, i, j] = y[:, :, i, j]
                    sizes = [m.weight.numel() for m in block.children() if hasattr(m, "stride")]
                    flops += 2 * (sizes[0] * len(beside) + sum(sizes[1:]) * len(runs))
                assert output.decisions[image, k] == bool(runs)
                assert output.densities[image, k].item() == pytest.approx(
                    len(runs) / height / width
                )
                last = index == len(segment) - 1
                if not last:
                    head = model.policy.heads[k]
                    scores = head(x).sigmoid()[0, 0]
                    flops += 2 * head.local[1].weight.numel() * len(runs)
                    flops += 2 * x.shape[1] if runs else 0
                for i, j in sorted(runs):
                    score = 1.0 if last else scores[i, j].item()
                    halts = last or sums[i][j] + score >= 0.99
                    weight = 1 - sums[i][j] if halts else score
                    mean[:, :, i, j] += weight * x[:, :, i, j]
                    sums[i][j] += score
                    found += (1 + (weight if halts else 0)) / height / width
                    if halts:
                        runs.remove((i, j))
                k += 1
            x = mean
        torch.testing.assert_close(model.backbone.classifier(x)[0], output.logits[image])
        assert output.flops[image].item() == pytest.approx(flops, rel=1e-12)
        assert ponder[image].item() == pytest.approx(found)
    assert output.densities.unique().numel() > 5


@torch.no_grad()
def test_heads_that_see_whole_images_only_are_halting():
    model, images = make_gated_model("halting")
    spatial = bdf.SpatialHaltingPolicy(CIFAR).eval()
    for head, one in zip(spatial.heads, model.policy.heads, strict=True):
        if not isinstance(one, nn.Identity):
            head.whole[0].load_state_dict(one[0].state_dict())
            head.whole[1].weight.copy_(one[1].weight)
            head.local[1].weight.zero_()
            head.local[1].bias.copy_(one[1].bias)
    expected, output = model(images), bdf.BlockDrop(model.backbone, spatial)(images)
    assert torch.equal(output.decisions, expected.decisions)
    assert torch.equal(output.densities, expected.decisions.float())
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ files, and what is refused


@torch.no_grad()
@pytest.mark.parametrize("make", [make_masked, make_spatial])
def test_round_trip(make, tmp_path):
    model, images = make()
    bdf.save(model, tmp_path / "model.safetensors")
    loaded = bdf.load(tmp_path / "model.safetensors").eval()
    assert type(loaded.policy) is type(model.policy)
    for found, expected in zip(loaded(images), model(images), strict=True):
        assert torch.equal(found, expected)


def test_masks_for_another_network(tmp_path):
    other = replace(CIFAR, layers=(2, 2, 2))
    with pytest.raises(ValueError, match="decides on 6 blocks, but the backbone has 5"):
        bdf.BlockDrop(make_network(CIFAR), bdf.LowCostMasks(other))
    with pytest.raises(ValueError, match=r"masks are for blocks of widths \(16, 16, 32, 64, 64\)"):
        bdf.BlockDrop(make_network(NARROWER), bdf.LowCostMasks(CIFAR))
    with pytest.raises(ValueError, match="expected basic blocks, got bottleneck ones"):
        bdf.LowCostMasks(BOTTLENECK)
    with pytest.raises(ValueError, match="epsilon: expected between 0 and 1, got 1"):
        bdf.SpatialHaltingPolicy(CIFAR, epsilon=1)
    model, _ = make_masked()
    model.policy.masks[1] = nn.Conv2d(8, 1, 1)
    bdf.save(model, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit the architecture gates low_cost"):
        bdf.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("make", [make_masked, make_spatial])
def test_engines_do_not_run_pixels(make):
    model, images = make()
    with pytest.raises(TypeError, match="decides for every pixel, which the reference alone does"):
        bdf.compile(model)
    with pytest.raises(TypeError, match="decisions do not say what"):
        bdf.flops(model)
    with pytest.raises(TypeError, match="do not say which pixels"):
        model.policy.replay(model.backbone, images, model(images))
