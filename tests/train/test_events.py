"""What TensorBoard reads of the events that are written."""

import threading

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.events import Events


def shown(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(one.step, one.value) for one in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_a_resumed_run_replaces_what_was_logged_after_its_checkpoint(tmp_path):
    first = Events(tmp_path, 1)
    assert not list(tmp_path.iterdir())
    for epoch in (1, 2, 3):
        first.add({"loss": epoch / 2, "accuracy": 0.25 * epoch}, epoch)
    resumed = Events(tmp_path, 3)
    resumed.add({"loss": 7.0, "accuracy": 1}, 3)
    assert shown(tmp_path) == {
        "loss": [(1, 0.5), (2, 1.0), (3, 7.0)],
        "accuracy": [(1, 0.25), (2, 0.5), (3, 1.0)],
    }


def test_what_cannot_be_written_is_named_and_no_thread_left(tmp_path):
    events, threads = Events(tmp_path / "run", 1), threading.active_count()
    with pytest.raises(FileNotFoundError, match=r"run/events\.out\.tfevents\."):
        events.add({"loss": 0.5}, 1)
    (tmp_path / "run").mkdir()
    events.add({"loss": 0.5}, 2)
    assert shown(tmp_path / "run") == {"loss": [(2, 0.5)]}
    assert threading.active_count() == threads
