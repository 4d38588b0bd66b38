"""The ImageNet recipe (R101) end to end on a small image-folder tree, through the command line."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import blockdrop_fast as bdf
from blockdrop_fast.commands import cli
from blockdrop_fast.data.batches import batches_of, load_dataset
from blockdrop_fast.data.image_files import image_folder_loader
from blockdrop_fast.data.image_sets import IMAGENET_NORMALIZATION, ImageFolder
from tests.networks.state_dicts import torchvision_keys
from train import __main__ as command_line
from train.config import PRESETS
from train.curriculum import curriculum
from train.finetune import finetune
from train.loop import Run

CLASSES = ("n01440764", "n01443537")
# (file, mode, size): what ImageNet has besides colour JPEG files, in all sizes and shapes.
TRAIN_FILES = (
    ("a.JPEG", "RGB", (300, 200)),
    ("b.JPEG", "L", (80, 320)),
    ("c.jpg", "CMYK", (500, 375)),
    ("d.JPEG", "P", (260, 260)),  # a PNG file under a JPEG name: ImageNet has one
)
VAL_FILES = (("e.JPEG", "RGB", (375, 500)), ("f.JPEG", "L", (90, 70)))
R101 = ("--preset", "R101", "--epochs", "1", "--workers", "1", "--threads", "1", "--device", "cpu")
RESNET18 = bdf.ResNetConfig(
    "basic", (2, 2, 2, 2), (64, 128, 256, 512), "imagenet", "projection", num_classes=1000
)


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def write_image(path: Path, mode: str, size: tuple[int, int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size).convert(mode)
    image.save(path, format="PNG" if mode == "P" else "JPEG")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """ImageNet's layout: train/ and val/ with class folders, and test/ without labels."""
    root = tmp_path_factory.mktemp("imagenet")
    for label, name in enumerate(CLASSES):
        for split, files in (("train", TRAIN_FILES), ("val", VAL_FILES)):
            for index, (file, mode, size) in enumerate(files):
                write_image(root / split / name / file, mode, size, seed=10 * label + index)
    write_image(root / "test" / "unlabelled.JPEG", "RGB", (300, 200), seed=99)
    return root


