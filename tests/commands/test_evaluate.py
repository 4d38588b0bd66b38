"""``blockdrop evaluate``: right figures for any checkpoint, and clear refusals."""

import json

import pytest
import torch
from PIL import Image

import blockdrop_fast as bdf
from blockdrop_fast.commands import cli
from blockdrop_fast.data.batches import batches_of, load_digits
from blockdrop_fast.data.image_sets import Normalization
from blockdrop_fast.networks.checkpoints import load_any
from tests.networks.state_dicts import authors_keys, authors_policy_keys
from tests.random_networks import (
    GATED,
    keep_half,
    make_gated_model,
    make_look_model,
    make_menu_policy,
)

NORMALIZATION = Normalization(mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7))


def make_model(classes: int = 10, normalization=NORMALIZATION) -> bdf.BlockDrop:
    """ResNet-14 of random weights whose policy keeps about half of the blocks of digits."""
    torch.manual_seed(0)
    model = bdf.BlockDrop(bdf.resnet_cifar(14, classes), bdf.policy_resnet8(6)).eval()
    model.backbone.normalization = normalization
    images, _ = next(batches_of(load_digits().test, 64, normalization=NORMALIZATION))
    keep_half(model.policy, images)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    bdf.save(model, path)
    return path


@pytest.fixture(scope="module")
def backbone(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    bdf.save(model.backbone, path)
    return path


def evaluate(checkpoint, *options) -> int:
    return cli.main(["evaluate", str(checkpoint), *map(str, options)])


def digits():
    """All test digits, as the model wants them, and their labels."""
    test = load_digits().test
    return next(batches_of(test, len(test), normalization=NORMALIZATION))


def test_policy_on_digits(model, checkpoint, tmp_path, capsys):
    file = tmp_path / "result.json"
    assert evaluate(checkpoint, "--json", file, "--batch-size", 100) == 0
    found = json.loads(file.read_text())
    images, labels = digits()
    with torch.no_grad():
        logits, decisions = model(images)
    usage = decisions.sum(1).double()
    assert found["images"] == len(labels)
    # One image more or less, as rounding may decide a tie.
    assert found["accuracy"] == pytest.approx(
        float((logits.argmax(1) == labels).double().mean()), abs=1.5 / len(labels)
    )
    assert found["block_usage"] == pytest.approx(float(usage.mean()), abs=0.01)
    assert found["block_usage_std"] == pytest.approx(float(usage.std(correction=0)), abs=0.01)
    assert found["flops"] == pytest.approx(float(bdf.flops(model, decisions).mean()), rel=1e-3)
    assert found["keep_rates"] == pytest.approx(decisions.double().mean(0).tolist(), abs=0.01)
    assert found["segment_usage"] == pytest.approx(
        [sum(found["keep_rates"][first : first + 2]) for first in (0, 2, 4)]
    )
    assert 1 < found["unique_policies"] <= 64
    assert found["decisions"] == "policy"
    assert found["data"] == "digits, test"
    assert found["strategy"] in ("walk", "gather")
    printed = capsys.readouterr().out
    for text in (
        "data             digits, test\ndecisions        policy\n",
        f"strategy         {found['strategy']} ({found['strategy_reason']})\n",
        f"accuracy         {100 * found['accuracy']:.2f} %",
        f"block usage      {found['block_usage']:.2f} ± {found['block_usage_std']:.2f} of 6",
        f"unique policies  {found['unique_policies']}",
        f"FLOPs/image      {found['flops']:.3e} ± ",
        "segment usage ",
        str(checkpoint),
    ):
        assert text in printed


def test_policy_that_looks(tmp_path):
    """Decisions and FLOPs of a head on the backbone, at its own budget and at others."""
    sets = torch.ones(3, 5).bool()
    sets[0, 2:] = sets[1, 4] = False
    model, _ = make_look_model(after=2, sets=sets)
    model.backbone.normalization = NORMALIZATION
    images, labels = digits()
    with torch.no_grad():
        model.policy.menu.calibrate(model.policy_logits(images), 3.5)
    bdf.save(model, tmp_path / "model.safetensors")
    options = ("--json", tmp_path / "result.json", "--shuffles", 0)
    assert evaluate(tmp_path / "model.safetensors", *options) == 0
    found = [json.loads((tmp_path / "result.json").read_text())]
    assert evaluate(tmp_path / "model.safetensors", *options, "--budget", 2.5, 4.5) == 0
    found += json.loads((tmp_path / "result.json").read_text())["curve"]
    for result, budget in zip(found, (None, 2.5, 4.5), strict=True):
        with torch.no_grad():
            logits, decisions = model(images, budget)
        assert result["flops"] == pytest.approx(float(bdf.flops(model, decisions).mean()), rel=1e-3)
        usage = float(decisions.sum(1).double().mean())
        assert usage == pytest.approx(budget or 3.5, abs=0.1)
        assert result["block_usage"] == pytest.approx(usage, abs=0.01)
        assert result["accuracy"] == pytest.approx(
            float((logits.argmax(1) == labels).double().mean()), abs=1.5 / len(labels)
        )


@pytest.mark.parametrize("kind", [*GATED, "cascade"])
def test_decides_on_the_way(kind, tmp_path, capsys):
    if kind == "cascade":
        model = bdf.Cascade([bdf.resnet_cifar(8), bdf.resnet_cifar(14)]).eval()
        model.set_thresholds([0.2])
    else:
        model, _ = make_gated_model(kind)
    bdf.save(model, tmp_path / "model.safetensors")
    options = ("--limit", 40, "--shuffles", 1, "--json", tmp_path / "result.json")
    assert evaluate(tmp_path / "model.safetensors", *options) == 0
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["routing_gain"] is not None
    assert found["flops"] > 0
    for option in ("--static-line", "--heuristic=first_k"):
        more = ("--keep", 2) if "heuristic" in option else ()
        refused = (kind == "cascade") or (kind == "exits" and bool(more))
        assert evaluate(tmp_path / "model.safetensors", *options, option, *more) == refused
    assert not refused or "decide: expected none" in capsys.readouterr().err


@pytest.mark.slow
def test_routing_beside_the_static_line(checkpoint, tmp_path, capsys):
    path = tmp_path / checkpoint.name
    path.write_bytes(checkpoint.read_bytes())
    files = [tmp_path / f"{number}.json" for number in range(3)]
    assert evaluate(path, "--json", files[0]) == 0
    assert "static sets" not in capsys.readouterr().out
    assert evaluate(path, "--json", files[1], "--static-line") == 0
    assert evaluate(path, "--json", files[2]) == 0  # it is kept beside the checkpoint
    first, second, third = (json.loads(file.read_text()) for file in files)
    assert second == third
    assert first | {"static_accuracy": None} == second | {
        "static_accuracy": None,
        "envelope_accuracy": None,
    }
    assert second["envelope_accuracy"] >= second["static_accuracy"] > 0
    assert second["effective_policies"] > 1
    printed = capsys.readouterr().out
    assert f"routing gain     {100 * second['routing_gain']:.2f} ± " in printed
    assert f"static sets      {100 * second['static_accuracy']:.2f} % at this usage" in printed
    assert evaluate(path, "--shuffles", 0) == 0
    assert "routing gain" not in capsys.readouterr().out


def test_backbone_keeps_all_blocks(model, backbone, tmp_path, capsys):
    file = tmp_path / "result.json"
    assert evaluate(backbone, "--limit", 40, "--json", file, "--strategy", "dense") == 0
    found = json.loads(file.read_text())
    assert found["images"] == 40
    assert found["block_usage"] == 6
    assert found["block_usage_std"] == 0
    assert found["unique_policies"] == 1
    # Without a policy network's.
    assert found["flops"] == float(bdf.flops(model.backbone))
    assert (found["strategy"], found["strategy_reason"]) == ("dense", "asked for")
    assert "decisions        all blocks" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["first_k", "random_k", "distribute_k"])
