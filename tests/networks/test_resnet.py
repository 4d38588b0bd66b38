"""Models: the reference against a naive implementation, and what they refuse."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from blockdrop_fast.decisions import check_decisions, check_images
from blockdrop_fast.networks.architectures import (
    IMAGENET_ARCHITECTURES,
    by_name,
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
from blockdrop_fast.networks.policy import PolicyNetwork, decide, policy_resnet8, policy_resnet10
from blockdrop_fast.networks.resnet import ResNet, ResNetConfig
from tests.random_networks import make_network, random_images

CONFIGS = {
    "average-pool": ResNetConfig("basic", (2, 1, 2), (4, 8, 16), "cifar", "average_pool", 5),
    "subsample": ResNetConfig("basic", (1, 2, 2), (4, 8, 15), "cifar", "subsample", 5),
    "wide-first-segment": ResNetConfig("bottleneck", (1, 2), (4, 8), "cifar", "subsample", 5),
    "projection": ResNetConfig("bottleneck", (2, 1, 2), (4, 6, 8), "imagenet", "projection", 5),
    "basic-projection": ResNetConfig("basic", (1, 2), (64, 8), "imagenet", "projection", 5),
    "narrower": ResNetConfig("basic", (1, 2), (4, 8), "cifar", "subsample", 5, (3, 8, 9)),
    "narrower-bottleneck": ResNetConfig(
        "bottleneck", (1, 2), (4, 6), "imagenet", "projection", 5, (3, 5, 1)
    ),
    "grouped": ResNetConfig(
        "bottleneck", (1, 2), (4, 6), "imagenet", "projection", 5, (6, 9, 12), groups=3
    ),
}


def make_images(config, batch):
    size = (36, 50) if config.stem == "imagenet" else (16, 12)
    return random_images(batch, torch.float64, size, seed=1)


def make_decisions(config):
    """All kept, all dropped, only the first blocks of segments, only the others, random."""
    firsts = torch.zeros(config.num_blocks)
    start = 0
    for layers in config.layers:
        firsts[start] = 1
        start += layers
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(0, 2, (4, config.num_blocks), generator=generator)
    rows = [torch.ones_like(firsts), torch.zeros_like(firsts), firsts, 1 - firsts, *drawn.float()]
    return torch.stack(rows)


def naive(network, images, decisions):
    """RESEARCH.md section 1 (the authors' semantics) image by image, from the raw weights."""
    config = network.config
    weights = dict(network.named_parameters()) | dict(network.named_buffers())

    def conv_bn(x, conv, bn, stride=1):
        kernel = weights[f"{conv}.weight"]
        inputs = x.split(kernel.shape[1], 1)  # of each group
        parts = zip(inputs, kernel.chunk(len(inputs)), strict=True)
        padding = kernel.shape[-1] // 2
        x = torch.cat([F.conv2d(part, one, None, stride, padding) for part, one in parts], 1)
        mean, var = weights[f"{bn}.running_mean"], weights[f"{bn}.running_var"]
        scale = weights[f"{bn}.weight"] / (var + 1e-5).sqrt()
        shift = weights[f"{bn}.bias"] - mean * scale
        return x * scale[:, None, None] + shift[:, None, None]

    def shortcut(x, segment, out_channels):
        stride = 1 if segment == 0 else 2
        if stride == 1 and x.shape[1] == out_channels:
            return x
        if config.shortcut == "projection":
            return conv_bn(x, f"shortcuts.{segment}.conv", f"shortcuts.{segment}.bn", stride)
        batch, channels, height, width = x.shape
        result = x.new_zeros(batch, out_channels, height // stride, width // stride)
        before = 0
        if config.shortcut == "subsample":
            before = (out_channels - channels) // 2
        for row in range(stride if config.shortcut == "average_pool" else 1):
            for column in range(stride if config.shortcut == "average_pool" else 1):
                result[:, before : before + channels] += x[:, :, row::stride, column::stride]
        return result / stride**2 if config.shortcut == "average_pool" else result

    all_logits = []
    for image, keep in zip(images, decisions.tolist(), strict=True):
        keep = iter(keep)
        imagenet = config.stem == "imagenet"
        x = conv_bn(image[None], "conv1", "bn1", 2 if imagenet else 1).relu()
        if imagenet:
            x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)  # zeros are neutral after ReLU
        for segment, (layers, width) in enumerate(zip(config.layers, config.widths, strict=True)):
            out_channels = width * (4 if config.block == "bottleneck" else 1)
            for block in range(layers):
                residual = shortcut(x, segment, out_channels) if block == 0 else x
                if next(keep):
                    name = f"segments.{segment}.{block}."
                    stride = 2 if block == 0 and segment > 0 else 1
                    strides = (1, stride, 1) if config.block == "bottleneck" else (stride, 1)
                    for number, conv_stride in enumerate(strides, 1):
                        x = x.relu() if number > 1 else x
                        x = conv_bn(x, f"{name}conv{number}", f"{name}bn{number}", conv_stride)
                    x = (residual + x).relu()
                else:
                    x = residual
        pooled = x.flatten(2).mean(2)
        all_logits.append(pooled @ weights["fc.weight"].T + weights["fc.bias"])
    return torch.cat(all_logits)


# ------------------------------------------------------------------ semantics


@pytest.mark.parametrize("active_only", [False, True], ids=["masked", "active"])
@pytest.mark.parametrize("name", CONFIGS)
def test_reference_is_the_naive_implementation(name, active_only):
    network = make_network(CONFIGS[name]).double()
    decisions = make_decisions(network.config)
    images = make_images(network.config, len(decisions))
    with torch.no_grad():
        logits = network(images, decisions, active_only=active_only)
        torch.testing.assert_close(logits, naive(network, images, decisions))
        everything = network(images, torch.ones_like(decisions), active_only=active_only)
        torch.testing.assert_close(everything, network(images))


@pytest.mark.parametrize("active_only", [False, True], ids=["masked", "active"])
@pytest.mark.parametrize("k", range(5))
def test_each_single_block_can_be_dropped_or_kept_alone(k, active_only):
    network = make_network(CONFIGS["average-pool"]).double()
    images = make_images(network.config, 2)
    alone = torch.zeros(2, 5)
    alone[:, k] = 1
    with torch.no_grad():
        for decisions in (alone, 1 - alone):
            logits = network(images, decisions, active_only=active_only)
            torch.testing.assert_close(logits, naive(network, images, decisions))


@pytest.mark.parametrize("active_only", [False, True], ids=["masked", "active"])
def test_a_dropped_block_has_no_relu(active_only):
    """With a projection that is negative everywhere, a ReLU would leave zeros."""
    network = make_network(CONFIGS["basic-projection"]).double()
    shortcut = network.shortcuts[1]
    with torch.no_grad():
        shortcut.bn.weight.zero_()
        shortcut.bn.bias.fill_(-2)
        dropped = torch.zeros(1, 3)
        logits = network(make_images(network.config, 1), dropped, active_only=active_only)
        expected = network.fc(torch.full((1, 8), -2.0, dtype=torch.float64))
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("shortcut", ["average_pool", "subsample"])
def test_parameter_free_shortcuts_by_hand(shortcut):
    network = ResNet(ResNetConfig("basic", (1, 1), (2, 5), "cifar", shortcut, 1))
    x = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]], [[10.0, 0.0], [0.0, 2.0]]]])  # (1, 2, 2, 2)
    expected = {"average_pool": [3.0, 3.0, 0, 0, 0], "subsample": [0, 1.0, 10.0, 0, 0]}[shortcut]
    assert network.shortcuts[1](x).flatten().tolist() == expected
    assert isinstance(network.shortcuts[0], torch.nn.Identity)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_naive_implementation(name):
    network = make_network(CONFIGS[name]).double()
    decisions = make_decisions(network.config)
    decisions[:, 1] = 0  # a block that no image keeps
    decisions[:, 2] = 1  # one that all keep
    images = make_images(network.config, len(decisions))
    target = torch.randn(len(decisions), 5, dtype=torch.float64)

    def gradients(run):
        network.zero_grad()
        inputs = images.clone().requires_grad_()
        (run(inputs) * target).sum().backward()
        parameters = {name: parameter.grad for name, parameter in network.named_parameters()}
        return parameters | {"images": inputs.grad}

    expected = gradients(lambda inputs: naive(network, inputs, decisions))
    untouched = {key for key, value in expected.items() if value is None}
    assert untouched
    for active_only in (False, True):
        found = gradients(lambda inputs: network(inputs, decisions, active_only=active_only))  # noqa: B023
        assert {key for key, value in found.items() if value is None} == untouched
        for key in expected.keys() - untouched:
            torch.testing.assert_close(found[key], expected[key], msg=lambda text: f"{key}: {text}")  # noqa: B023


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_on_active_images_are_those_of_the_masked_run(name, layout):
    """Of weights and images: the derivatives of taking active images and of putting them back."""
    network = make_network(CONFIGS[name]).double().to(memory_format=layout)
    decisions = make_decisions(network.config)
    images = make_images(network.config, len(decisions)).contiguous(memory_format=layout)
    target = torch.randn(len(decisions), 5, dtype=torch.float64)

    def gradients(active_only):
        inputs = images.clone().requires_grad_()
        logits = network(inputs, decisions, active_only=active_only)
        return torch.autograd.grad((logits * target).sum(), [inputs, *network.parameters()])

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("active_only", [False, True], ids=["masked", "active"])
def test_batch_norm_statistics_in_train_mode(active_only):
    """Over all images when masked, over active ones otherwise; untouched if nobody keeps."""
    network = make_network(CONFIGS["average-pool"]).double().train()
    images = make_images(network.config, 4)
    decisions = torch.ones(4, 5)
    decisions[:, 0] = torch.tensor([1, 0, 1, 0])
    decisions[:, 1] = 0
    before = copy.deepcopy(network)
    network(images, decisions, active_only=active_only)
    for key, value in before.segments[0][1].state_dict().items():
        assert torch.equal(network.segments[0][1].state_dict()[key], value), key
    with torch.no_grad():
        block = before.segments[0][0]
        features = block.conv1(before.stem(images))
    seen = features[[0, 2]] if active_only else features
    expected = 0.9 * block.bn1.running_mean + 0.1 * seen.mean((0, 2, 3))
    torch.testing.assert_close(network.segments[0][0].bn1.running_mean, expected)
    assert network.segments[0][0].bn1.num_batches_tracked == 1
    assert network.segments[2][1].bn2.num_batches_tracked == 1


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16,
     torch.float32, torch.float64],
)  # fmt: skip
def test_decisions_of_any_dtype(dtype):
    network = make_network(CONFIGS["subsample"]).double()
    decisions = make_decisions(network.config)
    images = make_images(network.config, len(decisions))
    with torch.no_grad():
        expected = network(images, decisions.bool())
        assert torch.equal(network(images, decisions.to(dtype)), expected)