def train(*arguments: object) -> None:
    """``python -m train ARGUMENTS``, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *map(str, arguments)])
        command_line.main()


@pytest.fixture(scope="module")
def stages(tree, tmp_path_factory):
    """All stages of the recipe, one step of four images each, and the evaluation of the result."""
    out = tmp_path_factory.mktemp("runs")
    torch.manual_seed(18)
    torch.save(torchvision_keys(bdf.ResNet(RESNET18)), out / "resnet18.pth")
    common = (*R101, "--data", tree, "--limit", 4, "--batch-size", 4)
    for stage, options in {
        "pretrain": (),
        "curriculum": (
            *("--backbone", out / "pretrain" / "model.safetensors"),
            *("--policy-init", out / "resnet18.pth"),
        ),
        "finetune": ("--model", out / "curriculum" / "model.safetensors"),
    }.items():
        train(stage, *common, "--out", out / stage, *options)
    arguments = ("--data", tree, "--device", "cpu", "--json", out / "evaluation.json")
    model = out / "finetune" / "model.safetensors"
    assert cli.main(["evaluate", str(model), *map(str, arguments)]) == 0
    yield out
    shutil.rmtree(out)  # ResNet-101 and the states of its optimizers: 1.5 GB


def metrics(out: Path) -> list[dict]:
    return json.loads((out / "metrics.json").read_text())


def trained(state: dict, prefix: str) -> dict[str, torch.Tensor]:
    """The trained tensors under a prefix: all but the running statistics."""
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and key.endswith(("weight", "bias"))
    }


def largest_change(before: dict, after: dict) -> float:
    return max(float((after[key] - value).abs().max()) for key, value in before.items())


@pytest.mark.slow
def test_pretrain_makes_the_recipe_s_network(stages):
    backbone = bdf.load_backbone(stages / "pretrain" / "model.safetensors")
    assert backbone.config.layers == (3, 4, 23, 3)
    assert backbone.config.block == "bottleneck"
    assert backbone.config.num_classes == 2
    assert backbone.normalization == IMAGENET_NORMALIZATION
    (row,) = metrics(stages / "pretrain")
    assert {"train_loss", "train_accuracy", "test_accuracy"} <= row.keys()


@pytest.mark.slow
def test_policy_starts_from_the_resnet18(stages):
    """After one step of Adam at 1e-4 no weight is further than that from where it began."""
    model = bdf.load(stages / "curriculum" / "model.safetensors")
    assert model.policy.input_pool == 2
    policy = model.policy.network
    assert policy.config.layers == (1, 1, 1, 1)
    source = bdf.load_backbone(stages / "resnet18.pth").state_dict()
    taken = {
        key: source[key] for key in trained(policy.state_dict(), "") if not key.startswith("fc.")
    }
    assert len(taken) == 3 + 4 * 6 + 3 * 3
    assert 0.9e-4 < largest_change(taken, policy.state_dict()) < 1.1e-4
    assert torch.count_nonzero(policy.fc.weight) > 0
    frozen = bdf.load_backbone(stages / "pretrain" / "model.safetensors").state_dict()
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, frozen[key]), key
    (row,) = metrics(stages / "curriculum")
    assert row["forced_blocks"] == 32  # one of 33 blocks is free in the first epoch
    assert 32 <= row["test_sparsity"] <= 33


@pytest.mark.slow
def test_finetuning_steps_at_the_paper_s_rate_in_both_networks(stages):
    before, after = (
        bdf.load(stages / stage / "model.safetensors").state_dict()
        for stage in ("curriculum", "finetune")
    )
    for prefix in ("backbone.", "policy."):
        change = largest_change(trained(before, prefix), trained(after, prefix))
        assert 0.9e-5 < change < 1.1e-5, prefix
    # Both passes of the authors' procedure update the running statistics.
    assert int(after["backbone.bn1.num_batches_tracked"]) == 2 + int(
        before["backbone.bn1.num_batches_tracked"]
    )


@pytest.mark.slow
def test_evaluation_agrees_with_the_last_epoch(stages):
    found = json.loads((stages / "evaluation.json").read_text())
    (row,) = metrics(stages / "finetune")
    assert found["images"] == 4
    assert found["num_blocks"] == len(found["keep_rates"]) == 33
    assert found["segment_blocks"] == [3, 4, 23, 3]
    assert found["accuracy"] == row["test_accuracy"]
    assert found["block_usage"] == row["test_sparsity"]
    assert found["unique_policies"] == row["test_unique_policies"]
    model = bdf.load(stages / "finetune" / "model.safetensors")
    decisions = torch.ones(1, 33, dtype=torch.bool)
    everything = float(bdf.flops(model, decisions, image_size=(224, 224))[0])
    assert 0 < found["flops"] <= everything


@pytest.mark.slow
def test_a_complete_run_resumes_to_its_end_and_is_not_overwritten(stages, tree):
    again = ("--data", tree, "--limit", 4, "--batch-size", 4, "--out", stages / "finetune")
    again = ("finetune", *R101, *again, "--model", stages / "curriculum" / "model.safetensors")
    written = (stages / "finetune" / "state.pt").stat().st_mtime_ns
    train(*again, "--resume")
    assert (stages / "finetune" / "state.pt").stat().st_mtime_ns == written
    with pytest.raises(SystemExit, match="--resume"):
        train(*again)
    with pytest.raises(SystemExit, match=r"lr 1e-05 -> 0\.001"):
        train(*again, "--resume", "--lr", "1e-3")


def test_recipe_has_the_paper_s_values():
    """BlockDrop, implementation details (section 4.1) and supplementary material."""
    first, second = PRESETS["R101"]["curriculum"], PRESETS["R101"]["finetune"]
    assert PRESETS["R101"]["pretrain"].arch == "resnet101"
    assert (first.lr, first.batch_size, first.epochs, first.alpha) == (1e-4, 2048, 45, 0.8)
    assert (first.penalty, first.entropy, first.blocks_per_epoch) == (1, 0.1, 1)
    assert (second.lr, second.batch_size, second.epochs, second.alpha) == (1e-5, 320, 10, 0.8)
    assert (second.penalty, second.bn, second.samples) == (5, "all", 1)
    assert second.policy_lr is None
    # On ImageNet the paper anneals nothing: ten epochs, all at 1e-5.
    assert second.schedule == "constant"
    assert first.samples == 1
    assert first.estimator == second.estimator == "self_critical"


@pytest.fixture
def small(tree, tmp_path):
    """The recipe's curriculum, for a backbone of four blocks."""
    torch.manual_seed(0)
    backbone = bdf.resnet_imagenet((1, 1, 1, 1), num_classes=2)
    backbone.normalization = IMAGENET_NORMALIZATION
    bdf.save(backbone, tmp_path / "backbone.safetensors")
    return replace(
        PRESETS["R101"]["curriculum"],
        backbone=tmp_path / "backbone.safetensors",
        data=tree,
        out=tmp_path / "whole",
        epochs=2,
        limit=4,
        batch_size=2,
        workers=1,
        threads=1,
        device="cpu",
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["curriculum", "finetune"])
def test_a_run_cut_off_in_an_epoch_continues_to_the_same_result(
    stage, small, tmp_path, monkeypatch
):
    run, config = curriculum, small
    if stage == "finetune":
        model = bdf.BlockDrop(bdf.load_backbone(small.backbone), bdf.policy_resnet10(4))
        bdf.save(model, tmp_path / "model.safetensors")
        same = ("data", "out", "epochs", "limit", "batch_size", "workers", "threads", "device")
        same = {name: getattr(small, name) for name in same}
        run = finetune
        config = replace(
            PRESETS["R101"]["finetune"], model=tmp_path / "model.safetensors", lr=1e-3, **same
        )
    run(config)
    cut_off = replace(config, out=tmp_path / "cut off")
    finish = Run.finish_epoch

    def interrupted(self, epoch, metrics):
        if epoch == 2:
            raise KeyboardInterrupt
        finish(self, epoch, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(cut_off)
    assert [row["epoch"] for row in metrics(cut_off.out)] == [1]
    # Batches do not depend on how many processes read the files.
    run(replace(cut_off, resume=True, workers=0))
    whole, resumed = (
        torch.load(out / "state.pt", weights_only=True) for out in (config.out, cut_off.out)
    )
    assert whole["step"] == resumed["step"] == 4
    for key, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][key]), key


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_a_broken_jpeg_ends_the_command_and_is_named(damage, tree, small, tmp_path):
    root = tmp_path / "broken"
    shutil.copytree(tree, root)
    path = root / "train" / CLASSES[1] / "a.JPEG"
    path.write_bytes(path.read_bytes()[:2000] if damage == "truncated" else b"no image")
    options = ("--backbone", small.backbone, "--out", tmp_path / "run", "--data", root)
    with pytest.raises(SystemExit) as end:
        train("curriculum", *R101, *options)
    message = f"curriculum: data: cannot read the image {str(path)!r} ("
    assert str(end.value).startswith(message)
    assert "\n" not in str(end.value)
    assert not (tmp_path / "run" / "state.pt").exists()


