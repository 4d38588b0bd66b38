"""A run's folder and options: what goes on where it was, and what is refused."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.networks.checkpoint_files import content_key, read_torch, write_torch
from tests.random_networks import CIFAR, make_network
from tests.train.conftest import FEW
from train.config import Curriculum, Pretrain, Reproduce
from train.pretrain import pretrain
from train.reproduce import reproduce
from train.run_files import STATE_FILE, check_options, options_text, read_progress
from train.stages import Stage
from train.systems.config import Cascade


def of_folder(folder, **options):
    """A run from a backbone, both in one folder."""
    return Pretrain(
        init=folder / "given" / "model.safetensors", out=folder / "run", **FEW, **options
    )


def save(folder, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    bdf.save(bdf.resnet_cifar(8), folder / "model.safetensors")


def test_a_moved_folder_goes_on(tmp_path, monkeypatch, killed):
    save(tmp_path / "here" / "given")
    killed(pretrain, of_folder(tmp_path / "here", epochs=2))
    (tmp_path / "here").rename(tmp_path / "there")
    stage = Stage("pretrain", of_folder(tmp_path / "there", epochs=2))
    stage.check()
    assert not stage.complete
    stage.run()
    assert stage.complete
    monkeypatch.chdir(tmp_path)
    nearer = of_folder(Path("there"), epochs=2)
    Stage("pretrain", nearer).check()
    pretrain(replace(nearer, resume=True))


def test_another_checkpoint_at_the_same_path_is_refused(tmp_path):
    save(tmp_path / "given")
    config = of_folder(tmp_path, epochs=1)
    text = options_text(config)
    save(tmp_path / "given")  # written anew, and the same
    check_options(text, config)
    save(tmp_path / "given", seed=1)
    with pytest.raises(ValueError, match=r"init \S+ -> \S+, whose content is another$"):
        check_options(text, config)
    (tmp_path / "given" / "model.safetensors").unlink()
    check_options(text, config)  # nothing to compare but the path
    with pytest.raises(ValueError, match=r"other options: init \S+ -> other\.safetensors$"):
        check_options(text, replace(config, init=Path("other.safetensors")))


def test_options_of_older_runs_are_paths(tmp_path):
    save(tmp_path)
    config = Pretrain(init=tmp_path / "model.safetensors")
    old = json.dumps({"init": str(config.init)})
    check_options(old, config)
    os.rename(config.init, tmp_path / "moved.safetensors")
    with pytest.raises(ValueError, match="init"):
        check_options(old, replace(config, init=tmp_path / "moved.safetensors"))


def test_several_checkpoints_of_an_option(tmp_path):
    for number in range(3):
        save(tmp_path / str(number), seed=number)
    one, two, three = (tmp_path / str(number) / "model.safetensors" for number in range(3))
    text = options_text(Cascade(networks=(one, two)))
    (tmp_path / "1").rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "model.safetensors"
    check_options(text, Cascade(networks=(one, moved)))
    for others in ((one, three), (moved, one), (one,), (one, moved, three)):
        with pytest.raises(ValueError, match="networks"):
            check_options(text, Cascade(networks=others))


def test_shipped_models_are_known_by_their_content():
    options = json.loads(options_text(Curriculum(backbone=Path("resnet32-cifar10-jpeg"))))
    assert set(options["backbone"]) == {"file", "key"}


def test_a_reproduction_s_init_is_known_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr("train.stages.Stage.run", lambda stage: 1 / 0)
    save(tmp_path / "given")
    config = Reproduce(
        scale="quick", arch=("resnet14",), epochs=1, limit=320, threads=1, only=("table3",),
        out=tmp_path / "out", init=tmp_path / "given" / "model.safetensors",
    )  # fmt: skip
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            reproduce(config)
    (tmp_path / "given").rename(tmp_path / "moved")
    config = replace(config, init=tmp_path / "moved" / "model.safetensors")
    with pytest.raises(ZeroDivisionError):
        reproduce(config)
    save(tmp_path / "moved", seed=1)
    with pytest.raises(ValueError, match=r"holds another reproduction: init \S+, not \S+$"):
        reproduce(config)


def test_progress_is_read_without_the_tensors(tmp_path, monkeypatch):
    path = tmp_path / STATE_FILE
    model = make_network(CIFAR).state_dict()
    state = {"epoch": 300, "config": '{"lr": 0.1}', "step": 2**40, "model": model}
    write_torch(state, path)
    monkeypatch.setattr("torch.load", lambda *_, **__: 1 / 0)
    assert read_progress(path) == (300, '{"lr": 0.1}')
    whole = path.read_bytes()
    at = whole.index(b"config")
    for damaged in (whole[: len(whole) // 2], whole[:at] + b"c0nfig" + whole[at + 6 :], b"", b"PK"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"state\.pt: cannot be read"):
            read_progress(path)
    write_torch({"epoch": 1}, path)
    with pytest.raises(ValueError, match=r"state\.pt is not the checkpoint of a run"):
        read_progress(path)


def test_the_key_of_a_file_is_that_of_its_content(tmp_path):
    own, foreign = tmp_path / "model.safetensors", tmp_path / "net.pth"
    network = make_network(CIFAR)
    bdf.save(network, own)
    torch.save(network.state_dict(), foreign)
    keys = {content_key(own), content_key(foreign)}
    bdf.save(network, own)
    assert {content_key(own), content_key(foreign)} == keys
    with torch.no_grad():
        network.fc.bias[0] += 1
    bdf.save(network, own)
    torch.save(network.state_dict(), foreign)
    assert not {content_key(own), content_key(foreign)} & keys
    assert len(read_torch(foreign)) == len(network.state_dict())
