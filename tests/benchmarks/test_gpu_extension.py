"""Which compiled extension `make gpu` takes (.ci/gpu_extension.py), without a GPU."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from blockdrop_fast._extension import extension_status

ROOT = Path(__file__).resolve().parents[2]
BUILT_FOR = ("2.11.0+cu130", "9.0a", "abc")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """With folders of its own; an extension there loads as `loads` says."""
    names = runpy.run_path(str(ROOT / ".ci" / "gpu_extension.py"))
    inner = names["place"].__globals__
    inner["really_loaded"] = inner["why_not_loaded"]
    inner.update(ROOT=tmp_path, PACKAGE=tmp_path / "package", BROUGHT=tmp_path / "brought")
    inner["why_not_loaded"] = lambda: inner.get("loads", "")
    (tmp_path / "package").mkdir()
    return SimpleNamespace(**names, inner=inner, tmp_path=tmp_path)


def put(module, folder: str, **record: str) -> Path:
    path = module.tmp_path / folder
    path.mkdir(exist_ok=True)
    (path / module.LIBRARY).write_text(folder)
    content = {"torch": "2.11.0", "cuda_sources": "abc", "cuda_archs": "8.0+PTX;9.0a", **record}
    (path / module.RECORD).write_text(json.dumps(content))
    return path


def in_place(module) -> str:
    path = module.tmp_path / "package" / module.LIBRARY
    return path.read_text() if path.exists() else ""


def test_what_is_in_place_stays_if_it_fits(module, capsys):
    put(module, "package")
    put(module, "brought")
    assert module.place(*BUILT_FOR)
    assert in_place(module) == "package"


def test_what_was_brought_along_is_taken(module, capsys):
    put(module, "package", cuda_sources="older")
    put(module, "brought")
    assert module.place(*BUILT_FOR)
    assert in_place(module) == "brought"
    assert "gpu-build: took brought" in capsys.readouterr().err


def test_with_neither_it_has_to_be_compiled(module, capsys):
    assert not module.place(*BUILT_FOR)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"torch": "2.10.1+cu128"}, "it was built for torch 2.10.1+cu128, here is 2.11.0+cu130"),
        ({"cuda_sources": "other"}, "it was built from other CUDA sources"),
        ({"cuda_archs": "8.0;8.6+PTX"}, "it was built for 8.0 8.6, this GPU is 9.0a"),
        ({"cuda_archs": None}, "does not say what it was built for"),
    ],
)
def test_what_does_not_fit_is_not_taken(module, capsys, record, why):
    put(module, "brought", **record)
    assert not module.place(*BUILT_FOR)
    assert in_place(module) == ""
    assert why in capsys.readouterr().err


def test_an_extension_of_another_python_is_not_taken(module, capsys):
    path = put(module, "brought")
    (path / module.LIBRARY).rename(path / "_C.cpython-27-x86_64-linux-gnu.so")
    assert not module.place(*BUILT_FOR)
    expected = f"expected {module.LIBRARY}, found _C.cpython-27-x86_64-linux-gnu.so"
    assert expected in capsys.readouterr().err


def test_what_does_not_load_is_taken_away_again(module, capsys):
    put(module, "brought")
    module.inner["loads"] = "GLIBC_2.99 not found"
    assert not module.place(*BUILT_FOR)
    assert in_place(module) == ""
    assert "brought does not fit, compiling: GLIBC_2.99 not found" in capsys.readouterr().err


@pytest.mark.slow
def test_a_build_without_cuda_kernels_is_none(module):
    """The one that these tests run with."""
    if extension_status().build_info.get("cuda"):
        pytest.skip("it has CUDA kernels")
    module.inner["ROOT"] = ROOT
    assert module.inner["really_loaded"]() in ("no CUDA kernels", extension_status().reason)


def test_setup_records_what_an_extension_was_built_for(module, monkeypatch, tmp_path):
    setup = runpy.run_path(str(ROOT / "setup.py"))
    inner = setup["choose_build"].__globals__
    monkeypatch.setitem(inner, "why_no_cuda", lambda *_: "")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 9.0a")
    monkeypatch.setenv("BLOCKDROP_BUILD", "auto")
    choice = inner["choose_build"]()
    choice.write(tmp_path)
    (tmp_path / module.LIBRARY).touch()
    built_for = (choice.torch, "9.0a", inner["hash_cuda_sources"]())
    assert module.why_not(tmp_path, *built_for) == ""
