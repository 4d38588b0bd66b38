"""Policies that look at the backbone's first blocks: the reference, gradients, checkpoints."""

import json

import pytest
import safetensors.torch
import torch

import blockdrop_fast as bdf
from blockdrop_fast.networks.checkpoints import CheckpointError, load_any, load_policy
from blockdrop_fast.networks.menu import Menu
from blockdrop_fast.networks.resnet import ResNetConfig
from tests.random_networks import BOTTLENECK, CIFAR, CUSTOM, make_look_model, make_model

SETS = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 1], [1, 1, 1, 1, 1]]).bool()
KINDS = {
    "thresholds": (CIFAR, 2, None),
    "menu": (CIFAR, 1, SETS),
    "bottleneck": (BOTTLENECK, 1, None),
    "basic projection": (CUSTOM["basic projection"], 1, None),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    model, images = make_look_model(*KINDS[request.param])
    return model.double(), images.double()


def test_runs_at_its_policys_decisions(model):
    model, images = model
    after = model.policy.after
    with torch.no_grad():
        logits, decisions = model(images)
        torch.testing.assert_close(logits, model.backbone(images, decisions))
        assert torch.equal(decisions, model.decide(images))
        features = model.backbone.features(images, after)
        assert torch.equal(decisions, model.policy.decide(features))
        probabilities = model.policy(features)
    assert decisions.dtype == torch.bool
    assert decisions[:, :after].all()
    assert torch.equal(decisions, probabilities >= 0.5)
    assert not decisions.all()
    assert len(decisions.unique(dim=0)) > 1


def test_what_it_looks_at_is_the_naive_prefix(model):
    model, images = model
    backbone, after = model.backbone, model.policy.after
    x = backbone.stem(images)
    for block, shortcut in list(backbone.blocks())[:after]:
        x = (shortcut(x) + block(x)).relu()
    torch.testing.assert_close(backbone.features(images, after), x)
    assert torch.equal(backbone.features(images, 0), backbone.stem(images))
    torch.testing.assert_close(backbone.forward_from(x, after), backbone(images))


def gradients(model, images, run):
    model.zero_grad()
    inputs = images.clone().requires_grad_()
    run(inputs).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return found | {"images": inputs.grad}


def test_training_on_active_images_has_the_gradients_of_the_masked_run(model):
    """Backbone, head and images, through the logits and the policy's logits."""
    model, images = model
    with torch.no_grad():
        decisions = model.decide(images)

    def run(inputs, active_only):
        logits, chosen, policy_logits = model.forward_with(
            inputs, lambda _: decisions, active_only=active_only
        )
        assert torch.equal(chosen, decisions)
        return logits.square().sum() + policy_logits.square().sum()

    def apart(inputs):
        return (
            model.backbone(inputs, decisions).square().sum()
            + model.policy_logits(inputs).square().sum()
        )

    expected = gradients(model, images, apart)
    for active_only in (False, True):
        found = gradients(model, images, lambda inputs: run(inputs, active_only))  # noqa: B023
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, msg=lambda text: f"{name}: {text}")  # noqa: B023


def test_one_forward_of_a_policy_network():
    """The same method for a policy that is a network of its own."""
    model, images = make_model()
    with torch.no_grad():
        logits, decisions, policy_logits = model.eval().forward_with(images, lambda x: x >= 0)
        assert torch.equal(policy_logits, model.policy.logits(images))
        assert torch.equal(policy_logits, model.policy_logits(images))
        torch.testing.assert_close(logits, model(images).logits)
        assert torch.equal(decisions, model(images).decisions)


def test_budgets():
    model, images = make_look_model(*KINDS["menu"])
    with torch.no_grad():
        usages = [model(images, budget).decisions.sum(1).float().mean() for budget in (1.5, 4.0)]
    assert abs(usages[0] - 1.5) < 0.1
    assert abs(usages[1] - 4.0) < 0.1


def test_empty_batch(model):
    model, images = model
    logits, decisions = model(images[:0])
    assert logits.shape == (0, model.backbone.config.num_classes)
    assert decisions.shape == (0, model.backbone.num_blocks)


