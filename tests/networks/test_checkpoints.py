"""Checkpoints: every layout that people have, written here with its real key names."""

import json
import os
import pickle
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F

from blockdrop_fast.data.image_sets import (
    IMAGENET_NORMALIZATION,
    NO_NORMALIZATION,
    R32_C10_NORMALIZATION,
    Normalization,
)
from blockdrop_fast.networks import weights
from blockdrop_fast.networks.architectures import (
    resnet_cifar,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from blockdrop_fast.networks.blockdrop import BlockDrop
from blockdrop_fast.networks.checkpoints import (
    CheckpointError,
    init_policy_from_resnet18,
    load,
    load_backbone,
    load_policy,
    save,
)
from blockdrop_fast.networks.policy import PolicyNetwork, policy_resnet8, policy_resnet10
from blockdrop_fast.networks.resnet import ResNet, ResNetConfig
from tests.networks.state_dicts import authors_keys, authors_policy_keys, torchvision_keys
from tests.random_networks import GROUPED

WIDTHS = (64, 8, 8, 16)  # few weights, under the real names
TINY_IMAGENET = ResNetConfig("bottleneck", (2, 1, 1, 2), WIDTHS, "imagenet", "projection", 12)
WIDE = (128, 128, 16, 16, 32, 32)
TINY_RESNEXT = replace(TINY_IMAGENET, block_widths=WIDE, groups=4)
TINY_RESNET18 = ResNetConfig("basic", (2, 2, 2, 2), WIDTHS, "imagenet", "projection", 12)
TINY_RESNET10 = ResNetConfig("basic", (1, 1, 1, 1), WIDTHS, "imagenet", "projection", 6)
TINY_CIFAR = ResNetConfig("basic", (2, 1, 3), (4, 8, 16), "cifar", "average_pool", 7)


def randomise(network):
    """Random weights and statistics, so that no two tensors can be mistaken for each other."""
    torch.manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.1)
        else:
            tensor.fill_(5)
    return network.eval()


def without_counters(state):
    """As files of before PyTorch 0.4.1."""
    return OrderedDict(
        (key, value) for key, value in state.items() if not key.endswith("num_batches_tracked")
    )


def prefixed(state, prefix):
    return OrderedDict((prefix + key, value) for key, value in state.items())


def classifier_named_linear(state):
    return OrderedDict((key.replace("fc.", "linear."), value) for key, value in state.items())


def images_for(network):
    size = 32 if network.config.stem == "cifar" else 48
    dtype = network.fc.weight.dtype
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_same_network(loaded, network):
    """Same architecture and the same bits, and so the same logits."""
    assert loaded.config == network.config
    wanted, found = network.state_dict(), loaded.state_dict()
    assert list(found) == list(wanted)
    for key in wanted:
        assert found[key].dtype == wanted[key].dtype, key
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(found[key], wanted[key]), key
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    images = images_for(network)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), network(images))


@pytest.fixture
def tiny_model():
    backbone = ResNet(TINY_CIFAR)
    return randomise(BlockDrop(backbone, policy_resnet8(backbone.num_blocks)))


# ------------------------------------------------------------------ foreign files


@pytest.mark.parametrize(
    "config",
    [TINY_IMAGENET, TINY_RESNET18, replace(TINY_IMAGENET, block_widths=WIDE), TINY_RESNEXT],
    ids=["bottleneck", "basic", "wide", "grouped"],
)
def test_torchvision_imagenet(tmp_path, config):
    network = randomise(ResNet(config))
    state = torchvision_keys(network)
    assert {"conv1.weight", "bn1.running_mean", "layer1.1.bn2.bias", "fc.bias"} <= set(state)
    assert {"layer2.0.downsample.0.weight", "layer4.0.downsample.1.running_var"} <= set(state)
    torch.save(state, tmp_path / "resnet.pth")
    loaded = load_backbone(tmp_path / "resnet.pth")
    assert_same_network(loaded, network)
    assert loaded.normalization == IMAGENET_NORMALIZATION
    assert loaded.bn1.num_batches_tracked == 5
    safetensors.torch.save_file(state, tmp_path / "resnet.safetensors")
    assert_same_network(load_backbone(tmp_path / "resnet.safetensors"), network)


