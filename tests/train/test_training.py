"""The training stages end to end on a few digits: they learn, resume, and refuse to hide errors."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.networks.low_cost import LowCostMasks
from tests.random_networks import make_look_model
from tests.train.conftest import FEW
from train import curriculum as curriculum_module
from train import demo as demo_module
from train import finetune as finetune_module
from train.config import PRESETS, STAGES, Curriculum, Demo, Finetune, Heuristics, Pretrain
from train.curriculum import curriculum
from train.curves import Arguments, draw
from train.demo import demo
from train.finetune import distillation_loss, finetune
from train.heuristics import heuristics
from train.loop import NonFiniteLossError
from train.optimization import engine_dtype
from train.pretrain import _make_backbone, pretrain, stochastic_depth

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def with_policy(pretrained, tmp_path_factory):
    out = tmp_path_factory.mktemp("curriculum")
    curriculum(
        Curriculum(backbone=pretrained / "model.safetensors", epochs=4, out=out, lr=1e-3, **FEW)
    )
    return out


def metrics(out: Path) -> list[dict]:
    return json.loads((out / "metrics.json").read_text())


def test_pretrain_learns_and_saves_a_backbone(pretrained):
    history = metrics(pretrained)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["train_accuracy"] > 0.6 > history[0]["train_accuracy"]
    assert bdf.load_backbone(pretrained / "model.safetensors").num_blocks == 3
    assert any(path.name.startswith("events.out") for path in pretrained.iterdir())


def test_curriculum_frees_blocks_and_logs_the_authors_names(with_policy, pretrained):
    history = metrics(with_policy)
    assert [row["forced_blocks"] for row in history] == [2, 1, 0, 0]
    for split in ("train", "test"):
        for name in ("accuracy", "reward", "sparsity", "variance", "unique_policies"):
            assert f"{split}_{name}" in history[-1]
    for name in ("routing_gain", "effective_policies", "static_accuracy", "envelope_accuracy"):
        assert f"test_{name}" in history[-1]
    assert history[0]["test_sparsity"] >= 2  # two of three blocks were forced on
    model = bdf.load(with_policy / "model.safetensors")
    frozen = bdf.load_backbone(pretrained / "model.safetensors").state_dict()
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, frozen[name]), name


def test_curriculum_goes_on_with_a_policy(with_policy, pretrained, tmp_path):
    config = Curriculum(
        backbone=pretrained / "model.safetensors",
        policy=with_policy / "model.safetensors",
        epochs=1,
        blocks_per_epoch=3,
        lr=0.0,
        out=tmp_path,
        **FEW,
    )
    curriculum(config)
    assert metrics(tmp_path)[0]["forced_blocks"] == 0
    before, after = (bdf.load(out / "model.safetensors").policy for out in (with_policy, tmp_path))
    assert torch.equal(before.network.fc.weight, after.network.fc.weight)
    both = replace(config, policy_init=config.policy, out=tmp_path / "both")
    with pytest.raises(ValueError, match="expected one of them"):
        curriculum(both)


@pytest.mark.parametrize(
    "options",
    [
        {"entropy_form": "bernoulli"},
        {"reward_of": "probability"},
        {"estimator": "rloo", "samples": 2},
        {"estimator": "arms", "samples": 3},
        {"estimator": "flips", "flips": 2},
        {"usage_target": 0.5},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_stages_with_options_beyond_the_paper(with_policy, pretrained, tmp_path, options):
    small = {"limit": 64, "batch_size": 32, "threads": 1, "epochs": 1, "static_images": 0}
    before = bdf.load(with_policy / "model.safetensors").policy.network.fc.weight
    first = Curriculum(
        backbone=pretrained / "model.safetensors",
        policy=with_policy / "model.safetensors",
        blocks_per_epoch=2,
        out=tmp_path / "curriculum",
        **small,
        **options,
    )
    second = Finetune(
        model=with_policy / "model.safetensors",
        entropy=0.1,
        bn="active",
        out=tmp_path / "finetune",
        **small,
        **options,
    )
    for stage, config in ((curriculum, first), (finetune, second)):
        stage(config)
        (row,) = metrics(config.out)
        assert all(map(math.isfinite, row.values()))
        saved = torch.load(config.out / "state.pt", weights_only=True)["schedulers"][-1]
        assert saved["value"] == row.get("usage_price", 0.0)
        assert (saved["value"] > 0) == ("usage_target" in options)
        after = bdf.load(config.out / "model.safetensors").policy.network.fc.weight
        assert not torch.equal(after, before)


@pytest.mark.slow
@pytest.mark.parametrize(("bn", "samples"), [("all", 1), ("active", 2), ("frozen", 1)])
def test_finetune_trains_both_networks(with_policy, tmp_path, bn, samples):
    before = bdf.load(with_policy / "model.safetensors").state_dict()
    finetune(
        Finetune(
            model=with_policy / "model.safetensors",
            epochs=1,
            out=tmp_path,
            bn=bn,
            samples=samples,
            **FEW,
        )
    )
    after = bdf.load(tmp_path / "model.safetensors").state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert "backbone.conv1.weight" in changed
    assert "policy.network.conv1.weight" in changed
    statistics = {name for name in changed if "backbone" in name and "running" in name}
    assert bool(statistics) == (bn != "frozen")


@pytest.mark.slow
def test_finetune_with_the_policy_frozen_at_first(with_policy, tmp_path):
    config = Finetune(
        model=with_policy / "model.safetensors", bn="active", lr=1e-2, policy_frozen=1, **FEW
    )
    before = bdf.load(config.model)
    for epochs in (1, 2):
        finetune(replace(config, out=tmp_path / str(epochs), epochs=epochs, schedule="constant"))
        after = bdf.load(tmp_path / str(epochs) / "model.safetensors").state_dict()
        changed = {name for name, old in before.state_dict().items() if (after[name] != old).any()}
        assert any(name.startswith("backbone.") for name in changed)
        assert any(name.startswith("policy.") for name in changed) == (epochs == 2)


def test_finetune_with_a_teacher(with_policy, pretrained, tmp_path):
    config = Finetune(
        model=with_policy / "model.safetensors", epochs=1, bn="active", out=tmp_path / "one", **FEW
    )
    finetune(config)
    taught = replace(
        config, teacher=pretrained / "model.safetensors", distill=5.0, out=tmp_path / "two"
    )
    finetune(taught)
    losses = [metrics(tmp_path / run)[0]["train_cross_entropy"] for run in ("one", "two")]
    assert losses[1] > losses[0]  # the second term is counted
    other = bdf.resnet_cifar(8, num_classes=3)
    bdf.save(other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="teacher"):
        finetune(replace(taught, teacher=tmp_path / "other.safetensors", out=tmp_path / "three"))


def test_engines_take_the_precision_of_training_on_a_gpu_only(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for precision, supported, on_gpu in (
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
        ("bfloat16", True, torch.bfloat16),
        ("float32", True, torch.float32),
    ):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        config = Pretrain(precision=precision)
        assert engine_dtype(config, gpu) == on_gpu
        assert engine_dtype(config, cpu) == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("bn", ["all", "active"])
def test_stages_with_engines_in_bfloat16(pretrained, tmp_path, monkeypatch, bn):
    """What a GPU does, on a CPU: every image reaches an engine in the engine's dtype."""
    for stage in (curriculum_module, finetune_module):
        monkeypatch.setattr(stage, "engine_dtype", lambda config, device: torch.bfloat16)
    small = {"limit": 64, "batch_size": 32, "threads": 1, "epochs": 1, "precision": "bfloat16"}
    backbone = pretrained / "model.safetensors"
    first = Curriculum(backbone=backbone, out=tmp_path / "curriculum", **small)
    curriculum(first)
    model = first.out / "model.safetensors"
    finetune(Finetune(model=model, teacher=backbone, bn=bn, out=tmp_path / "finetune", **small))
    (row,) = metrics(tmp_path / "finetune")
    assert 0 <= row["test_accuracy"] <= 1
    assert math.isfinite(row["train_cross_entropy"])


