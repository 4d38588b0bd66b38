"""Records of GPUs that our kernels have passed on, and what ``auto`` makes of them, without one."""

from __future__ import annotations

import json
import types

import pytest
import torch

from blockdrop_fast.commands import info
from blockdrop_fast.executors import choice, measured, proven
from blockdrop_fast.executors.crossover import Cell, Crossover

GPU = "NVIDIA H200"
WINS, LOSES = {"dense": 3.0, "gather": 2.0, "walk": 1.0}, {"dense": 1.0, "gather": 2.0, "walk": 3.0}


def table(**seconds) -> Crossover:
    """Cells by batch size, as b1, b64."""
    cells = [Cell(int(name[1:]), 0.5, value) for name, value in seconds.items()]
    return Crossover(tuple(cells), "a test")


@pytest.fixture(autouse=True)
def gpu(tmp_path, monkeypatch):
    """One made-up GPU, a build with CUDA kernels, and no records but those of the test."""
    monkeypatch.setenv(measured.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "PACKAGED", tmp_path / "gpus")
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    found = types.SimpleNamespace(name=GPU, capability=(9, 0), kernels="abc")
    monkeypatch.setattr(proven, "kernels_hash", lambda: found.kernels)
    monkeypatch.setattr(proven, "machine_info", lambda device: {"driver": "580"})
    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: found.name,
        "get_device_capability": lambda device=None: found.capability,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    proven._load.cache_clear()
    return found


def test_without_a_record_nothing_is_proven():
    proof = proven.load("cuda")
    assert not proof.strategies
    assert proof.reason == f"our kernels have not passed `make gpu-check` on an {GPU}"


def test_a_record_holds_for_this_gpu_these_sources_and_this_torch(gpu, monkeypatch):
    path = proven.save(["walk", "gather"])
    assert path == measured.user_file(proven.FILE_NAME)
    assert json.loads(path.read_text())["entries"][0]["machine"] == {"driver": "580"}
    proof = proven.load("cuda")
    assert proof.strategies == {"walk", "gather"}
    assert proof.reason.startswith(f"walk and gather passed ({path}, ")
    monkeypatch.setattr(torch, "__version__", "2.11.1")
    assert proven.load("cuda").strategies
    monkeypatch.setattr(torch, "__version__", "2.12.0")
    assert not proven.load("cuda").strategies
    assert "with torch 2.11.0+cu130 (" in proven.load("cuda").reason
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    gpu.name = "NVIDIA B200"
    assert f"not passed `make gpu-check` on an {gpu.name}" in proven.load("cuda").reason
    proven.save(["walk"])
    gpu.name = GPU
    assert proven.load("cuda").strategies == {"walk", "gather"}
    gpu.kernels = "def"
    assert not proven.load("cuda").strategies
    assert "kernels have changed since they passed" in proven.load("cuda").reason
    gpu.kernels = ""
    assert proven.load("cuda").reason == "the extension was built without CUDA kernels"
    with pytest.raises(ValueError, match="without CUDA kernels"):
        proven.save(["walk"])


def test_a_failed_check_withdraws_the_record():
    proven.save(["walk"])
    proven.save([])
    assert not proven.load("cuda").strategies
    assert f"did not pass on an {GPU}" in proven.load("cuda").reason
    with pytest.raises(ValueError, match=r"strategies: expected some of .*got \['dense'\]"):
        proven.save(["dense"])


def test_records_come_with_the_package(gpu):
    path = proven.save(["walk"], path=measured.PACKAGED / "nvidia-h200" / proven.FILE_NAME)
    assert proven.load("cuda").strategies == {"walk"}
    assert str(path) in proven.load("cuda").reason
    # A stale one of the user's own does not hide it.
    own = measured.user_file(proven.FILE_NAME)
    gpu.kernels = "older"
    proven.save(["walk", "gather"], path=own)
    gpu.kernels = "abc"
    assert proven.load("cuda").strategies == {"walk"}


def test_a_file_that_is_none_is_warned_of():
    path = measured.user_file(proven.FILE_NAME)
    path.parent.mkdir(parents=True)
    path.write_text('{"format": "something else"}')
    with pytest.warns(UserWarning, match=r"proven\.json is no file of the format"):
        assert not proven.load("cuda").strategies
    with pytest.warns(UserWarning, match=r"proven\.json is no file of the format"):
        proven.save(["walk"])
    assert path.with_name("proven.json.unreadable").exists()


def test_the_hash_is_of_cuda_and_python_sources(monkeypatch):
    monkeypatch.undo()
    compute = proven.kernels_hash.__wrapped__
    monkeypatch.setattr(proven, "build_record", lambda: {"torch": "2.11.0"})
    assert compute() == ""
    monkeypatch.setattr(proven, "build_record", lambda: {"cuda_sources": "1"})
    first = compute()
    assert len(first) == 64
    monkeypatch.setattr(proven, "build_record", lambda: {"cuda_sources": "2"})
    assert compute() != first
    monkeypatch.setattr(proven, "PYTHON_SOURCES", proven.PYTHON_SOURCES[1:])
    assert compute() != first


# ------------------------------------------------------------------ what auto makes of it


@pytest.fixture
def choose(monkeypatch):
    """``choose`` for a network on the made-up GPU; executors are their names."""
    monkeypatch.setattr(choice, "GatherExecutor", lambda network: "plain")
    monkeypatch.setattr(choice, "_find_walk", lambda network: ("walk", "one launch"))
    monkeypatch.setattr(choice, "_make_gather", lambda *_: ("gather", " (measured: a test)"))
    weight = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16)
    network = types.SimpleNamespace(stem=types.SimpleNamespace(weight=weight))
    return lambda table=None: choice.choose(network, "auto", "counts", table)


def test_auto_is_plain_pytorch_without_record_or_table(choose):
    found = choose(table(b1=WINS))
    assert found.executor == "plain"
    assert found.reason.startswith("plain PyTorch, because our kernels have not passed")
    assert "ask for our kernels" in found.reason
    proven.save(["walk", "gather"])
    found = choose()
    assert found.executor == "plain"
    assert "was not measured here: `blockdrop benchmark --calibrate`" in found.reason


def test_auto_goes_by_the_table_where_the_kernels_have_passed(choose):
    proven.save(["walk", "gather"])
    found = choose(table(b1=WINS, b64=WINS))
    assert (found.executor, found.where_walk_loses) == ("walk", None)
    assert "walk and gather passed" in found.reason
    found = choose(table(b1=WINS, b64=LOSES))
    assert [found.for_batch(1), found.for_batch(64)] == ["walk", "gather"]
    assert choose(table(b1=LOSES)).executor == "gather"
    assert choose(table(b1={"dense": 1.0, "gather": 2.0})).executor == "gather"


def test_auto_takes_only_what_has_passed(choose):
    proven.save(["walk"])
    found = choose(table(b1=WINS, b64=LOSES))
    assert [found.for_batch(1), found.for_batch(64)] == ["walk", "plain"]
    proven.save(["gather"])
    found = choose(table(b1=WINS))
    assert found.executor == "gather"
    assert "the walk has not passed its tests here" in found.reason


def test_info_shows_what_auto_does(monkeypatch):
    monkeypatch.setattr(info.triton_kernels, "why_not", lambda device=None: "")
    assert "strategy='auto' is plain PyTorch: our kernels have not passed" in info.format_info()
    proven.save(["walk"])
    (device,) = info.info()["devices"]
    assert device["proven"] == ["walk"]
    assert "takes what was measured to be fastest: walk passed (" in info.format_info()
