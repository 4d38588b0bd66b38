"""A recipe: its stages are wired, run in a row, resumed, and judged against the control."""

import json
from dataclasses import replace

import pytest
from PIL import Image

import blockdrop_fast as bdf
from train import __main__ as command_line
from train import images
from train.config import PRESETS, RECIPES, Expert, Joint, Pretrain, Recipe
from train.recipe import RESULT_FILE, recipe, stages_of
from train.stages import run_stages

FEW = {"batch_size": 32, "held_out": 100}
SMALL = {
    "pretrain": Pretrain(epochs=1, batch_size=32, arch="resnet8"),
    "droppable": Pretrain(epochs=1, batch_size=32, droppable=True, chain_images=50),
    "expert": Expert(epochs=1, line_images=50, **FEW),
    "joint": Joint(epochs=1, **FEW),
    "refit": Expert(epochs=1, **FEW),
    "control": Joint(epochs=1, **FEW),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_takes_what_an_earlier_one_leaves(name, tmp_path):
    budget = None if "curriculum" in RECIPES[name] else 5.0
    stages = stages_of(Recipe(out=tmp_path, recipe=name, budget=budget), RECIPES[name])
    assert list(stages) == list(RECIPES[name])
    left = {stage.checkpoint for stage in stages.values()}
    for number, stage in enumerate(stages.values()):
        options = vars(stage.config)
        taken = {path for path in options.values() if path in left}
        earlier = {other.checkpoint for other in list(stages.values())[:number]}
        assert taken <= earlier
        assert bool(taken) == bool(number)


def test_presets_name_their_recipes():
    assert {name: preset["recipe"].recipe for name, preset in PRESETS.items()} == {
        name: name for name in PRESETS
    }


@pytest.mark.slow
def test_quick_runs_resumes_and_compares(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("BLOCKDROP_DATA", raising=False)
    monkeypatch.setitem(RECIPES, "quick", SMALL)
    config = Recipe(recipe="quick", out=tmp_path, limit=200, threads=1, budget=2.0)
    stages = stages_of(config, SMALL)
    run_stages({name: stages[name] for name in ("pretrain", "droppable")})
    recipe(config)
    printed = capsys.readouterr().out
    assert "droppable: complete in" in printed
    assert "against one set" in printed
    results = json.loads((tmp_path / RESULT_FILE).read_text())
    assert results["one set for all"]["block_usage"] == 2
    with pytest.raises(ValueError, match=r"expert holds a run with other options: budget 2.0 -> 3"):
        recipe(replace(config, budget=3.0))
    assert bdf.load(tmp_path / "refit" / "model.safetensors").policy.menu.budget == 2.0


def test_stages_in_a_row_read_the_data_once(tmp_path, monkeypatch):
    read = []
    load = images.load_dataset
    monkeypatch.setattr(images, "load_dataset", lambda data: read.append(data) or load(data))
    images._loaded.cache_clear()
    first = [images.prepare(Pretrain(limit=limit))[1] for limit in (32, 64)]
    assert len(read) == 1
    assert [len(one.train) for one in first] == [32, 64]
    for folder in ("one", "two"):
        for split in ("train", "test"):
            (tmp_path / folder / split / "ant").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / folder / split / "ant" / "0.png")
    assert images.prepare(Pretrain(data=tmp_path / "one"))[1].name == "one"
    monkeypatch.setenv("BLOCKDROP_DATA", str(tmp_path / "two"))
    assert images.prepare(Pretrain())[1].name == "two"
    assert len(read) == 3


def test_bad_options(tmp_path, monkeypatch):
    monkeypatch.delenv("BLOCKDROP_DATA", raising=False)
    for options in ({"budget": 3.0}, {"look": 1}):
        with pytest.raises(ValueError, match="budget and look: this recipe"):
            recipe(replace(Recipe(out=tmp_path), **options))
    with pytest.raises(ValueError, match="budget: the mean kept blocks"):
        recipe(Recipe(out=tmp_path, recipe="quick"))
    few = {"recipe": "quick", "budget": 3.0, "limit": 200}
    for options, got in (({}, 5000), ({"held_out": 200}, 200)):
        with pytest.raises(ValueError, match=f"held_out: expected 1 to 199, got {got}"):
            recipe(Recipe(out=tmp_path, **few, **options))
    assert not list(tmp_path.iterdir())


def test_an_unknown_recipe_is_named(tmp_path, monkeypatch):
    arguments = ["train", "recipe", "--recipe", "slow", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit):
        command_line.main()