def test_distillation_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0]])
    target = torch.tensor([[2.0, 0.0]])
    p = torch.softmax(target / 2, 1)
    expected = 4 * (p * (p.log() - math.log(0.5))).sum()
    assert distillation_loss(logits, target, 2.0).item() == pytest.approx(expected.item())
    assert distillation_loss(target, target, 2.0).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"estimator": "rloo"}, "samples"),
        ({"estimator": "arms"}, "samples"),
        ({"estimator": "flips", "samples": 0}, "samples"),
        ({"estimator": "flips", "flips": 0}, "flips"),
        ({"flips": 2}, "flips"),
        ({"estimator": "flips", "bn": "all"}, "estimator"),
        ({"estimator": "arms", "samples": 3, "bn": "all"}, "estimator"),
    ],
)
def test_options_that_an_estimator_cannot_take(with_policy, tmp_path, options, named):
    options = {"bn": "active"} | options
    config = Finetune(model=with_policy / "model.safetensors", out=tmp_path, **FEW, **options)
    with pytest.raises(ValueError, match=f"^{named}: "):
        finetune(config)


@pytest.mark.parametrize("sets", [None, torch.ones(1, 5).bool()], ids=["looks", "menu"])
def test_policies_that_do_not_decide_block_by_block(sets, tmp_path):
    model, _ = make_look_model(sets=sets)
    path = tmp_path / "model.safetensors"
    bdf.save(model, path)
    with pytest.raises(
        ValueError, match=r"^model: expected a policy network that decides block by"
    ):
        finetune(Finetune(model=path, out=tmp_path / "run", **FEW))
    with pytest.raises(ValueError, match=r"^policy: expected a policy network that decides block"):
        curriculum(Curriculum(backbone=path, policy=path, out=tmp_path / "run", **FEW))


