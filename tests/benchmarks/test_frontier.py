"""``python -m benchmarks.frontier``, on tiny networks and images."""

from __future__ import annotations

import json
import re
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import blockdrop_fast as bdf
from benchmarks import frontier
from benchmarks.frontier import Arguments
from blockdrop_fast.data.batches import batches_of, load_dataset
from blockdrop_fast.measure.evaluation import Evaluation
from blockdrop_fast.measure.tolerance import WrongLogitsError
from tests.random_networks import make_cifar_network, make_menu_policy, make_policy
from train.frontier import evaluation, figure, rows, times
from train.frontier.rows import Row
from train.frontier.systems import Loaded, System

SETS = {
    "five": [1, 1, 1, 1, 1],
    "first": [1, 0, 0, 0, 0],
    "fixed": [0, 1, 0, 1, 0],
    "a set": [1, 0, 1, 1, 0],
    "spread": [1, 1, 1, 1, 0],
}
IMAGES = 140  # of the test split: two chunks, and some images left


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tree of two classes of 8x8 pixels: cats tend to be red."""
    root = tmp_path_factory.mktemp("tree")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 1), ("test", IMAGES // 2)):
        for name, red in (("cat", 80), ("dog", 0)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(176, (2, 2, 3), generator=generator, dtype=torch.uint8)
                pixels[..., 0] += red
                image = Image.fromarray(pixels.numpy()).resize((8, 8))
                image.save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def test_split(data):
    """All test images and labels."""
    return next(batches_of(load_dataset(data).test, IMAGES))


def fit(network: bdf.ResNet, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Make a network right more often than not with any set of blocks, by its last layer."""
    features: list[torch.Tensor] = []
    hook = network.fc.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.no_grad():
        for keep in product([False, True], repeat=network.num_blocks):
            network(images, torch.tensor([keep]).expand(len(images), -1))
        hook.remove()
        x = torch.cat(features)
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
        target = F.one_hot(labels).float().repeat(len(features), 1)
        solution = torch.linalg.solve(x.T @ x + 0.1 * torch.eye(x.shape[1]), x.T @ target)
        network.fc.weight.copy_(solution[:-1].T)
        network.fc.bias.copy_(solution[-1])


@pytest.fixture(scope="module")
def models(test_split):
    """A network of 5 blocks alone and with each kind of policy; and one of 3 blocks."""
    images, labels = test_split
    backbone = make_cifar_network((2, 1, 2), num_classes=2)
    small = make_cifar_network((1, 1, 1), num_classes=2, seed=1)
    fit(backbone, images, labels)
    fit(small, images, labels)
    sets = torch.ones(4, 5).tril(1).bool()  # 2 to 5 blocks
    look = bdf.BlockDrop(backbone, bdf.LookPolicy(backbone.config, 1)).eval()
    with torch.no_grad():
        look.policy.fc.bias -= look.policy_logits(images).quantile(0.5, 0)
    return {
        "full": backbone,
        "policy": bdf.BlockDrop(backbone, make_policy(5, images)),
        "menu": bdf.BlockDrop(backbone, make_menu_policy(sets, images, 3.0)),
        "look": look,
        "fixed": bdf.BlockDrop(backbone, bdf.FixedPolicy(torch.tensor(SETS["fixed"]).bool())),
        "small": small,
        "cascade": cascade_of(small, backbone, images),
        "pixels": bdf.BlockDrop(backbone, masks_of(backbone)),
    }


def cascade_of(small, large, images):
    """Half of the images stay at the small network."""
    cascade = bdf.Cascade([small, large]).eval()
    with torch.no_grad():
        cascade.set_thresholds([small(images).softmax(1).max(1).values.median().item()])
    return cascade


def masks_of(backbone):
    """Masks that leave out some pixels, differently many of each image."""
    torch.manual_seed(0)
    masks = bdf.LowCostMasks(backbone.config)
    with torch.no_grad():
        for mask in masks.masks:
            torch.nn.init.normal_(mask.weight)
            torch.nn.init.zeros_(mask.bias)
    return masks.eval()


@pytest.fixture
def files(models, tmp_path, monkeypatch):
    """The folder that the file of systems refers to."""
    monkeypatch.chdir(tmp_path)
    for name, model in models.items():
        bdf.save(model, f"{name}.safetensors")
    (tmp_path / "keep.json").write_text('{"keep": [1, 0, 1, 1, 0], "images": 7}')
    return tmp_path