def test_workers_read_the_files_and_nothing_is_read_ahead(tree, monkeypatch):
    opened = []
    open_image = Image.open
    monkeypatch.setattr(
        Image, "open", lambda path, *rest: opened.append(path) or open_image(path, *rest)
    )
    dataset = load_dataset(tree)
    assert isinstance(dataset.train, ImageFolder)
    assert len(dataset.train) == len(CLASSES) * len(TRAIN_FILES)
    assert [os.path.basename(os.path.dirname(path)) for path in dataset.test.paths] == [
        name for name in CLASSES for _ in VAL_FILES
    ]  # val/, because test/ has no class folders
    assert len(opened) == len(CLASSES)  # a header for each class
    images, _ = next(batches_of(dataset.train, 8, augment=True, shuffle=True, workers=1))
    assert images.shape == (8, 3, 224, 224)
    assert len(opened) == len(CLASSES)  # in this process


@pytest.mark.parametrize("mode", ["L", "CMYK", "P"])
def test_every_colour_mode_becomes_rgb(mode, tmp_path):
    write_image(tmp_path / "val" / "a" / "x.JPEG", mode, (256, 256), seed=1)
    images, _ = next(iter(image_folder_loader(tmp_path, "val", 1, workers=0)))
    with Image.open(tmp_path / "val" / "a" / "x.JPEG") as image:
        assert image.mode == mode
        expected = np.asarray(image.convert("RGB"))[16:240, 16:240]
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), expected)
    if mode == "L":
        assert torch.equal(images[0, 0], images[0, 1])
