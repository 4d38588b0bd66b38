"""Learning from examples: what they are, that the policy network learns them, and resuming."""

import json
from dataclasses import replace

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.data.batches import batches_of, load_digits
from blockdrop_fast.data.image_sets import NO_NORMALIZATION
from tests.random_networks import CIFAR, make_look_model, make_network
from train.config import Expert, Pretrain
from train.expert import EXAMPLES_FILE, expert, make_examples, spread_sizes
from train.images import split
from train.pretrain import pretrain

FEW = {"limit": 400, "batch_size": 32, "threads": 1}
SETS = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()


@pytest.fixture(autouse=True)
def _digits(monkeypatch):
    monkeypatch.delenv("BLOCKDROP_DATA", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    return load_digits().train.subset(400)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrain")
    pretrain(
        Pretrain(arch="resnet14", epochs=4, out=out, lr=0.1, drop_rate=0.5, full_share=0.3, **FEW)
    )
    return out / "model.safetensors"


@pytest.fixture(scope="module")
def config(backbone, tmp_path_factory):
    return Expert(
        backbone=backbone,
        out=tmp_path_factory.mktemp("expert"),
        epochs=3,
        held_out=100,
        line_images=100,
        lowest=1,
        budget=3.0,
        **FEW,
    )


@pytest.fixture(scope="module")
def trained(config):
    expert(config)
    return config.out


@pytest.fixture(scope="module")
def looking(config, tmp_path_factory):
    """The same, by a policy that looks at what the second block gives."""
    out = tmp_path_factory.mktemp("looking")
    expert(replace(config, look=2, lowest=2, out=out))
    return out


def test_numbered_batches(digits):
    for augment in (False, True):
        plain, numbered = (
            list(batches_of(digits, 64, shuffle=True, augment=augment, seed=3, numbered=numbered))
            for numbered in (False, True)
        )
        for (images, labels), (same, numbers) in zip(plain, numbered, strict=True):
            assert torch.equal(images, same)
            assert torch.equal(labels, digits.labels[numbers])
    assert sorted(torch.cat([numbers for _, numbers in numbered]).tolist()) == list(range(400))


def test_split(digits):
    held_out, train = split(digits, 100, seed=1)
    assert (len(held_out), len(train)) == (100, 300)
    together = torch.cat([held_out.images, train.images]).flatten(1)
    assert torch.equal(together.unique(dim=0), digits.images.flatten(1).unique(dim=0))
    again, _ = split(digits, 100, seed=1)
    assert torch.equal(again.images, held_out.images)
    assert not torch.equal(split(digits, 100, seed=2)[0].images, held_out.images)
    for wrong in (0, 400):
        with pytest.raises(ValueError, match=f"held_out: expected 1 to 399, got {wrong}"):
            split(digits, wrong, seed=1)


def test_examples_are_what_the_backbone_does(digits):
    network = make_network(CIFAR)
    right = make_examples(bdf.compile(network), digits, SETS, workers=0)
    images, labels = next(batches_of(digits, 400))
    with torch.no_grad():
        for column, keep in zip(right.T, SETS, strict=True):
            logits = network(images, keep.expand(400, -1))
            probability = logits.softmax(1)[torch.arange(400), labels]
            expected = ((logits.argmax(1) == labels).float() + probability) / 2
            torch.testing.assert_close(column, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["trained", "looking"])
def test_learns_to_tell_images_apart(policy, request):
    trained = request.getfixturevalue(policy)
    history = json.loads((trained / "metrics.json").read_text())
    assert history[-1]["train_value_loss"] < history[0]["train_value_loss"]
    assert history[-1]["train_class_accuracy"] > history[0]["train_class_accuracy"] > 0.1
    model = bdf.load(trained / "model.safetensors").eval()
    assert model.policy.menu.budget == 3.0
    engine, test = bdf.compile(model), load_digits().test
    images, _ = next(batches_of(test, len(test), normalization=model.backbone.normalization))
    usages = [engine.decide(images, budget).sum(1).float().mean() for budget in (2.5, None, 5.0)]
    assert usages[0] < usages[1] < usages[2]
    assert abs(usages[1] - 3.0) < 1
    assert len(engine.decide(images).unique(dim=0)) > 1


@pytest.mark.slow
def test_looks_at_a_frozen_backbone(backbone, looking):
    model, before = bdf.load(looking / "model.safetensors"), bdf.load_backbone(backbone)
    assert (model.policy.after, model.policy.menu.sets[:, :2].all()) == (2, True)
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]), name


@pytest.mark.slow
def test_fits_the_policy_of_a_model_anew(config, looking, tmp_path, capsys):
    model = looking / "model.safetensors"
    again = replace(config, backbone=None, model=model, lowest=None, budget=None, epochs=1)
    expert(replace(again, lr=1e-9, weight_decay=0.0, out=tmp_path / "same"))
    expert(replace(again, look=1, out=tmp_path / "earlier"))
    expert(replace(again, look=0, out=tmp_path / "network"))
    before, same, earlier, network = (
        bdf.load(folder / "model.safetensors")
        for folder in (looking, *(tmp_path / name for name in ("same", "earlier", "network")))
    )
    for other in (same, earlier, network):
        assert torch.equal(other.policy.menu.sets, before.policy.menu.sets)
        assert other.policy.menu.budget == 3.0
    assert (same.policy.after, earlier.policy.after, network.policy.after) == (2, 1, 0)
    torch.testing.assert_close(same.policy.fc.weight, before.policy.fc.weight)
    assert not torch.allclose(earlier.policy.fc.weight, before.policy.fc.weight)