def system(name: str, group: str = "some", model: str = "full", **options) -> dict:
    return {"name": name, "group": group, "checkpoint": f"{model}.safetensors", **options}


SYSTEMS = [
    system("five", "full", epochs=30),
    system("routed", "policy", "policy", rival="sets", epochs="30 + 10"),
    system("at 2.5", "menu", "menu", budget=2.5, rival="full"),
    system("at 3", "menu", "menu", rival="sets"),
    system("look", "look", "look", rival="sets"),
    system("both", "cascade", "cascade", rival="full"),
    system("three", "full", "small"),
    system("a set", "sets", keep="keep.json"),
    system("first", "sets", "menu", heuristic="first_k", k=1),
    system("spread", "sets", heuristic="distribute_k", k=4, rival="full"),
    system("fixed", "sets", "fixed"),
    system("two of three", "sets", "small", heuristic="first_k", k=2),
]

FEW = [system("five"), system("routed", model="policy")]


def run(files, data, systems=SYSTEMS, **options) -> dict:
    """The results."""
    (files / "systems.json").write_text(json.dumps(systems))
    options = {"times": False, "out": files / "out"} | options
    frontier.main(Arguments(files / "systems.json", data, **options))
    return json.loads((options["out"] / "frontier.json").read_text())


def by_name(result: dict) -> dict:
    return {one["name"]: one for one in result["systems"]}


@pytest.mark.slow
def test_accuracy_and_cost(files, data, models, test_split, capsys):
    images, labels = test_split
    result = run(files, data)
    found = by_name(result)
    assert [*found] == [
        *("three", "five", "routed", "at 2.5", "at 3", "look", "both"),
        *("first", "fixed", "two of three", "a set", "spread"),
    ]
    with torch.no_grad():
        expected = {
            "routed": (models["policy"], models["policy"](images)),
            "at 2.5": (models["menu"], models["menu"](images, 2.5)),
            "at 3": (models["menu"], models["menu"](images)),
            "look": (models["look"], models["look"](images)),
            "both": (models["cascade"], models["cascade"](images)),
        }
        for name, keep in SETS.items():
            decisions = torch.tensor([keep]).expand(IMAGES, -1)
            expected[name] = models["full"], (models["full"](images, decisions), decisions)
    for name, (model, (logits, decisions)) in expected.items():
        one, usage = found[name], decisions.sum(1).double()
        right = (logits.argmax(1) == labels).double().mean()
        assert one["evaluation"]["accuracy"] == pytest.approx(float(right), abs=1.1 / IMAGES)
        accuracy = one["evaluation"]["accuracy"]
        assert one["standard_error"] == pytest.approx((accuracy * (1 - accuracy) / IMAGES) ** 0.5)
        assert one["evaluation"]["block_usage"] == pytest.approx(float(usage.mean()), abs=0.05)
        cost = float(bdf.flops(model, decisions, image_size=8).mean())
        assert one["evaluation"]["flops"] == pytest.approx(cost, rel=0.02)
        assert one["routed"] == (name not in SETS)
    assert found["at 2.5"]["evaluation"]["routing_images"] == IMAGES
    assert found["both"]["ahead_at_blocks"] is None  # those are networks
    assert result["images"] == IMAGES
    assert result["machine"]["torch"] == torch.__version__
    assert result["command"].startswith("python -m benchmarks.frontier")
    text = (files / "out" / "frontier.md").read_text()
    assert text in capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(SYSTEMS)
    assert len({row.count("|") for row in rows}) == 1  # of as many columns
    assert re.search(r"\| policy +\| routed +\| 30 \+ 10 ", text)
    with Image.open(files / "out" / "frontier.png") as picture:
        assert picture.size == (1350, 1200)  # one panel