@pytest.mark.parametrize("size", [(8, 12), (32, 32), (64, 40)])
def test_images_of_any_size(size):
    model, _ = make_look_model()
    assert model(torch.randn(2, 3, *size)).logits.shape == (2, 10)


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_round_trip(kind, tmp_path):
    model, images = make_look_model(*KINDS[kind])
    path = tmp_path / "model.safetensors"
    bdf.save(model, path)
    loaded, policy = bdf.load(path).eval(), load_policy(path)
    assert isinstance(load_any(path), bdf.BlockDrop)
    for one, other in ((loaded, model), (policy, model.policy)):
        state = other.state_dict()
        assert one.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())
    assert (policy.after, policy.num_blocks) == (model.policy.after, model.policy.num_blocks)
    with torch.no_grad():
        for budget in (None,) if model.policy.menu is None else (None, 1.5):
            assert torch.equal(loaded(images, budget).logits, model(images, budget).logits)


def test_widths_of_the_head_are_kept(tmp_path):
    path = tmp_path / "model.safetensors"
    model = bdf.BlockDrop(bdf.ResNet(CIFAR), bdf.LookPolicy(CIFAR, 2, widths=(8, 12, 16)))
    bdf.save(model, path)
    assert [conv.out_channels for conv in bdf.load(path).policy.convs] == [8, 12, 16]


def _one_block_later(metadata, tensors):
    metadata["policy"]["look"]["after"] = 3


def _other_channels(metadata, tensors):
    tensors["policy.convs.0.weight"] = torch.zeros(32, 8, 3, 3)


def _other_blocks(metadata, tensors):
    del metadata["policy"]["menu"]
    tensors.pop("policy.menu.sets")


def _no_widths(metadata, tensors):
    del metadata["policy"]["look"]["widths"]


def _sets_without_the_first(metadata, tensors):
    tensors["policy.menu.sets"] = ~tensors["policy.menu.sets"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_one_block_later, "after: expected a block of the first segment, 1 to 2, got 3"),
        (_other_channels, r"does not fit .* a head after block 1.*convs.0.weight \(32, 8, 3, 3\)"),
        (_other_blocks, "does not fit .* a head after block 1, of 5 outputs"),
        (_no_widths, r"damaged metadata \(KeyError\('widths'\)\)"),
        (_sets_without_the_first, "menu: expected blocks 1 to 1, .* in every set"),
    ],
)
def test_files_of_a_head_for_another_backbone(tmp_path, change, message):
    path = tmp_path / "model.safetensors"
    bdf.save(make_look_model(*KINDS["menu"])[0], path)
    with safetensors.safe_open(path, "pt") as file:
        key, text = "blockdrop_fast", file.metadata()["blockdrop_fast"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata = json.loads(text)
    change(metadata, tensors)
    safetensors.torch.save_file(tensors, path, {key: json.dumps(metadata)})
    for load in (bdf.load, load_policy):
        with pytest.raises(
            CheckpointError, match=rf"model\.safetensors \(policy network\): {message}"
        ):
            load(path)


# ------------------------------------------------------------------ bad input


def without_first(decisions):
    decisions = decisions.clone()
    decisions[0, 0] = False
    return decisions


def test_decisions_that_drop_what_has_run():
    model, images = make_look_model(after=2)
    everything = torch.ones(len(images), 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="decisions: expected blocks 1 to 2 kept, they have run"):
        model.forward_with(images, lambda _: without_first(everything))


@pytest.mark.parametrize("after", [0, 3, -1])
def test_blocks_outside_of_the_first_segment(after):
    with pytest.raises(ValueError, match=f"after: expected .* first segment, 1 to 2, got {after}"):
        bdf.LookPolicy(CIFAR, after)


def test_menus_that_do_not_fit():
    with pytest.raises(ValueError, match=r"menu: expected blocks 1 to 2, .* in every set"):
        bdf.LookPolicy(CIFAR, 2, Menu(SETS))
    with pytest.raises(ValueError, match="menu: expected sets of 5 blocks, got 3"):
        bdf.LookPolicy(CIFAR, 1, Menu(SETS[:, :3].unique(dim=0)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ResNetConfig("basic", (1, 2, 2), (16, 32, 64), "cifar", "average_pool", 10), "1 blocks"),
        (ResNetConfig("basic", (2, 1, 2), (8, 32, 64), "cifar", "average_pool", 10), "8 channels"),
        (ResNetConfig("basic", (2, 1, 1), (16, 32, 64), "cifar", "average_pool", 10), "has 4"),
    ],
)
def test_heads_for_another_backbone(config, message):
    with pytest.raises(ValueError, match=f"^policy: .* backbone.*{message}"):
        bdf.BlockDrop(bdf.ResNet(config), bdf.LookPolicy(CIFAR, 2))