@pytest.mark.parametrize("active_only", [False, True], ids=["masked", "active"])
@pytest.mark.parametrize("name", ["average-pool", "projection"])
def test_channels_last(name, active_only):
    network = make_network(CONFIGS[name]).double()
    decisions = make_decisions(network.config)
    images = make_images(network.config, len(decisions))
    with torch.no_grad():
        expected = network(images, decisions)
        network.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
        logits = network(images, decisions, active_only=active_only)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_close(dtype):
    config = CONFIGS["average-pool"]
    network = make_network(config).double()
    decisions = make_decisions(config)
    images = make_images(config, len(decisions)).to(dtype)
    with torch.no_grad():
        network.to(dtype)
        logits = network(images, decisions)
        expected = network.double()(images.double(), decisions)
    assert logits.dtype == dtype
    error = (logits.double() - expected).abs().max() / expected.abs().max()
    assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("active_only", [False, True], ids=["masked", "active"])
def test_empty_batch(name, active_only):
    network = make_network(CONFIGS[name]).double()
    images = make_images(network.config, 0)
    decisions = torch.zeros(0, network.num_blocks)
    assert network(images, decisions, active_only=active_only).shape == (0, 5)
    assert network(images).dtype == torch.float64


def test_images_do_not_depend_on_their_batch():
    network = make_network(CONFIGS["projection"]).double()
    decisions = make_decisions(network.config)
    images = make_images(network.config, len(decisions))
    with torch.no_grad():
        together = network(images, decisions, active_only=True)
        alone = [
            network(images[i : i + 1], decisions[i : i + 1], active_only=True)
            for i in range(len(images))
        ]
    torch.testing.assert_close(together, torch.cat(alone))