def torchvision_shapes(layers, groups, width_per_group):
    """Names and shapes of torchvision's bottleneck networks, from its ``resnet.py``."""

    def norm(name, channels):
        parts = ("weight", "bias", "running_mean", "running_var")
        return {f"{name}.{part}": (channels,) for part in parts} | {
            f"{name}.num_batches_tracked": ()
        }

    shapes = {"conv1.weight": (64, 3, 7, 7)} | norm("bn1", 64)
    channels = 64
    for layer, (count, planes) in enumerate(zip(layers, (64, 128, 256, 512), strict=True), 1):
        width = int(planes * (width_per_group / 64.0)) * groups
        for block in range(count):
            name = f"layer{layer}.{block}"
            shapes[f"{name}.conv1.weight"] = (width, channels, 1, 1)
            shapes[f"{name}.conv2.weight"] = (width, width // groups, 3, 3)
            shapes[f"{name}.conv3.weight"] = (4 * planes, width, 1, 1)
            for number, size in enumerate((width, width, 4 * planes), 1):
                shapes |= norm(f"{name}.bn{number}", size)
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (4 * planes, channels, 1, 1)
                shapes |= norm(f"{name}.downsample.1", 4 * planes)
            channels = 4 * planes
    return shapes | {"fc.weight": (1000, 2048), "fc.bias": (1000,)}


@pytest.mark.parametrize(
    ("build", "layers", "groups", "width_per_group"),
    [
        (resnext50_32x4d, (3, 4, 6, 3), 32, 4),
        (resnext101_32x8d, (3, 4, 23, 3), 32, 8),
        (resnext101_64x4d, (3, 4, 23, 3), 64, 4),
        (wide_resnet50_2, (3, 4, 6, 3), 1, 128),
        (wide_resnet101_2, (3, 4, 23, 3), 1, 128),
    ],
)
def test_torchvisions_resnexts_and_wide_resnets(
    tmp_path, monkeypatch, build, layers, groups, width_per_group
):
    shapes = torchvision_shapes(layers, groups, width_per_group)
    with torch.device("meta"):
        network = build()
    assert {key: tuple(one.shape) for key, one in torchvision_keys(network).items()} == shapes
    # One stored value a tensor, and no copy of them: hundreds of megabytes would tell no more.
    state = {key: torch.tensor(1.0).expand(shape) for key, shape in shapes.items()}
    state |= {key: torch.tensor(1) for key in state if key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "net.pth")
    monkeypatch.setattr(weights, "load_strictly", lambda *_: None)
    loaded = load_backbone(tmp_path / "net.pth")
    assert loaded.config == network.config
    assert loaded.normalization == IMAGENET_NORMALIZATION


def test_groups_that_do_not_fit(tmp_path):
    """A file is of so many groups as its first block has, or of one where that comes out odd."""
    state = torchvision_keys(ResNet(TINY_RESNEXT))
    for key, channels, message in (
        ("layer1.0.conv2.weight", 64, r"groups=2.* tensors of another shape: segments\.0\.1"),
        ("layer1.0.conv2.weight", 7, r"groups=1.* tensors of another shape: segments\.0\.0"),
        ("layer1.0.conv2.weight", 0, r"groups=1.* tensors of another shape: segments\.0\.0"),
        ("layer2.0.conv2.weight", 16, r"groups=4.* 1 tensors of another shape: segments\.1\.0"),
    ):
        wrong = torch.zeros(len(state[key]), channels, 3, 3)
        torch.save({**state, key: wrong}, tmp_path / "net.pth")
        with pytest.raises(CheckpointError, match=message):
            load_backbone(tmp_path / "net.pth")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "best_prec1": 92.63, "epoch": 3},
        lambda state: {"state_dict": prefixed(state, "module.")},
        lambda state: prefixed(state, "_orig_mod.module."),
        without_counters,
    ],
    ids=["bare", "state_dict", "module", "compiled-module", "without-counters"],
)
def test_cifar_wrappers(tmp_path, wrap, zipped):
    network = randomise(ResNet(TINY_CIFAR))
    state = wrap(torchvision_keys(network))
    torch.save(state, tmp_path / "net.th", _use_new_zipfile_serialization=zipped)
    assert_same_network(load_backbone(tmp_path / "net.th"), network)


