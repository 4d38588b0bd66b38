"""Own files of policies that decide on the way, and of cascades."""

import json

import pytest
import safetensors.torch
import torch

import blockdrop_fast as bdf
from blockdrop_fast.data.image_sets import IMAGENET_NORMALIZATION
from blockdrop_fast.networks.checkpoints import CheckpointError, load_any, load_policy
from tests.random_networks import (
    BOTTLENECK,
    CIFAR,
    GATED,
    make_gated_model,
    make_images,
    make_network,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def make_cascade():
    networks = [make_network(CIFAR, seed) for seed in range(3)]
    for network in networks:
        network.normalization = IMAGENET_NORMALIZATION
    cascade = bdf.Cascade(networks).eval()
    cascade.set_thresholds([0.2, 0.3])
    return cascade


def same_state(one, other):
    state = other.state_dict()
    assert one.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("config", [CIFAR, BOTTLENECK], ids=["cifar", "bottleneck"])
def test_round_trip(kind, config, path):
    model, images = make_gated_model(kind, config)
    if "halting" in kind:
        model.policy.epsilon = 0.03
    bdf.save(model, path)
    loaded, policy = bdf.load(path).eval(), load_policy(path)
    assert isinstance(load_any(path), bdf.BlockDrop)
    same_state(loaded, model)
    same_state(policy, model.policy)
    for found, expected in zip(loaded(images), model(images), strict=True):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_cascade_round_trip(path):
    cascade, images = make_cascade(), make_images(CIFAR, 16)
    bdf.save(cascade, path)
    loaded = bdf.load(path).eval()
    assert isinstance(load_any(path), bdf.Cascade)
    same_state(loaded, cascade)
    assert [one.normalization for one in loaded.networks] == [IMAGENET_NORMALIZATION] * 3
    for found, expected in zip(loaded(images), cascade(images), strict=True):
        assert torch.equal(found, expected)
    for load in (bdf.load_backbone, load_policy):
        with pytest.raises(CheckpointError, match="holds a cascade of networks; use load"):
            load(path)


@torch.no_grad()
def test_cascade_of_models_that_come_with_the_package(path):
    names = ["static32-cifar10-jpeg", "resnet32-cifar10-jpeg"]
    cascade = bdf.Cascade([load_any(name) for name in names]).eval()
    cascade.set_thresholds([0.9])
    bdf.save(cascade, path, networks=names)
    assert path.stat().st_size < 4096
    same_state(bdf.load(path), cascade)
    for wrong in (names[::-1], names[:1], ["resnet32-cifar10-jpeg", "nowhere"]):
        with pytest.raises(ValueError, match="networks: expected names of the cascade's networks"):
            bdf.save(cascade, path, networks=wrong)
    with pytest.raises(ValueError, match="networks: expected names"):
        bdf.save(cascade.networks[1], path, networks=names)
    same_state(bdf.load(path), cascade)
    change(path, lambda metadata, _: metadata.update(cascade=[names[0], "/etc/passwd"]))
    with pytest.raises(CheckpointError, match=r"cascade: expected one of .* got '/etc/passwd'"):
        bdf.load(path)


def change(path, edit):
    """Rewrite a file whose metadata and tensors ``edit`` has changed."""
    with safetensors.safe_open(path, "pt") as file:
        key, text = "blockdrop_fast", file.metadata()["blockdrop_fast"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata = json.loads(text)
    edit(metadata, tensors)
    safetensors.torch.save_file(tensors, path, {key: json.dumps(metadata)})


def set_gates(**changes):
    return lambda metadata, _: metadata["policy"]["gates"].update(changes)


def set_tensor(name, value):
    return lambda _, tensors: tensors.update({name: value})


BAD_FILES = [
    ("exits", set_gates(options={"exits": [7]}), "exits: expected ascending blocks out of 1 to 4"),
    ("exits", set_gates(options={"exits": [1]}), "does not fit the architecture gates exits"),
    ("exits", set_gates(kind="entrances"), "expected gates out of sequential, halting, exits"),
    ("exits", set_gates(options={"doors": 3}), "damaged metadata"),
    ("exits", set_tensor("policy.rules", torch.full((3, 6), torch.nan)), "rules: expected finite"),
    ("halting", set_gates(options={"epsilon": 2}), "epsilon: expected between 0 and 1"),
    ("sequential", set_tensor("policy.gates.0.bias", torch.ones(2)), "tensors of another shape"),
    ("sequential", lambda metadata, _: metadata["policy"].pop("gates"), "not a ResNet"),
]


@pytest.mark.parametrize(("kind", "edit", "message"), BAD_FILES)
def test_files_of_other_gates(kind, edit, message, path):
    bdf.save(make_gated_model(kind)[0], path)
    change(path, edit)
    for load in (bdf.load, load_policy, load_any):
        with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{message}"):
            load(path)


BAD_CASCADES = [
    (lambda metadata, _: metadata["cascade"].pop(), "rules: expected finite values of shape"),
    (set_tensor("networks.3.fc.bias", torch.zeros(10)), "1 surplus keys: networks.3.fc.bias"),
    (lambda metadata, _: metadata.update(cascade=[]), "networks: expected two or more"),
    (lambda metadata, _: metadata.update(cascade=3), "damaged metadata"),
    (lambda metadata, _: metadata["cascade"][0].update(num_classes=9), "num_classes=9 contradicts"),
    (lambda _, tensors: tensors.pop("rules"), "damaged metadata"),
    (set_tensor("rules", torch.zeros(1, 6)), "rules: expected finite values of shape"),
    (lambda _, tensors: tensors.pop("networks.1.fc.bias"), "missing keys: fc.bias"),
]


@pytest.mark.parametrize(("edit", "message"), BAD_CASCADES)
def test_files_of_other_cascades(edit, message, path):
    bdf.save(make_cascade(), path)
    change(path, edit)
    for load in (bdf.load, load_any):
        with pytest.raises(CheckpointError, match=rf"model\.safetensors.*({message})"):
            load(path)