def test_finetune_of_the_authors_takes_one_sample(with_policy, tmp_path):
    config = Finetune(
        model=with_policy / "model.safetensors", samples=2, bn="all", out=tmp_path, **FEW
    )
    with pytest.raises(ValueError, match="samples"):
        finetune(config)


def test_heuristics_are_compared_at_the_policy_s_usage(with_policy, tmp_path):
    heuristics(Heuristics(model=with_policy / "model.safetensors", out=tmp_path, keep=2))
    rows = json.loads((tmp_path / "heuristics.json").read_text())
    assert rows["FirstK"]["block_usage"] == rows["DistributeK"]["block_usage"] == 2
    assert rows["FirstK"]["keep_rates"] == [1, 1, 0]
    assert rows["all blocks"]["block_usage"] == 3


def test_heuristics_of_what_no_engine_runs(tmp_path):
    backbone = bdf.resnet_cifar(8)
    bdf.save(bdf.BlockDrop(backbone, LowCostMasks(backbone.config)), tmp_path / "masks.safetensors")
    with pytest.raises(ValueError, match=r"model: .*masks\.safetensors: "):
        heuristics(Heuristics(model=tmp_path / "masks.safetensors", out=tmp_path / "out", keep=2))


def test_stochastic_depth_rates():
    keep = stochastic_depth(8000, 4, 0.5, 0.25, torch.Generator().manual_seed(0))
    assert keep[:2000].all()
    rates = keep[2000:].float().mean(0)
    expected = torch.tensor([1 - 0.125, 1 - 0.25, 1 - 0.375, 1 - 0.5])
    assert (rates - expected).abs().max() < 0.03


def test_an_existing_run_is_not_overwritten(pretrained):
    with pytest.raises(FileExistsError, match="--resume"):
        pretrain(Pretrain(arch="resnet8", epochs=1, out=pretrained, **FEW))


