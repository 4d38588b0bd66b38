"""Files that are damaged, cut off by a kill, or do not fit on the disk. `make faults` runs more."""

import contextlib
import itertools
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.data.cifar_files import _read_pickle
from blockdrop_fast.executors import crossover
from blockdrop_fast.files import atomic_write, check_new_file, check_new_folder, remove_leftovers
from blockdrop_fast.networks.checkpoint_files import read_torch, write_torch
from tests import faults
from tests.faults import KINDS, TINY, damaged
from train.config import Heuristics, Pretrain
from train.heuristics import heuristics
from train.loop import Run
from train.pretrain import pretrain

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("BLOCKDROP_KILLS", "10"))


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_named(name):
    counts = faults.run(name, range(6))
    assert counts.total() == 6


def test_damage_is_done():
    data, rng = bytes(range(256)) * 20, random.Random(0)
    assert sum(damaged(data, rng) == data for _ in range(200)) < 10


def test_a_number_in_a_pickle_takes_no_memory(tmp_path):
    # "Remember the first object as number 2^30": the C unpickler makes a table of 16 GB.
    (tmp_path / "bomb").write_bytes(b"\x80\x02}r\x00\x00\x00\x40.")
    assert _read_pickle(tmp_path / "bomb") == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8e6  # kB


def test_a_huge_number_in_a_table_is_warned_of(tmp_path):
    cell = '{"batch": 1e999, "keep": 0.5, "seconds": {"dense": 1, "gather": 1}}'
    entry = f'{{"key": {{}}, "measured": "x", "cells": [{cell}]}}'
    path = tmp_path / "crossover.json"
    path.write_text(f'{{"format": "{crossover.FORMAT}", "entries": [{entry}]}}')
    with pytest.warns(UserWarning, match="is ignored"):
        assert crossover._read(path) == []


@pytest.mark.parametrize("name", ["state.pt", "examples.pt"])
def test_pickles_of_runs_are_refused_unexecuted(tmp_path, name):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"epoch": Malicious()}, tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: refused"):
        read_torch(tmp_path / name)
    (tmp_path / name).write_bytes(pickle.dumps({"epoch": Malicious()}))
    with pytest.raises(ValueError, match=rf"{name}: "):
        read_torch(tmp_path / name)
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------ killed while saving


def constant(value: int) -> bdf.ResNet:
    """A network all of whose weights are one number."""
    network = bdf.ResNet(TINY)
    for tensor in network.state_dict().values():
        tensor.fill_(value)
    return network


def values_of(state: dict) -> set[float]:
    return {float(one) for tensor in state.values() for one in tensor.unique()}


def save_for_ever(folder: Path, first: int) -> None:
    for value in itertools.count(first):
        network = constant(value % 250)
        bdf.save(network, folder / "model.safetensors")
        write_torch({"model": network.state_dict()}, folder / "state.pt")
        with atomic_write(folder / "metrics.json") as path:
            path.write_text(json.dumps([value] * 100))


def test_a_kill_while_saving_leaves_whole_files(tmp_path):
    network = constant(0)
    bdf.save(network, tmp_path / "model.safetensors")
    write_torch({"model": network.state_dict()}, tmp_path / "state.pt")
    (tmp_path / "metrics.json").write_text("[0]")
    rng, seen = random.Random(0), set()
    for kill in range(KILLS):
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(tmp_path, 7 * kill + 1)
            finally:
                os._exit(1)
        if kill == KILLS - 1:  # however slow the machine is, one came after a save
            while json.loads((tmp_path / "metrics.json").read_text())[0] < 7 * kill + 1:
                time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        states = [
            bdf.load_backbone(tmp_path / "model.safetensors").state_dict(),
            read_torch(tmp_path / "state.pt")["model"],
        ]
        for state in states:
            values = values_of(state)
            assert len(values) == 1, "of two saves"
            seen |= values
        assert len(set(json.loads((tmp_path / "metrics.json").read_text()))) == 1
    assert len(seen) > 1, "nothing was saved before the kills"
    for name in ("model.safetensors", "state.pt", "metrics.json"):
        remove_leftovers(tmp_path / name)
    assert len(os.listdir(tmp_path)) == 3


# ------------------------------------------------------------------ nowhere to write


@contextlib.contextmanager
def tmpfs(folder: Path, size: int):
    """A file system of so many bytes, where this process may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount).returncode:
        pytest.skip("no right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def largest_file(size: int):
    """A write that makes a file larger fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


SAVES = {
    "model.safetensors": lambda path: bdf.save(constant(1), path),
    "state.pt": lambda path: write_torch({"model": constant(1).state_dict()}, path),
    "crossover.json": lambda path: crossover.save(
        TINY,
        torch.float32,
        "cpu",
        [crossover.Cell(n, 0.5, {"dense": 1.0, "gather": 1.0}) for n in range(1, 200)],
        path,
    ),
}