def test_cifar_classifier_name_tells_the_shortcut(tmp_path):
    for shortcut, rename, normalization in (
        ("average_pool", OrderedDict, None),
        ("subsample", classifier_named_linear, IMAGENET_NORMALIZATION),
    ):
        network = randomise(resnet_cifar(14, 10, shortcut))
        torch.save(rename(torchvision_keys(network)), tmp_path / "net.th")
        loaded = load_backbone(tmp_path / "net.th")
        assert_same_network(loaded, network)
        assert loaded.normalization == normalization


def test_cifar_with_projections(tmp_path):
    network = randomise(ResNet(ResNetConfig("basic", (1, 2), (8, 16), "cifar", "projection", 4)))
    state = classifier_named_linear(torchvision_keys(network))
    state = {key.replace("downsample", "shortcut"): value for key, value in state.items()}
    torch.save(state, tmp_path / "net.th")
    loaded = load_backbone(tmp_path / "net.th")
    assert_same_network(loaded, network)
    assert loaded.normalization is None


def test_overrides(tmp_path):
    network = randomise(ResNet(TINY_CIFAR))
    torch.save(torchvision_keys(network), tmp_path / "net.th")
    normalization = Normalization((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    loaded = load_backbone(
        tmp_path / "net.th",
        layers=(2, 1, 3),
        shortcut="subsample",
        num_classes=7,
        normalization=normalization,
    )
    assert loaded.config.shortcut == "subsample"
    assert loaded.normalization == normalization
    images = images_for(network)
    assert not torch.equal(loaded.eval()(images), network(images))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"layers": (3, 3, 3)}, r"layers=\(3, 3, 3\) contradicts .* layers=\(2, 1, 3\)"),
        ({"layers": (2, 1)}, "layers and widths: expected one entry a segment"),
        ({"num_classes": 10}, "num_classes=10 contradicts .* num_classes=7"),
        ({"shortcut": "projection"}, "shortcut='projection' contradicts .*'average_pool'"),
        ({"shortcut": "pool"}, "shortcut: expected 'average_pool', 'subsample' or"),
    ],
)
def test_overrides_that_contradict_the_weights(tmp_path, override, message):
    network = ResNet(TINY_CIFAR)
    torch.save(torchvision_keys(network), tmp_path / "foreign.th")
    save(network, tmp_path / "own.safetensors")
    for name in ("foreign.th", "own.safetensors"):
        with pytest.raises(CheckpointError, match=f"{name}: {message}"):
            load_backbone(tmp_path / name, **override)


@pytest.mark.parametrize(
    ("depth", "classes", "normalization"),
    [(32, 10, R32_C10_NORMALIZATION), (32, 100, NO_NORMALIZATION), (20, 10, NO_NORMALIZATION)],
)
@pytest.mark.parametrize("entry", ["agent", "net"])
def test_authors_cifar_files(tmp_path, entry, depth, classes, normalization):
    backbone = randomise(resnet_cifar(depth, classes))
    policy = randomise(policy_resnet8(backbone.num_blocks))
    content = {
        entry: without_counters(authors_policy_keys(policy)),
        "resnet": without_counters(authors_keys(backbone)),
        "epoch": 12,
        "reward": torch.tensor(0.7),
        "acc": 0.9,
    }
    assert {"blocks.2.0.bn2.weight", "fc.weight"} <= set(content["resnet"])
    assert {"features.blocks.2.0.conv1.weight", "logit.bias", "vnet.bias"} <= set(content[entry])
    torch.save(content, tmp_path / "ckpt.t7")
    loaded = load(tmp_path / "ckpt.t7")
    assert_same_network(loaded.backbone, backbone)
    assert_same_network(loaded.policy.network, policy.network)
    assert loaded.policy.input_pool == 1
    assert loaded.backbone.normalization == normalization
    assert_same_network(load_backbone(tmp_path / "ckpt.t7"), backbone)
    assert_same_network(load_policy(tmp_path / "ckpt.t7").network, policy.network)