@pytest.mark.usefixtures("no_figure")
def test_ahead_of_rivals(files, data):
    found = by_name(run(files, data))

    def expected(name: str, cost: str, *rivals: str) -> float:
        """Between two rivals."""
        (left, low), (right, high), (own, accuracy) = (
            (one["evaluation"][cost], one["evaluation"]["accuracy"])
            for one in (found[each] for each in (*rivals, name))
        )
        assert left < own < right
        return pytest.approx(accuracy - low - (own - left) / (right - left) * (high - low))

    # Not the set of another depth; but complete networks of any.
    assert found["routed"]["ahead_at_blocks"] == expected("routed", "block_usage", "fixed", "a set")
    assert found["look"]["ahead_at_flops"] == expected("look", "flops", "a set", "spread")
    assert found["spread"]["ahead_at_blocks"] == expected("spread", "block_usage", "three", "five")
    assert found["spread"]["ahead_at_flops"] == expected("spread", "flops", "three", "five")
    # Beyond the range, and without a rival.
    for name, cost in (("routed", "flops"), ("at 2.5", "blocks"), ("five", "flops")):
        assert found[name][f"ahead_at_{cost}"] is None


@pytest.mark.usefixtures("no_figure")
def test_gates_for_pixels_count_flops(files, data, models, test_split):
    images, labels = test_split
    one = by_name(run(files, data, [system("pixels", "pixels", "pixels", seed=3, command="c")]))
    found = one["pixels"]["evaluation"]
    with torch.no_grad():
        expected = models["pixels"].eval()(images)
    assert found["accuracy"] == (expected.logits.argmax(1) == labels).double().mean()
    assert found["flops"] == pytest.approx(float(expected.flops.mean()))
    assert found["flops_std"] == pytest.approx(float(expected.flops.std(correction=0)))
    assert found["flops_std"] > 0
    assert found["block_usage"] == expected.decisions.sum(1).double().mean()
    assert "- pixels: seed 3, `c`\n" in (files / "out" / "frontier.md").read_text()


@pytest.mark.usefixtures("no_figure")
def test_sets_by_rules(files, data):
    rules = {"greedy": 1, "random_k": 1, "random_k_per_image": 10}
    systems = [system(rule, heuristic=rule, k=3, seed=1) for rule in rules]
    found = by_name(run(files, data, systems))
    for rule, most in rules.items():
        evaluation = found[rule]["evaluation"]
        assert (evaluation["block_usage"], evaluation["block_usage_std"]) == (3, 0)
        assert evaluation["unique_policies"] == most  # of 5 over 3


def test_interpolation():
    rivals = [(2.0, 0.5), (1.0, 0.2), (4.0, 0.6), (2.0, 0.4)]
    assert rows.ahead((1.5, 0.5), rivals) == pytest.approx(0.15)
    assert rows.ahead((2, 0.4), rivals) == pytest.approx(-0.1)  # the best of its cost
    assert rows.ahead((3, 0.55), rivals) == pytest.approx(0)
    assert rows.ahead((4, 0.7), rivals) == pytest.approx(0.1)
    assert rows.ahead((0.9, 1), rivals) is None
    assert rows.ahead((4.1, 1), rivals) is None
    assert rows.ahead((1, 1), []) is None


@pytest.fixture
def no_figure(monkeypatch):
    """Drawing takes longer than all else."""
    monkeypatch.setattr(frontier, "draw_flops", lambda *_: None)


@pytest.fixture
def evaluated(monkeypatch, no_figure):
    """One entry for each evaluation that is made."""
    made, evaluate = [], evaluation.evaluate
    monkeypatch.setattr(
        evaluation,
        "evaluate",
        lambda *args, **options: made.append(1) or evaluate(*args, **options),
    )
    return made


def test_only_what_is_new_is_evaluated(files, data, models, evaluated):
    first = run(files, data, FEW)
    assert len(evaluated) == 2
    second = run(
        files,
        data,
        [system("same", "policy", "policy"), system("set", keep="keep.json")],
    )
    assert len(evaluated) == 3
    assert by_name(second)["same"]["evaluation"] == by_name(first)["routed"]["evaluation"]
    # Those of systems that are no longer listed are kept.
    assert len(run(files, data, FEW)["evaluations"]) == 3
    assert len(evaluated) == 3
    # Other decisions, images or weights: evaluated anew.
    (files / "keep.json").write_text('{"keep": [1, 1, 1, 1, 0]}')
    run(files, data, [system("set", keep="keep.json")])
    assert len(evaluated) == 4
    run(files, data, [system("same decisions", heuristic="distribute_k", k=4)])
    assert len(evaluated) == 4
    run(files, data, FEW[:1], limit=20)
    assert len(evaluated) == 5
    bdf.save(make_cifar_network((2, 1, 2), num_classes=2, seed=5), files / "full.safetensors")
    run(files, data, FEW[:1])
    assert len(evaluated) == 6