def test_resume_with_other_options_names_them(pretrained):
    config = Pretrain(arch="resnet8", epochs=6, out=pretrained, lr=0.01, resume=True, **FEW)
    with pytest.raises(ValueError, match=r"lr 0\.1 -> 0\.01"):
        pretrain(config)


def test_nan_loss_stops_with_the_step_and_keeps_the_checkpoint(pretrained, tmp_path):
    backbone = bdf.load_backbone(pretrained / "model.safetensors")
    with torch.no_grad():
        backbone.fc.weight[0, 0] = float("nan")
    bdf.save(backbone, tmp_path / "broken.safetensors")
    config = Pretrain(init=tmp_path / "broken.safetensors", epochs=1, out=tmp_path / "run", **FEW)
    with pytest.raises(NonFiniteLossError, match="step 1"):
        pretrain(config)
    assert not (tmp_path / "run" / "state.pt").exists()


@pytest.mark.parametrize(
    ("arch", "expected"),
    [("resnet72", "1.17e+10"), ("resnet75", "1.21e+10"), ("resnet84", "1.34e+10"),
     ("resnet20", "8.11e+07"), ("resnet44", "1.94e+08")],
)  # fmt: skip
def test_shallower_networks_cost_what_the_paper_says(arch, expected):
    """Those of ImageNet: table 3; those of CIFAR: counted by hand, 2 x multiply-adds."""
    classes = 1000 if expected.endswith("10") else 10
    dataset = SimpleNamespace(name="", classes=range(classes))
    with torch.device("meta"):
        backbone = _make_backbone(Pretrain(arch=arch), dataset)
    assert f"{float(bdf.flops(backbone)):.2e}" == expected


@pytest.mark.parametrize(
    ("stage", "config", "message"),
    [
        (curriculum, Curriculum(), "backbone"),
        (finetune, Finetune(), "model"),
        (heuristics, Heuristics(), "model"),
        (pretrain, Pretrain(arch="vgg"), "arch"),
        (pretrain, Pretrain(arch="resnet33"), "depth"),
    ],
)
def test_missing_or_wrong_options_are_named(stage, config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        stage(replace(config, out=tmp_path / "run"))


@pytest.mark.slow
def test_demo_trains_measures_and_draws(tmp_path, capsys):
    config = Demo(
        out=tmp_path,
        limit=384,  # 250 are held out
        threads=1,
        batches=(8,),
        epochs=1,
    )
    demo(config)
    printed = capsys.readouterr().out
    for name in demo_module.CONTENDERS:
        assert f"\n{name} " in printed
    lines = json.loads((tmp_path / "demo.json").read_text())["lines"]
    assert [line["blocks"] for line in lines[:2]] == [15, 15]
    assert all(line["milliseconds"]["8"] > 0 for line in lines)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    demo(config)  # complete stages are not run again
    assert "pretrain: complete in" in capsys.readouterr().out


def test_curves_of_several_runs(pretrained, with_policy, tmp_path):
    draw(Arguments(runs=(pretrained, with_policy), out=tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_presets_cover_every_stage_and_paper_is_the_paper():
    for preset in PRESETS.values():
        assert preset.keys() == STAGES.keys()
    paper = PRESETS["paper"]
    assert (paper["curriculum"].batch_size, paper["curriculum"].lr) == (2048, 1e-4)
    assert (paper["finetune"].batch_size, paper["finetune"].bn) == (256, "all")
    assert paper["curriculum"].alpha == paper["finetune"].alpha == 0.8


@pytest.mark.slow
def test_command_line_lists_stages_and_rejects_unknown_ones():
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "train", *arguments], cwd=ROOT, capture_output=True, text=True
        )

    assert "curriculum" in run().stdout
    assert run("fly").returncode == 2
    assert "--preset" in run("pretrain", "--preset", "huge").stderr
    failed = run("curriculum", "--out", os.devnull)
    assert failed.returncode == 1
    assert "backbone" in failed.stderr