def test_authors_imagenet_files(tmp_path):
    backbone = randomise(ResNet(TINY_IMAGENET))
    policy = randomise(PolicyNetwork(ResNet(TINY_RESNET10), input_pool=2))
    content = {"agent": authors_policy_keys(policy), "resnet": authors_keys(backbone)}
    assert {"ds.0.0.weight", "ds.3.1.running_mean"} <= set(content["resnet"])
    assert "features.ds.1.0.weight" in content["agent"]
    torch.save(content, tmp_path / "ckpt.t7")
    loaded = load(tmp_path / "ckpt.t7")
    assert_same_network(loaded.backbone, backbone)
    assert_same_network(loaded.policy.network, policy.network)
    assert loaded.policy.input_pool == 2
    assert loaded.backbone.normalization == IMAGENET_NORMALIZATION


def test_authors_curriculum_files_hold_a_policy_only(tmp_path):
    policy = randomise(policy_resnet8(15))
    torch.save({"agent": authors_policy_keys(policy), "epoch": 1}, tmp_path / "ckpt.t7")
    assert_same_network(load_policy(tmp_path / "ckpt.t7").network, policy.network)
    for wrong in (load, load_backbone):
        with pytest.raises(CheckpointError, match="policy network but no backbone; use load_pol"):
            wrong(tmp_path / "ckpt.t7")


def test_authors_file_of_two_networks_that_do_not_fit(tmp_path):
    content = {
        "agent": authors_policy_keys(policy_resnet8(15)),
        "resnet": authors_keys(resnet_cifar(14)),
    }
    torch.save(content, tmp_path / "ckpt.t7")
    with pytest.raises(CheckpointError, match="decides on 15 blocks, but the backbone has 6"):
        load(tmp_path / "ckpt.t7")


@pytest.mark.skipif(
    "BLOCKDROP_WEIGHTS" not in os.environ,
    reason="BLOCKDROP_WEIGHTS names no folder with the published CIFAR-10 weights",
)
@pytest.mark.parametrize(("name", "n"), [("resnet32-d509ac18.th", 5), ("resnet20-12fca82f.th", 3)])
def test_published_cifar_weights(name, n):
    """Against a forward pass written from the file's raw keys."""
    path = Path(os.environ["BLOCKDROP_WEIGHTS"]) / name
    network = load_backbone(path).eval()
    assert network.config == resnet_cifar(6 * n + 2, 10, "subsample").config
    assert network.normalization == IMAGENET_NORMALIZATION
    raw = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    raw = {key.removeprefix("module."): value for key, value in raw.items()}

    def conv_bn(x, conv, bn, stride=1):
        x = F.conv2d(x, raw[f"{conv}.weight"], stride=stride, padding=1)
        statistics = raw[f"{bn}.running_mean"], raw[f"{bn}.running_var"]
        return F.batch_norm(x, *statistics, raw[f"{bn}.weight"], raw[f"{bn}.bias"])

    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = conv_bn(images, "conv1", "bn1").relu()
    for segment in (1, 2, 3):
        for block in range(n):
            name = f"layer{segment}.{block}"
            stride = 2 if segment > 1 and block == 0 else 1
            residual = conv_bn(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
            residual = conv_bn(residual, f"{name}.conv2", f"{name}.bn2")
            if stride == 2:
                quarter = x.shape[1] // 2
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
            x = (x + residual).relu()
    expected = F.linear(x.mean((2, 3)), raw["linear.weight"], raw["linear.bias"])
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected)


# ------------------------------------------------------------------ our own files


