"""Atomic writes: whole or not at all, with ordinary permissions."""

import os

import pytest

from blockdrop_fast.files import atomic_write


def test_writes_and_replaces(tmp_path):
    target = tmp_path / "file"
    for text in ("first", "second"):
        with atomic_write(target) as path:
            path.write_text(text)
        assert target.read_text() == text
    assert os.listdir(tmp_path) == ["file"]


def test_a_failure_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def fail():
        with atomic_write(target) as path:
            path.write_text("half")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_permissions_are_those_of_a_plain_open(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic_write(tmp_path / "atomic") as path:
        path.write_text("")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_write(tmp_path / "link") as path:
        path.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "nowhere" / "file"):
        pass