# ------------------------------------------------------------------ BlockDrop and policies


def test_blockdrop_runs_at_its_policys_decisions():
    backbone = make_network(CONFIGS["average-pool"]).double()
    torch.manual_seed(3)
    model = BlockDrop(backbone, policy_resnet8(5).double()).eval()
    images = make_images(backbone.config, 6)
    with torch.no_grad():
        probabilities = model.policy(images)
        logits, decisions = model(images)
        assert torch.equal(logits, backbone(images, decisions))
    assert decisions.dtype == torch.bool
    assert torch.equal(decisions, probabilities >= 0.5)
    assert 0 < decisions.sum() < decisions.numel()  # the test's policy does decide


def test_decide_keeps_at_one_half():
    probabilities = torch.tensor([[0.5, 0.4999999, 1.0, 0.0]])
    assert decide(probabilities).tolist() == [[True, False, True, False]]


def test_blockdrop_of_networks_that_do_not_fit():
    with pytest.raises(ValueError, match="policy: decides on 7 blocks, but the backbone has 6"):
        BlockDrop(resnet_cifar(14), policy_resnet8(7))


@pytest.mark.parametrize(("build", "size"), [(policy_resnet8, 32), (policy_resnet10, 64)])
def test_policy_networks(build, size):
    policy = build(9).eval()
    assert policy.num_blocks == 9
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        probabilities = policy(images)
        torch.testing.assert_close(probabilities, torch.sigmoid(policy.logits(images)))
    assert probabilities.shape == (3, 9)
    assert ((probabilities > 0) & (probabilities < 1)).all()
    assert policy(images[:0]).shape == (0, 9)
    assert policy.network.num_blocks == {32: 3, 64: 4}[size]