@pytest.mark.parametrize("which", ["checkpoint", "backbone"])
def test_heuristics(which, kind, model, request, tmp_path, capsys):
    file = tmp_path / "result.json"
    options = ["--heuristic", kind, "--keep", 2, "--seed", 3, "--json", file, "--limit", 50]
    assert evaluate(request.getfixturevalue(which), *options, "--batch-size", 16) == 0
    found = json.loads(file.read_text())
    seed = {"seed": 3} if kind == "random_k" else {}
    expected = getattr(bdf.heuristics, kind)(2, (2, 2, 2), 1, **seed)
    assert found["keep_rates"] == expected[0].double().tolist()
    # The policy network does not run, so its FLOPs do not count.
    assert found["flops"] == pytest.approx(float(bdf.flops(model.backbone, expected)))
    assert (found["heuristic"], found["keep"]) == (kind, 2)
    assert f"decisions        {kind}, 2 of 6 blocks" in capsys.readouterr().out


@pytest.fixture
def tree(tmp_path):
    """A tree of 2 classes, 3 test images each, of 8x8 pixels."""
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for index in range(3):
                color = (100 * number, 40 * index, 90)
                Image.new("RGB", (8, 8), color).save(folder / f"{index}.png")
    return tmp_path / "tree"


def test_image_tree(tree, tmp_path):
    path, file = tmp_path / "two.safetensors", tmp_path / "result.json"
    model = make_model(classes=2)
    bdf.save(model, path)
    assert evaluate(path, "--data", tree, "--json", file) == 0
    found = json.loads(file.read_text())
    assert found["images"] == 6
    # FLOPs of images of that size.
    assert found["flops"] < float(bdf.flops(model)) / 10