@pytest.mark.parametrize("normalization", [None, NO_NORMALIZATION, R32_C10_NORMALIZATION])
def test_own_round_trip(tmp_path, tiny_model, normalization):
    tiny_model.backbone.normalization = normalization
    save(tiny_model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert_same_network(loaded.backbone, tiny_model.backbone)
    assert_same_network(loaded.policy.network, tiny_model.policy.network)
    assert loaded.backbone.bn1.num_batches_tracked == 5
    assert loaded.backbone.normalization == normalization
    backbone = load_backbone(tmp_path / "model.safetensors")
    assert_same_network(backbone, tiny_model.backbone)
    assert backbone.normalization == normalization
    policy = load_policy(tmp_path / "model.safetensors")
    assert_same_network(policy.network, tiny_model.policy.network)


@pytest.mark.parametrize(
    "config",
    [
        TINY_IMAGENET,
        ResNetConfig("basic", (3,), (8,), "cifar", "subsample", 2),
        ResNetConfig("basic", (1, 1), (4, 9), "cifar", "subsample", 2),
        ResNetConfig("basic", (1, 2), (4, 8), "cifar", "subsample", 2, (3, 8, 9)),
        ResNetConfig("bottleneck", (1, 2), (4, 6), "imagenet", "projection", 5, (3, 5, 1)),
        GROUPED,
    ],
    ids=["bottleneck", "one-segment", "odd-width", "narrower", "narrower-bottleneck", "grouped"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_own_backbone_round_trip(tmp_path, config, dtype):
    network = randomise(ResNet(config)).to(dtype, memory_format=torch.channels_last)
    save(network, tmp_path / "net.safetensors")
    network = network.to(memory_format=torch.contiguous_format)  # convolutions that round alike
    assert_same_network(load_backbone(tmp_path / "net.safetensors"), network)
    for wrong in (load, load_policy):
        with pytest.raises(CheckpointError, match="holds no policy network; use load_backbone"):
            wrong(tmp_path / "net.safetensors")


def test_own_policy_keeps_its_input_pooling(tmp_path):
    backbone = ResNet(TINY_IMAGENET)
    model = randomise(BlockDrop(backbone, PolicyNetwork(ResNet(TINY_RESNET10), input_pool=3)))
    save(model, tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors").policy.input_pool == 3


def test_format_is_told_by_content_not_by_name(tmp_path, tiny_model):
    save(tiny_model, tmp_path / "model.t7")
    assert_same_network(load(tmp_path / "model.t7").backbone, tiny_model.backbone)


def test_saving_is_a_snapshot_and_loading_spends_no_random_numbers(tmp_path, tiny_model):
    path = tmp_path / "model.safetensors"
    save(tiny_model, path)
    state = torch.get_rng_state()
    loaded = load(path)
    assert torch.equal(torch.get_rng_state(), state)
    data = path.read_bytes()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()  # not a view of the file
    assert path.read_bytes() == data


def test_failed_save_leaves_the_earlier_file(tmp_path, tiny_model, monkeypatch):
    path = tmp_path / "model.safetensors"
    save(tiny_model, path)
    earlier = path.read_bytes()

    def full_disk(file, content):
        with open(file, "wb") as written:
            written.write(content[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*model.safetensors'"):
        save(tiny_model, path)
    assert path.read_bytes() == earlier
    assert list(tmp_path.iterdir()) == [path]


def test_save_of_something_else(tmp_path):
    with pytest.raises(
        TypeError, match="model: expected a BlockDrop, ResNet or Cascade, got Linear"
    ):
        save(torch.nn.Linear(1, 1), tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=99), "has format version 99, this .* reads 1"),
        (lambda m: m.pop("backbone"), "damaged metadata"),
        (lambda m: m.update(normalization={"mean": [0, 0, 0]}), "damaged metadata"),
        (lambda m: m["backbone"].update(depth=3), "unexpected keyword argument 'depth'"),
        (lambda m: m["backbone"].update(layers="many"), "model.safetensors: "),
        (lambda m: m["backbone"].update(layers=[10**9, 1, 3]), "contradicts the file's weights"),
        (lambda m: m["backbone"].update(block="bottleneck"), "contradicts the file's weights"),
        (lambda m: m["policy"].pop("input_pool"), "damaged metadata"),
        (lambda m: m["policy"].update(input_pool=0), "input_pool: expected at least 1, got 0"),
    ],
)
def test_damaged_metadata(tmp_path, tiny_model, change, message):
    path = tmp_path / "model.safetensors"
    save(tiny_model, path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["blockdrop_fast"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert metadata["format_version"] == 1
    assert metadata["backbone"]["layers"] == [2, 1, 3]
    change(metadata)
    safetensors.torch.save_file(tensors, path, {"blockdrop_fast": json.dumps(metadata)})
    with pytest.raises(CheckpointError, match=message):
        load(path)


# ------------------------------------------------------------------ bad files


class Malicious:
    """Leaves a file behind if its pickle is executed."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("loader", [load, load_backbone, load_policy])
def test_unsafe_pickles_are_refused_unexecuted(tmp_path, loader):
    trace = tmp_path / "executed"
    state = torchvision_keys(ResNet(TINY_CIFAR))
    files = {}
    for name, zipped in (("zip.pt", True), ("old.pt", False)):
        torch.save(
            {"state_dict": state, "extra": Malicious(trace)},
            tmp_path / name,
            _use_new_zipfile_serialization=zipped,
        )
        files[name] = "refused"
    torch.save(ResNet(TINY_CIFAR), tmp_path / "module.pt")
    files["module.pt"] = r"refused.*blockdrop_fast\.networks\.resnet\.ResNet"
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"extra": Malicious(trace)}, protocol=2))
    files["plain.pkl"] = "refused|cannot be read"
    for name, message in files.items():
        with pytest.raises(CheckpointError, match=rf"{name}: ({message})"):
            loader(tmp_path / name)
    assert not trace.exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert trace.exists()  # the test's own weapon is sharp


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_truncated_files(tmp_path, kind):
    network = ResNet(TINY_CIFAR)
    path = tmp_path / ("net.safetensors" if kind == "safetensors" else "net.pt")
    if kind == "safetensors":
        save(network, path)
    else:
        torch.save(network.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    for size in (1, 9, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=f"{path.name}: "):
            load_backbone(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{path.name}: is empty"):
        load_backbone(path)


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_bytes_changed_at_random_never_escape_as_another_error(tmp_path, kind):
    path = tmp_path / "net"
    network = ResNet(TINY_CIFAR)
    if kind == "safetensors":
        save(network, path)
    else:
        torch.save(network.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(30):
        damaged = bytearray(data)
        for position in torch.randint(0, 2000, (5,), generator=generator).tolist():
            damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            load_backbone(path)
        except CheckpointError:
            refused += 1
    assert refused > 15


@pytest.mark.parametrize("kind", ["zip", "own"])
def test_a_changed_weight_is_noticed(tmp_path, tiny_model, kind):
    path = tmp_path / "net"
    if kind == "own":
        save(tiny_model, path)
    else:
        torch.save(tiny_model.backbone.state_dict(), path)
    data, weight = bytearray(path.read_bytes()), tiny_model.backbone.fc.weight
    data[data.index(weight.detach().numpy().tobytes()) + 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"net: .*checksum"):
        load_backbone(path)


def test_archives_without_checksums_are_read(tmp_path, tiny_model):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tiny_model.backbone.state_dict(), tmp_path / "net.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same_network(load_backbone(tmp_path / "net.pt"), tiny_model.backbone)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a dictionary of tensors, got a list"),
        ({}, "expected a state dict"),
        ({"epoch": 3, "state_dict": 5}, "expected a state dict.* 'epoch': int, 'state_dict': int"),
        ({"features.0.weight": torch.ones(2)}, "not a ResNet of a known layout.*features.0.weight"),
        ({1: torch.ones(2)}, "not a ResNet of a known layout"),
    ],
    ids=["list", "empty", "scalars", "vgg", "numbers"],
)
def test_not_a_resnet(tmp_path, content, message):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=f"file.pt: {message}"):
        load_backbone(tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"file.pt: (expected a dict|holds no policy)"):
        load(tmp_path / "file.pt")


def test_not_a_checkpoint_or_not_there(tmp_path):
    (tmp_path / "notes.txt").write_text("my notes")
    with pytest.raises(CheckpointError, match="neither a safetensors nor a PyTorch file"):
        load_backbone(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        load_backbone(tmp_path / "nothing.pt")
    with pytest.raises(IsADirectoryError):
        load_backbone(tmp_path)


def drop(*keys):
    return lambda state: {key: value for key, value in state.items() if key not in keys}


def put(**tensors):
    return lambda state: state | {key.replace("__", "."): value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop("layer1.1.bn1.weight", "bn1.bias"),
            "2 missing keys: bn1.bias, segments.0.1.bn1.weight",
        ),
        (drop("layer1.0.conv1.weight"), "no tensor that would be segments.0.0.conv1.weight"),
        (put(layer1__0__se__weight=torch.ones(3)), "1 surplus keys: segments.0.0.se.weight"),
        (put(extra=torch.ones(3)), "1 surplus keys: extra"),
        (
            lambda state: state | {f"x{i}": torch.ones(1) for i in range(9)},
            r"9 surplus keys: x0, x1, x2, x3, … \(9 in all\)",
        ),
        (
            put(layer2__0__conv2__weight=torch.ones(8, 4, 3, 3)),
            r"segments.1.0.conv2.weight \(8, 4, 3, 3\) instead of \(8, 8, 3, 3\)",
        ),
        (put(bn1__weight=torch.ones(4, dtype=torch.int8)), "bn1.weight torch.int8"),
        (put(conv1__weight=torch.ones(4, 3, 5, 5)), r"3x3 .* or 7x7 .* got shape \(4, 3, 5, 5\)"),
        (put(conv1__weight=torch.ones(4)), r"got shapes conv1.weight \(4,\)"),
        (put(fc__weight=torch.ones(7, 5)), r"fc.weight \(7, 5\) instead of \(7, 16\)"),
        (put(layer2__0__conv2__weight=torch.ones(2, 8, 3, 3)), r"fewer channels \(2\) than"),
        (
            put(layer2__0__conv1__weight=torch.ones(2, 4, 3, 3)),
            r"segments.1.0.bn1.weight \(8,\) instead of \(2,\)",
        ),
        (put(layer5__0__conv1__weight=torch.ones(4, 4, 3, 3)), "segments.3.0.conv1.weight"),
    ],
)
def test_another_architecture_is_named(tmp_path, change, message):
    state = torchvision_keys(ResNet(TINY_CIFAR))
    torch.save(change(state), tmp_path / "net.th")
    with pytest.raises(CheckpointError, match=f"net.th: .*{message}"):
        load_backbone(tmp_path / "net.th")


def test_a_missing_policy_key_is_named(tmp_path):
    backbone = resnet_cifar(14)
    agent = authors_policy_keys(policy_resnet8(6))
    del agent["features.blocks.1.0.bn2.running_mean"]
    torch.save({"agent": agent, "resnet": authors_keys(backbone)}, tmp_path / "ckpt.t7")
    message = r"ckpt.t7 \(policy network\): .*1 missing keys: segments.1.0.bn2.running_mean"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "ckpt.t7")


# ------------------------------------------------------------------ policy from ResNet-18


def test_policy_from_resnet18(tmp_path):
    source = randomise(ResNet(TINY_RESNET18))
    torch.save(torchvision_keys(source), tmp_path / "resnet18.pth")
    policy = PolicyNetwork(ResNet(TINY_RESNET10), input_pool=2).double()
    head = policy.network.fc.weight.clone()
    init_policy_from_resnet18(policy, tmp_path / "resnet18.pth")
    network = policy.network
    assert torch.equal(network.conv1.weight, source.conv1.weight.double())
    for segment in range(4):
        taken, first = network.segments[segment][0], source.segments[segment][0]
        for key, value in first.state_dict().items():
            assert torch.equal(taken.state_dict()[key], value.to(taken.state_dict()[key].dtype))
    assert torch.equal(network.shortcuts[3].conv.weight, source.shortcuts[3].conv.weight.double())
    assert torch.equal(network.fc.weight, head)
    assert network.fc.weight.dtype == torch.float64


def test_policy_from_something_else(tmp_path):
    torch.save(torchvision_keys(ResNet(TINY_CIFAR)), tmp_path / "cifar.pth")
    torch.save(torchvision_keys(ResNet(TINY_IMAGENET)), tmp_path / "bottleneck.pth")
    torch.save(torchvision_keys(ResNet(TINY_RESNET18)), tmp_path / "narrow.pth")
    for name, message in (
        ("cifar", "widths="),
        ("bottleneck", "block='basic', the file has block='bottleneck'"),
        ("narrow", "widths=.64, 128, 256, 512.*64, 8, 8, 16"),
    ):
        policy = policy_resnet10(33)
        before = policy.network.conv1.weight.clone()
        with pytest.raises(CheckpointError, match=f"{name}.pth: cannot initialise .*{message}"):
            init_policy_from_resnet18(policy, tmp_path / f"{name}.pth")
        assert torch.equal(policy.network.conv1.weight, before)


def test_checkpoint_error_is_a_value_error():
    assert issubclass(CheckpointError, ValueError)
