"""Atomic writes: whole or not at all, with ordinary permissions."""

import os
import signal
from contextlib import contextmanager

import pytest

from blockdrop_fast.files import atomic_write, check_new_file, remove_leftovers


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


@contextmanager
def killed_at_the_end(target):
    """Meanwhile a process writes the file, and does not get to the end of it."""
    seen, tell = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            with atomic_write(target) as path:
                path.write_text("half")
                os.write(tell, b".")
                signal.pause()
        finally:
            os._exit(1)
    try:
        os.read(seen, 1)
        yield
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(seen)
        os.close(tell)


def test_what_a_killed_write_leaves_goes_with_the_next(tmp_path):
    target = tmp_path / "file"
    with killed_at_the_end(target):
        pass
    (begun,) = os.listdir(tmp_path)
    assert begun.startswith(".file.")
    with atomic_write(target) as path:
        path.write_text("whole")
    assert os.listdir(tmp_path) == ["file"]


def test_what_another_process_is_writing_stays(tmp_path):
    target = tmp_path / "file"
    with killed_at_the_end(target):
        (begun,) = os.listdir(tmp_path)
        with atomic_write(target) as path:
            path.write_text("whole")
        remove_leftovers(target)
        assert sorted(os.listdir(tmp_path)) == sorted([begun, "file"])
    remove_leftovers(target)
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


def test_a_folder_is_no_new_file(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"json: .* is a folder, expected a file's name"):
        check_new_file("json", tmp_path)