@pytest.mark.slow
def test_resumes_to_the_same(config, trained, tmp_path):
    examples = trained / EXAMPLES_FILE
    before = examples.stat().st_mtime_ns
    with pytest.raises(FileExistsError):
        expert(config)
    assert examples.stat().st_mtime_ns == before
    parts = replace(config, out=tmp_path, checkpoint_every=1)
    stopped = []

    def stop(self, epoch, metrics, finish=expert.__globals__["Run"].finish_epoch):
        finish(self, epoch, metrics)
        stopped.append(epoch)
        if len(stopped) == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.loop.Run.finish_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            expert(parts)
        expert(replace(parts, resume=True))
    assert stopped == [1, 2, 3]
    one, other = (bdf.load(folder / "model.safetensors") for folder in (trained, tmp_path))
    for (name, tensor), same in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, same), name
    assert one.policy.menu.prices == other.policy.menu.prices


@pytest.mark.slow
def test_examples_of_other_options_are_not_taken(config, tmp_path, monkeypatch):
    """Of a run that was killed between them and its first checkpoint."""
    parts = replace(config, out=tmp_path, epochs=1)
    monkeypatch.setattr("train.expert._make_policy", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        expert(parts)
    assert [path.name for path in tmp_path.iterdir()] == [EXAMPLES_FILE]
    with pytest.raises(ValueError, match=r"resume: .* with other options: sets 12 -> 3"):
        expert(replace(parts, sets=3, resume=True))
    monkeypatch.setattr("train.expert.make_examples", None)  # they are there
    with pytest.raises(ZeroDivisionError):
        expert(replace(parts, resume=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": None}, "backbone and model: expected one of the two checkpoints"),
        ({"lowest": 9}, "lowest: expected 0 to 6, got 9"),
        ({"lowest": 1, "look": 2}, "lowest: expected 2 to 6, got 1"),
        ({"look": 3}, "look: expected 0 to 2, the blocks of the first segment, got 3"),
        ({"held_out": 400}, "held_out: expected 1 to 399, got 400"),
        ({"budget": 7.0}, "budget: expected from .* to .* blocks, got 7"),
    ],
)
def test_refuses(config, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        expert(replace(config, out=tmp_path, epochs=1, limit=400, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "backbone.safetensors"}, "backbone and model: expected one of the two"),
        ({"lowest": 2}, "lowest: the menu is that of --model, expected none"),
        ({"look": 2}, "look: the menu of .* drops one of blocks 1 to 2"),
    ],
)
def test_refuses_beside_a_model(tmp_path, options, message):
    model, _ = make_look_model(after=1, sets=SETS[1:])
    bdf.save(model, tmp_path / "model.safetensors")
    config = Expert(model=tmp_path / "model.safetensors", out=tmp_path / "run", **FEW)
    with pytest.raises(ValueError, match=message):
        expert(replace(config, **options))


def test_refuses_a_model_without_a_menu(tmp_path):
    bdf.save(make_look_model()[0], tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model: the policy of .* has no menu to take"):
        expert(Expert(model=tmp_path / "model.safetensors", out=tmp_path / "run", **FEW))


@pytest.mark.parametrize(
    ("lowest", "highest", "count", "sizes"),
    [
        (3, 27, 12, [3, 4, 5, 6, 7, 9, 11, 13, 15, 19, 22, 27]),
        (0, 5, 12, [0, 1, 2, 3, 4, 5]),
        (4, 15, 1, [4]),
        (4, 15, 2, [4, 15]),
    ],
)
def test_menus_have_more_small_sets_than_large(lowest, highest, count, sizes):
    assert spread_sizes(lowest, highest, count) == sizes


@pytest.mark.slow
def test_groups_of_classes_have_sets_of_their_own(config, tmp_path, capsys):
    expert(replace(config, out=tmp_path / "run", groups=2, sets=6, epochs=1))
    sets = bdf.load(tmp_path / "run" / "model.safetensors").policy.menu.sets
    assert len(sets) == 5  # of 1, 3 and 6 blocks, the last one for both
    printed = capsys.readouterr().out
    # Each drops first the block of the last segment that the other has to itself.
    assert "group 0: blocks drop in the order [6, " in printed
    assert "group 1: blocks drop in the order [5, " in printed


@pytest.mark.slow
def test_one_set_becomes_one_for_each_group(tmp_path):
    backbone = make_network(bdf.resnet_cifar(20).config)
    backbone.normalization = NO_NORMALIZATION
    keep = torch.tensor([0, 0, 1, 0, 1, 0, 0, 1, 0]).bool()
    static = tmp_path / "static.safetensors"
    bdf.save(bdf.BlockDrop(backbone, bdf.FixedPolicy(keep)), static)
    common = Expert(model=static, epochs=1, held_out=100, static_images=0, **FEW)
    with pytest.raises(ValueError, match=r"groups: .* has one set for all images"):
        expert(replace(common, out=tmp_path / "one"))
    expert(replace(common, groups=2, look=1, out=tmp_path / "run"))
    model = bdf.load(tmp_path / "run" / "model.safetensors")
    assert model.policy.after == 1
    assert model.policy.menu.sets.tolist() == [
        [True, False, False, False, True, False, False, True, False],
        [True, False, False, False, True, False, False, False, True],
    ]