def test_imagenet_policy_sees_the_image_pooled_by_two():
    policy = policy_resnet10(4).eval()
    images = torch.randn(2, 3, 64, 48)
    pooled = images.reshape(2, 3, 32, 2, 24, 2).mean((3, 5))
    with torch.no_grad():
        torch.testing.assert_close(policy.logits(images), policy.network(pooled))


# ------------------------------------------------------------------ named architectures


@pytest.mark.parametrize(
    ("build", "blocks", "parameters"),
    [
        (resnet32, 15, 464_154),
        (resnet110, 54, 1_727_962),
        (lambda: resnet_cifar(20), 9, 269_722),
        (lambda: resnet_cifar(1202), 600, 19_421_274),
        (resnet18, 8, 11_689_512),
        (resnet34, 16, 21_797_672),
        (resnet50, 16, 25_557_032),
        (resnet101, 33, 44_549_160),
        (resnet152, 50, 60_192_808),
        # torchvision's table of its weights (num_params).
        (resnext50_32x4d, 16, 25_028_904),
        (resnext101_32x8d, 33, 88_791_336),
        (resnext101_64x4d, 33, 83_455_272),
        (wide_resnet50_2, 16, 68_883_240),
        (wide_resnet101_2, 33, 126_886_696),
    ],
)
def test_known_parameter_counts(build, blocks, parameters):
    with torch.device("meta"):
        network = build()
    assert network.num_blocks == blocks
    assert len(list(network.blocks())) == blocks
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("layers", [(3, 4, 14, 3), (3, 4, 15, 3), (3, 4, 18, 3)])
def test_static_baselines_of_the_paper(layers):
    """ResNet-72, -75 and -84 of table 2."""
    with torch.device("meta"):
        network = resnet_imagenet(layers, num_classes=11)
    assert [len(segment) for segment in network.segments] == list(layers)
    assert network.num_blocks == sum(layers)
    assert network.fc.out_features == 11
    assert network(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 11)