def test_evaluations_survive_a_kill(files, data, evaluated, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(frontier, "rows_of", stop)
        with pytest.raises(KeyboardInterrupt):
            run(files, data, FEW)
    run(files, data, FEW)
    assert len(evaluated) == 2


def test_a_damaged_evaluation_is_made_anew(files, data, evaluated):
    whole = run(files, data, FEW)["evaluations"]
    path = files / "out" / "frontier.json"
    damaged = json.loads(path.read_text())
    first, second = damaged["evaluations"].values()
    first["accuracy"] += 0.001
    del second["crc32"]  # of an earlier version
    path.write_text(json.dumps(damaged))
    assert run(files, data, FEW)["evaluations"].keys() == whole.keys()
    assert len(evaluated) == 3
    assert json.loads(path.read_text())["evaluations"] == whole | {
        key: values for key, values in damaged["evaluations"].items() if values is second
    }


@pytest.mark.slow
def test_times(files, data, monkeypatch):
    seen, interleave = {}, times.timing.interleave
    run_system = Loaded.run

    def record(self, images):
        seen.setdefault((self.system.name, len(images)), []).append(images)
        return run_system(self, images)

    def timed(calls, **options):
        seen.clear()  # what was checked
        samples = interleave(calls, warmup=0, **options)
        sizes = {size for _, size in seen}
        assert len(sizes) == 1
        for name in calls:
            (size,) = sizes
            rows = torch.cat(seen[name, size]).flatten(1)
            # Two chunks of 64 different images each, in turn.
            assert len(rows.unique(dim=0)) == 128
            assert len(rows[:128].unique(dim=0)) == 64
        return samples

    monkeypatch.setattr(Loaded, "run", record)
    monkeypatch.setattr(times.timing, "interleave", timed)
    policies = [system("look", model="look"), system("menu", model="menu", budget=2.5)]
    systems = [*FEW, *policies, system("pixels", "pixels", "pixels")]
    result = run(files, data, systems, times=True, rounds=2)
    assert by_name(result)["pixels"]["milliseconds"] == {}
    assert "| not executed | not executed |" in (files / "out" / "frontier.md").read_text()
    for one in result["systems"]:
        if one["name"] == "pixels":
            continue
        assert [*one["samples"]] == ["64", "1"]
        for batch, chunks in one["samples"].items():
            assert [len(chunk) for chunk in chunks] == [2, 2]
            mean = sum(map(sum, chunks)) / 4  # of two values, the median is the mean
            assert one["milliseconds"][batch] == pytest.approx(1e3 * mean * int(batch) / 64)
    with Image.open(files / "out" / "frontier.png") as picture:
        assert picture.size == (1350, 1200)
    with Image.open(files / "out" / "frontier-times.png") as picture:
        assert picture.size == (2700, 1200)
    # Times of another run are not taken over.
    assert by_name(run(files, data, FEW[:1]))["five"]["milliseconds"] == {}


def test_wrong_logits_are_not_timed(files, data, monkeypatch):
    run_system = Loaded.run

    def wrong(self, images):
        logits, decisions = run_system(self, images)
        return bdf.Output(logits + 1e-3 * (len(images) == 1), decisions)

    monkeypatch.setattr(Loaded, "run", wrong)
    with pytest.raises(SystemExit, match="five, batch 1: logits are off") as stopped:
        run(files, data, FEW[:1], times=True, rounds=1)
    assert isinstance(stopped.value.__context__, WrongLogitsError)


@pytest.mark.parametrize(
    ("systems", "message"),
    [
        ([system("a", model="absent")], "'a': .*No such file.*absent.safetensors"),
        ([system("a", "some", "full", budget=3)], "'a': budget: a bare backbone has no policy"),
        ([system("a", "some", "policy", budget=3)], "'a': budget: this policy network decides at"),
        (
            [system("a", "some", "menu", budget=9)],
            "'a': budget: expected from 2 to 5 blocks",
        ),
        ([system("a", "some", "pixels", budget=3)], "'a': budget: gates for every pixel take none"),
        ([system("a", rival="sets")], "'a': rival: expected a group out of 'some', got 'sets'"),
        (
            [system("a", "x", rival="y"), system("b", "y", "small", heuristic="first_k", k=1)],
            "'a': rival: 'y' has no complete network and no sets out of 5 blocks",
        ),
        ([system("a"), system("a")], "two are called 'a'"),
        ([system("a", keep="absent.json")], "'a': .*No such file.*absent.json"),
        ([system("a", "some", "small", keep="keep.json")], "'a': keep: expected .* of 3 0 or 1 in"),
        ([system("a", keep="systems.json")], "'a': keep: expected .* of 5 0 or 1 in"),
        ([system("a", heuristic="first_k", k=6)], "'a': keep: expected 0 to 5 blocks, got 6"),
        ([system("a", heuristic="last_k", k=2)], "'a': heuristic: expected greedy, first_k, rand"),
        ([system("a", heuristic="first_k")], "'a': expected heuristic and k together"),
        ([system("a", budget=2, keep="keep.json")], "'a': expected one of budget, keep and heur"),
        ([system("a", budget="2")], r"'a': budget: expected int \| float \| None, got '2'"),
        ([system("a", colour="red")], "'a': expected the keys name, .*, got 'colour'"),
        ([{"name": "a", "group": "some"}], "'a': checkpoint: expected str, got None"),
        (["a"], "expected objects, got 'a'"),
        ([], "expected a list of systems"),
    ],
)
def test_refuses_systems(files, data, systems, message):
    with pytest.raises(SystemExit, match=f"^frontier: error: systems: {message}") as stopped:
        run(files, data, systems)
    assert "\n" not in str(stopped.value)
    assert not (files / "out").exists()


def test_refuses_other_input(files, data, tmp_path):
    def refused(message, **options):
        with pytest.raises(SystemExit, match=f"^frontier: error: {message}") as stopped:
            run(files, data, FEW[:1], **options)
        assert "\n" not in str(stopped.value)

    refused("limit: expected 1 to 140 images, got 141", limit=141)
    refused("limit: expected at least 64 test images to time, got 63", limit=63, times=True)
    refused("rounds: expected at least 1", rounds=0, times=True)
    bdf.save(make_cifar_network((2, 1, 2)), files / "full.safetensors")
    refused(".*has 10 classes, but tree.* has 2", out=files / "new")
    (files / "out" / "frontier.json").write_text("[1]")
    bdf.save(make_cifar_network((2, 1, 2), num_classes=2), files / "full.safetensors")
    refused("out: .*frontier.json is no file of results")
    (files / "other.json").write_text("{")
    with pytest.raises(SystemExit, match=r"systems: .*other\.json is no JSON"):
        frontier.main(Arguments(files / "other.json", data))


@pytest.mark.slow
def test_names_do_not_cover_each_other(tmp_path, monkeypatch):
    """Twenty systems in four groups, closer than their names are long."""

    def row(group: int, index: int) -> Row:
        cost = 50 + 4 * index + group
        found = Evaluation(
            1000, 0.8 + 0.01 * index + 0.005 * group, 0, 5, 0, 9, cost * 1e6, 0, 1, (), (), (), 1.0
        )
        samples = {64: [[cost * 1e-4]], 1: [[cost * 1e-4]]}
        named = System(f"group {group}, system {index}", f"group {group}", "")
        return Row(named, found, False, False, "walk", samples)

    placed, place = [], figure.label_points

    def record(*args):
        placed.append(place(*args))
        return placed[-1]

    monkeypatch.setattr(figure, "label_points", record)
    found = [row(group, index) for group in range(4) for index in range(5)]
    figure.draw_flops(found, "title", tmp_path / "figure.png")
    figure.draw_times(found, "title", tmp_path / "times.png")
    assert [len(boxes) for boxes in placed] == [20, 20, 20]
    for boxes in placed:
        assert (boxes[:, 2:] - boxes[:, :2] > 5).all()
        covers = (boxes[:, None, :2] < boxes[:, 2:]) & (boxes[:, :2] < boxes[:, None, 2:])
        assert covers.all(-1).sum() == 20  # each itself