@pytest.mark.parametrize("name", SAVES)
def test_a_full_disk_leaves_the_last_file(name, tmp_path):
    with tmpfs(tmp_path / "small", 1 << 20) as folder:
        path = folder / name
        SAVES[name](path)
        before = path.read_bytes()
        with open(folder / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        with pytest.raises(OSError, match=f"No space left.*{name}"):
            SAVES[name](path)
        assert path.read_bytes() == before
        assert sorted(os.listdir(folder)) == sorted([name, "filler"])
        os.remove(folder / "filler")
        SAVES[name](path)


@pytest.mark.parametrize("name", SAVES)
def test_a_save_that_fails_leaves_the_last_file(name, tmp_path):
    SAVES[name](tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with largest_file(2000), pytest.raises(OSError, match=f"File too large.*{name}"):
        SAVES[name](tmp_path / name)
    assert (tmp_path / name).read_bytes() == before
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", SAVES)
def test_a_read_only_folder_is_named(name, tmp_path):
    with tmpfs(tmp_path / "small", 1 << 20) as folder:
        SAVES[name](folder / name)
        before = (folder / name).read_bytes()
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(OSError, match=f"Read-only file system.*{name}"):
            SAVES[name](folder / name)
        assert (folder / name).read_bytes() == before
        with pytest.raises(OSError, match=r"Read-only file system.*small"):
            check_new_folder(folder)
        with pytest.raises(OSError, match=r"Read-only file system.*small"):
            check_new_file("json", folder / "times.json")


FEW = {"arch": "resnet8", "epochs": 3, "limit": 64, "batch_size": 32, "threads": 1}


def test_a_run_without_room_does_not_start(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"out: no room, \S+ MB are needed and 0.5 MB are free"):
        pretrain(Pretrain(out=tmp_path / "out", **FEW))
    assert "epoch" not in capsys.readouterr().out


@pytest.mark.parametrize("kilobytes", [1500, 1700])
def test_a_run_that_starts_has_room(kilobytes, tmp_path):
    # 307 for the model, twice 627 for its state: the next one is written beside the last.
    with tmpfs(tmp_path / "small", kilobytes << 10) as folder:
        config = Pretrain(out=folder / "out", **FEW | {"epochs": 2})
        if kilobytes == 1500:
            with pytest.raises(OSError, match="no room"):
                pretrain(config)
        else:
            pretrain(config)
            pretrain(Pretrain(out=folder / "out", resume=True, **FEW | {"epochs": 2}))


def test_a_run_that_cannot_write_does_not_start(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    bdf.save(bdf.resnet_cifar(8), tmp_path / "model.safetensors")
    monkeypatch.setattr("train.heuristics.evaluate_test", None)
    out = tmp_path / "file" / "out"
    with pytest.raises(NotADirectoryError, match="out"):
        pretrain(Pretrain(out=out, **FEW))
    with pytest.raises(NotADirectoryError, match="out"):
        heuristics(Heuristics(model=tmp_path / "model.safetensors", keep=1, out=out))


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    pretrain(Pretrain(out=tmp_path / "whole", **FEW))
    save = Run._save

    def full_at_2(run, epoch):
        with largest_file(2000) if epoch == 2 else contextlib.nullcontext():
            save(run, epoch)

    monkeypatch.setattr(Run, "_save", full_at_2)
    with pytest.raises(OSError, match=r"File too large.*model.safetensors"):
        pretrain(Pretrain(out=tmp_path / "full", **FEW))
    monkeypatch.undo()
    assert read_torch(tmp_path / "full" / "state.pt")["epoch"] == 1
    (tmp_path / "full" / ".state.pt.abcdefgh").write_text("of a killed save")
    pretrain(Pretrain(out=tmp_path / "full", resume=True, **FEW))
    whole, full = (read_torch(tmp_path / one / "state.pt")["model"] for one in ("whole", "full"))
    assert all(torch.equal(full[key], whole[key]) for key in whole)
    assert not (tmp_path / "full" / ".state.pt.abcdefgh").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mishap", ["full", "read-only"])
def test_a_disk_that_fails_during_a_run_is_one_line(mishap, tmp_path):
    """Whatever comes to it first: events, the model, metrics or the state."""
    with tmpfs(tmp_path / "small", 4 << 20) as folder:
        command = [sys.executable, "-m", "train", "pretrain", "--out", str(folder / "out")]
        options = {one.replace("_", "-"): value for one, value in FEW.items()} | {"epochs": 1000}
        command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        pipe = subprocess.PIPE
        run = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
        for line in run.stdout:
            if line.startswith("epoch 2:"):
                break
        if mishap == "full":
            with open(folder / "filler", "wb", buffering=0) as filler:
                while run.poll() is None:  # files that are replaced make room
                    with contextlib.suppress(OSError):
                        filler.write(bytes(4096))
        else:
            # Only while nobody writes there.
            remount = ["mount", "-o", "remount,ro", str(folder)]
            while subprocess.run(remount, stderr=subprocess.DEVNULL).returncode:
                time.sleep(0.01)
        _, printed = run.communicate(timeout=120)
        assert run.returncode == 1
        said = [one for one in printed.splitlines() if one and not one.startswith("epoch ")]
        assert len(said) == 1, printed
        assert re.match(r"pretrain: .*(No space left|Read-only).*/small/out/", said[0])
        assert read_torch(folder / "out" / "state.pt")["epoch"] >= 1


def test_a_damaged_checkpoint_of_a_run_is_named(tmp_path):
    pretrain(Pretrain(out=tmp_path, **FEW | {"epochs": 1}))
    path = tmp_path / "state.pt"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    config = Pretrain(out=tmp_path, resume=True, **FEW | {"epochs": 1})
    with pytest.raises(ValueError, match=r"state.pt: cannot be read"):
        pretrain(config)
    write_torch({"epoch": 1}, path)
    with pytest.raises(ValueError, match=r"state.pt is not the checkpoint of a run"):
        pretrain(config)