def test_says_that_the_normalization_is_unknown(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    bdf.save(make_model(normalization=None), path)
    assert evaluate(path, "--limit", 10) == 0
    assert "does not say how to normalise images" in capsys.readouterr().out


def test_budgets(model, tmp_path, capsys):
    images, _ = digits()
    sets = torch.ones(4, 6).triu(2).bool().flip(0)  # of 1 to 4 blocks
    policy = make_menu_policy(sets, images, budget=2.0)
    checkpoint, file = tmp_path / "menu.safetensors", tmp_path / "result.json"
    bdf.save(bdf.BlockDrop(model.backbone, policy), checkpoint)
    assert evaluate(checkpoint, "--json", file) == 0
    own = json.loads(file.read_text())
    assert own["block_usage"] == pytest.approx(2.0, abs=0.02)
    assert evaluate(checkpoint, "--budget", 1.5, 2, 3.25, "--json", file) == 0
    found = json.loads(file.read_text())
    assert found["budgets"] == [1.5, 2, 3.25]
    usages = [one["block_usage"] for one in found["curve"]]
    assert usages == pytest.approx(found["budgets"], abs=0.02)
    for name in ("accuracy", "flops", "routing_gain"):  # the policy network counts in both
        assert found["curve"][1][name] == own[name]
    printed = capsys.readouterr().out
    assert "decisions        policy, budget 1.5, 2, 3.25" in printed
    for one in found["curve"]:
        assert f"{one['block_usage']:5.2f} ± {one['block_usage_std']:4.2f}" in printed
    assert evaluate(checkpoint, "--budget", 5) == 1
    assert "budget: expected from 1 to 4 blocks, got 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", 3], "budget: this policy network decides at one usage only"),
        (["--heuristic", "first_k", "--keep", 3, "--budget", 3], "budget: a heuristic takes"),
        (["--limit", 0], "limit: expected 1 to 355 images, got 0"),
        (["--limit", 100_000], "limit: expected 1 to 355 images, got 100000"),
        (["--batch-size", 0], "batch_size: expected at least 1, got 0"),
        (["--shuffles", -1], "shuffles: expected 0 or more, got -1"),
        (["--keep", 3], "heuristic and keep: give both, or neither"),
        (["--heuristic", "first_k"], "heuristic and keep: give both, or neither"),
        (["--heuristic", "first_k", "--keep", 7], "keep: expected 0 to 6 blocks, got 7"),
        (["--data", "/nowhere/at/all"], "data: the folder '/nowhere/at/all' does not exist"),
        (["--device", "abacus"], "device: 'abacus' is not available"),
        (["--device", "meta"], "model: expected weights, those on the meta device have no values"),
        (
            ["--json", "/nowhere/at/all.json", "--limit", 5],
            "json: the folder '/nowhere/at'",
        ),
    ],
)
def test_refuses_options(options, message, checkpoint, capsys):
    assert evaluate(checkpoint, *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("blockdrop evaluate: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_refuses_checkpoints(checkpoint, tree, tmp_path, capsys):
    def error_of(path, *options):
        assert evaluate(path, *options) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "No such file" in error_of(tmp_path / "absent.safetensors")
    assert "tree has 2 classes, but the network of" in error_of(checkpoint, "--data", tree)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(checkpoint.read_bytes()[:5000])
    assert "may be truncated" in error_of(truncated)


def test_earlier_json_survives_a_failure(checkpoint, tmp_path):
    file = tmp_path / "result.json"
    file.write_text("earlier")
    assert evaluate(checkpoint, "--json", file, "--limit", 0) == 1
    assert file.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [file]


def test_load_any(model, checkpoint, backbone, tmp_path):
    assert isinstance(load_any(checkpoint), bdf.BlockDrop)
    assert isinstance(load_any(backbone), bdf.ResNet)
    # The authors' files: both networks, or the policy network only, which is no model.
    path = tmp_path / "ckpt.t7"
    agent = authors_policy_keys(model.policy)
    torch.save({"agent": agent, "resnet": authors_keys(model.backbone)}, path)
    assert isinstance(load_any(path), bdf.BlockDrop)
    torch.save({"agent": agent}, path)
    with pytest.raises(bdf.CheckpointError, match="holds a policy network but no backbone"):
        load_any(path)
    # A damaged policy network is not passed over.
    torch.save({"agent": {}, "resnet": authors_keys(model.backbone)}, path)
    with pytest.raises(bdf.CheckpointError):
        load_any(path)