@pytest.mark.parametrize("depth", [0, 2, 7, 31, 33, -4])
def test_impossible_depths(depth):
    with pytest.raises(ValueError, match=rf"depth: expected 6n\+2 .*, got {depth}"):
        resnet_cifar(depth)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": "wide"}, "block: expected 'basic' or 'bottleneck', got 'wide'"),
        ({"stem": "mnist"}, "stem: expected 'cifar' or 'imagenet', got 'mnist'"),
        ({"shortcut": "conv"}, "shortcut: expected .*, got 'conv'"),
        ({"layers": (1, 1, 1)}, "layers and widths: expected one entry a segment each"),
        ({"layers": (), "widths": ()}, "layers and widths"),
        ({"layers": (1, 0)}, "must be positive"),
        ({"num_classes": 0}, "must be positive"),
        ({"block_widths": (4,)}, r"block_widths: expected .* each of 2 blocks, got \(4,\)"),
        ({"block_widths": (4, 0)}, r"block_widths: expected a width of 1 or more .* \(4, 0\)"),
        ({"groups": 2}, "groups: expected 1 of basic blocks, got 2"),
        ({"block": "bottleneck", "groups": 3}, r"groups: expected a divisor .* \[4, 8\], got 3"),
        ({"block": "bottleneck", "groups": 0}, r"groups: expected a divisor .* \[4, 8\], got 0"),
        ({"widths": (8, 4)}, r"widths: .* fewer channels \(4\) than its input \(8\)"),
    ],
)
def test_impossible_architectures(change, message):
    good = ResNet(ResNetConfig("basic", (1, 1), (4, 8), "cifar", "subsample", 2)).config
    with pytest.raises(ValueError, match=message):
        ResNet(replace(good, **change))


def test_config_takes_lists_and_gives_json():
    config = ResNetConfig("basic", [1, 1], [4, 8], "cifar", "subsample", 2)
    assert config.layers == (1, 1)
    assert ResNetConfig(**config.to_dict()) == config
    assert "block_widths" not in config.to_dict()
    narrower = replace(config, block_widths=[3, 8])
    assert narrower.block_widths == narrower.inner_widths == (3, 8)
    assert ResNetConfig(**narrower.to_dict()) == narrower
    assert replace(config, block_widths=(4, 8)) == config
    grouped = replace(config, block="bottleneck", groups=2)
    assert ResNetConfig(**grouped.to_dict()) == grouped
    assert "groups" not in config.to_dict()


def test_names_of_architectures():
    with torch.device("meta"):
        for name, build in IMAGENET_ARCHITECTURES.items():
            assert by_name(name) is build
            assert build(7).config.num_classes == 7
        assert by_name("resnet20")(10).config == resnet_cifar(20).config
    assert resnext50_32x4d in IMAGENET_ARCHITECTURES.values()
    with pytest.raises(ValueError, match=r"arch: expected resnet18, .*, got 'resnext20'"):
        by_name("resnext20")


@pytest.mark.parametrize("input_pool", [0, -1])
def test_impossible_pooling(input_pool):
    with pytest.raises(ValueError, match=f"input_pool: expected at least 1, got {input_pool}"):
        PolicyNetwork(resnet_cifar(8), input_pool)


# ------------------------------------------------------------------ bad input


NAN_IMAGES = torch.zeros(2, 3, 32, 32)
NAN_IMAGES[1, 2, 31, 31] = torch.nan
INF_IMAGES = torch.zeros(2, 3, 32, 32)
INF_IMAGES[0, 0, 0, 0], INF_IMAGES[0, 0, 0, 1] = torch.inf, -torch.inf

BAD_IMAGES = {
    "list": ([[1.0]], TypeError, "images: expected a torch.Tensor, got list"),
    "uint8": (
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        TypeError,
        "images: expected dtype torch.float32 as the network's weights, got torch.uint8",
    ),
    "float64": (torch.zeros(2, 3, 32, 32).double(), TypeError, "got torch.float64"),
    "one-image": (torch.zeros(3, 32, 32), ValueError, r"\(B, 3, H, W\), got \(3, 32, 32\)"),
    "grey": (torch.zeros(2, 1, 32, 32), ValueError, r"\(B, 3, H, W\), got \(2, 1, 32, 32\)"),
    "behind": (torch.zeros(2, 32, 32, 3), ValueError, r"got \(2, 32, 32, 3\)"),
    "no-pixels": (torch.zeros(2, 3, 0, 0), ValueError, "images: .*height and width .*got 0x0"),
    "nan": (NAN_IMAGES, ValueError, "images: contain NaN or infinite values"),
    "inf": (INF_IMAGES, ValueError, "images: contain NaN or infinite values"),
    "meta": (
        torch.zeros(2, 3, 32, 32, device="meta"),
        ValueError,
        "images: expected on cpu as the network's weights, got on meta",
    ),
}


