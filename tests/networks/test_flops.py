"""FLOPs: the paper's figures, and PyTorch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from blockdrop_fast.engine import compile
from blockdrop_fast.networks.architectures import (
    resnet18,
    resnet32,
    resnet34,
    resnet50,
    resnet101,
    resnet110,
    resnet152,
    resnet_cifar,
    resnet_imagenet,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from blockdrop_fast.networks.blockdrop import BlockDrop
from blockdrop_fast.networks.cascade import Cascade
from blockdrop_fast.networks.flops import block_flops, fixed_flops, flops
from blockdrop_fast.networks.look import LookPolicy
from blockdrop_fast.networks.policy import policy_resnet8, policy_resnet10
from blockdrop_fast.networks.resnet import ResNet, ResNetConfig
from tests.random_networks import CIFAR, CUSTOM, GATED, GROUPED, make_gated_model


def on_meta(build, *arguments):
    """Networks of full size need no memory to be counted."""
    with torch.device("meta"):
        return build(*arguments)


@pytest.mark.parametrize(
    ("build", "arguments", "expected"),
    [
        (resnet32, (), "1.377e+08"),
        (resnet110, (), "5.058e+08"),
        (resnet101, (), "1.560e+10"),
        (resnet_imagenet, ((3, 4, 14, 3),), "1.17e+10"),
        (resnet_imagenet, ((3, 4, 15, 3),), "1.21e+10"),
        (resnet_imagenet, ((3, 4, 18, 3),), "1.34e+10"),
    ],
)
def test_backbones_cost_what_the_paper_says(build, arguments, expected):
    digits = len(expected.split("e")[0]) - 2
    assert f"{flops(on_meta(build, *arguments)).item():.{digits}e}" == expected


@pytest.mark.parametrize(
    ("backbone", "policy", "expected"),
    [(resnet110, policy_resnet8, "2.45e+07"), (resnet101, policy_resnet10, "4.72e+08")],
)
def test_policy_networks_cost_what_the_paper_says(backbone, policy, expected):
    backbone = on_meta(backbone)
    model = BlockDrop(backbone, on_meta(policy, backbone.num_blocks))
    assert f"{fixed_flops(model) - fixed_flops(backbone):.2e}" == expected
    assert flops(model).item() == flops(backbone).item() + fixed_flops(model) - fixed_flops(
        backbone
    )


def test_published_blockdrop_110_costs_what_the_paper_says():
    """1.81e8 at 16.9 blocks, policy network included (section 4.2), of whichever blocks."""
    backbone = on_meta(resnet110)
    model = BlockDrop(backbone, on_meta(policy_resnet8, 54))
    costs = block_flops(backbone)
    cheapest, usual = costs.min().item(), costs.max().item()
    assert (costs == cheapest).nonzero().flatten().tolist() == [18, 36]  # those with stride
    assert (costs == usual).sum() == 52
    without_strided = fixed_flops(model) + 16.9 * usual
    with_strided = without_strided - 2 * (usual - cheapest)
    assert with_strided < 1.81e8 < without_strided


NETWORKS = [
    ResNetConfig("basic", (2, 1, 2), (8, 16, 24), "cifar", "average_pool", 5),
    ResNetConfig("basic", (1, 2), (8, 16), "cifar", "projection", 5),
    ResNetConfig("bottleneck", (1, 2, 2, 1), (8, 16, 16, 32), "imagenet", "projection", 7),
    ResNetConfig("basic", (1, 2), (8, 16), "cifar", "average_pool", 5, (3, 16, 9)),
    GROUPED,
]


def count_with_pytorch(call, *arguments):
    with FlopCounterMode(display=False) as counter:
        call(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "config", NETWORKS, ids=lambda config: f"{config.block}-{config.stem}-{config.block_widths}"
)
@pytest.mark.parametrize("size", [(32, 48), (68, 36)])
def test_agrees_with_pytorchs_counter(config, size):
    """Run one image at a time: the reference then skips what its decisions drop."""
    torch.manual_seed(0)
    backbone = ResNet(config).eval()
    decisions = torch.randint(0, 2, (5, backbone.num_blocks))
    decisions[0], decisions[1] = 0, 1
    images = torch.randn(5, 3, *size)
    counted = [
        count_with_pytorch(backbone, images[i : i + 1], decisions[i : i + 1]) for i in range(5)
    ]
    assert flops(backbone, decisions, image_size=size).tolist() == counted
    assert counted[0] == fixed_flops(backbone, size)
    assert counted[1] == flops(backbone, image_size=size).item()


@pytest.mark.parametrize(("policy", "size"), [(policy_resnet8, 32), (policy_resnet10, 70)])
def test_policy_agrees_with_pytorchs_counter(policy, size):
    backbone = resnet_cifar(14) if size == 32 else ResNet(NETWORKS[2])
    model = BlockDrop(backbone, policy(backbone.num_blocks)).eval()
    counted = count_with_pytorch(model.policy, torch.randn(1, 3, size, size))
    assert fixed_flops(model, size) - fixed_flops(backbone, size) == counted


@pytest.mark.parametrize(("config", "after", "size"), [(NETWORKS[0], 2, 32), (NETWORKS[2], 1, 96)])
def test_looking_agrees_with_pytorchs_counter(config, after, size):
    model = BlockDrop(ResNet(config), LookPolicy(config, after)).eval()
    features = model.backbone.features(torch.randn(1, 3, size, size), after)
    counted = count_with_pytorch(model.policy, features)
    assert fixed_flops(model, size) - fixed_flops(model.backbone, size) == counted


def test_looking_costs_an_eighth_of_a_block():
    backbone = on_meta(resnet_cifar, 56)
    with torch.device("meta"):
        model = BlockDrop(backbone, LookPolicy(backbone.config, 2))
    cost = fixed_flops(model) - fixed_flops(backbone)
    assert cost == pytest.approx(block_flops(backbone).max().item() / 8, rel=0.01)


def test_result_is_float64_and_takes_every_form_of_decisions():
    backbone = on_meta(resnet_cifar, 14)
    decisions = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]])
    expected = flops(backbone, decisions)
    assert expected.shape == (2,)
    assert expected.dtype == torch.float64
    for dtype in (torch.bool, torch.uint8, torch.float16, torch.float64):
        assert torch.equal(flops(backbone, decisions.to(dtype)), expected)
    assert flops(backbone, decisions[:0]).shape == (0,)
    assert flops(backbone).shape == (1,)


@pytest.mark.parametrize(
    ("build", "published"),
    [
        (resnet18, 1.81),
        (resnet34, 3.66),
        (resnet50, 4.09),
        (resnet101, 7.80),
        (resnet152, 11.51),
        (resnext50_32x4d, 4.23),
        (resnext101_32x8d, 16.41),
        (resnext101_64x4d, 15.46),
        (wide_resnet50_2, 11.40),
        (wide_resnet101_2, 22.75),
    ],
)
def test_imagenet_networks_as_torchvision_publishes_them(build, published):
    """In units of 1e9 multiply-accumulates, as in the table of its weights."""
    assert round(flops(on_meta(build)).item() / 2e9, 2) == published


def test_default_sizes_are_those_of_the_data_sets():
    small, large = on_meta(resnet_cifar, 14), on_meta(resnet50)
    assert torch.equal(flops(small), flops(small, image_size=32))
    assert torch.equal(flops(large), flops(large, image_size=(224, 224)))


@pytest.mark.parametrize(
    ("decisions", "error", "message"),
    [
        ([[1, 0]], TypeError, "decisions: expected a torch.Tensor, got list"),
        (torch.ones(6), ValueError, r"expected shape \(B, K\) = \(1, 6\), got \(6,\)"),
        (torch.ones(2, 5), ValueError, r"expected shape \(B, K\) = \(2, 6\), got \(2, 5\)"),
        (torch.full((1, 6), 0.5), ValueError, "expected only 0 and 1, got 0.5"),
    ],
)
def test_bad_decisions(decisions, error, message):
    with pytest.raises(error, match=message):
        flops(on_meta(resnet_cifar, 14), decisions)


def test_bad_model_and_size():
    with pytest.raises(
        TypeError, match="model: expected a BlockDrop, ResNet or Cascade, got Linear"
    ):
        flops(torch.nn.Linear(2, 2))
    for size in (30, 0, (32, -4)):
        with pytest.raises(ValueError, match=r"image_size: .* positive multiples of 4, got"):
            flops(on_meta(resnet_cifar, 14), image_size=size)


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("name", ["cifar", "bottleneck", "one segment"])
def test_gates_cost_what_the_engine_computes(kind, name):
    """An image at a time, by PyTorch's counter; in float64, where its operators are not fused."""
    model, images = make_gated_model(kind, CIFAR if name == "cifar" else CUSTOM[name])
    engine = compile(model, dtype=torch.float64)
    found = set()
    for image in images[:8].double().split(1):
        with FlopCounterMode(display=False) as counter:
            output = engine(image)
        cost = flops(model, output.decisions, image_size=tuple(image.shape[2:])).item()
        assert counter.get_total_flops() == cost
        found.add(cost)
    assert len(found) > 1
    assert flops(model, image_size=tuple(image.shape[2:])) >= max(found)


def test_a_cascade_costs_the_networks_that_ran():
    networks = [on_meta(resnet_cifar, depth) for depth in (20, 32)]
    cascade = Cascade(networks)
    first, both = flops(cascade, torch.tensor([[1, 0], [1, 1]])).tolist()
    assert first == flops(networks[0]).item()
    assert both == first + flops(networks[1]).item() == flops(cascade).item()