@pytest.mark.parametrize("network", [resnet_cifar(14), policy_resnet8(6), policy_resnet10(6)])
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images(network, case):
    images, error, message = BAD_IMAGES[case]
    with pytest.raises(error, match=message):
        network(images)


@pytest.mark.parametrize(
    ("network", "size", "message"),
    [
        (resnet_cifar(14), (32, 30), "positive multiples of 4, got 32x30"),
        (resnet_cifar(14), (2, 4), "positive multiples of 4, got 2x4"),
        (
            ResNet(ResNetConfig("basic", (1, 1), (64, 64), "imagenet", "average_pool", 2)),
            (36, 32),
            "positive multiples of 8, got 36x32",
        ),
        (policy_resnet10(6), (1, 64), "height and width of at least 2, got 1x64"),
    ],
)
def test_images_of_the_wrong_size(network, size, message):
    with pytest.raises(ValueError, match=f"images: .*{message}"):
        network(torch.zeros(2, 3, *size))


def test_huge_finite_images_are_no_error():
    images = torch.full((1, 3, 4, 4), 3e38)  # their sum overflows
    check_images(images, channels=3, size_multiple=1, dtype=torch.float32)


BAD_DECISIONS = {
    "list": ([[1, 0]], TypeError, "decisions: expected a torch.Tensor, got list"),
    "complex": (
        torch.ones(2, 6, dtype=torch.complex64),
        TypeError,
        "decisions: expected bool or 0/1 values, got dtype torch.complex64",
    ),
    "wrong-k": (torch.ones(2, 5), ValueError, r"\(B, K\) = \(2, 6\), got \(2, 5\)"),
    "wrong-batch": (torch.ones(3, 6), ValueError, r"\(B, K\) = \(2, 6\), got \(3, 6\)"),
    "transposed": (torch.ones(6, 2), ValueError, r"\(B, K\) = \(2, 6\), got \(6, 2\)"),
    "one-dimension": (torch.ones(6), ValueError, r"\(B, K\) = \(2, 6\), got \(6,\)"),
    "two": (torch.full((2, 6), 2), ValueError, "decisions: expected only 0 and 1, got 2"),
    "probabilities": (torch.full((2, 6), 0.5), ValueError, "expected only 0 and 1, got 0.5"),
    "negative": (torch.full((2, 6), -1), ValueError, "expected only 0 and 1, got -1"),
    "nan": (torch.full((2, 6), torch.nan), ValueError, "expected only 0 and 1, got nan"),
    "meta": (
        torch.ones(2, 6, device="meta"),
        TypeError,
        "decisions: expected a tensor with values, got one on the meta device",
    ),
}


@pytest.mark.parametrize("active_only", [False, True], ids=["masked", "active"])
@pytest.mark.parametrize("case", BAD_DECISIONS)
def test_bad_decisions(case, active_only):
    decisions, error, message = BAD_DECISIONS[case]
    with pytest.raises(error, match=message):
        resnet_cifar(14)(torch.zeros(2, 3, 32, 32), decisions, active_only=active_only)


def test_bad_decisions_for_an_empty_batch():
    with pytest.raises(ValueError, match=r"\(B, K\) = \(0, 6\), got \(0, 7\)"):
        resnet_cifar(14)(torch.zeros(0, 3, 32, 32), torch.ones(0, 7))


def test_values_go_unchecked_on_request():
    """Then every non-zero value means keep."""
    decisions = torch.tensor([[2.0, 0.0, -1.0, torch.nan]])
    keep = check_decisions(
        decisions, batch=1, num_blocks=4, device=torch.device("cpu"), values=False
    )
    assert keep.tolist() == [[True, False, True, True]]
    assert check_decisions(keep, batch=1, num_blocks=4, device=keep.device) is keep
