"""Timing contenders round-robin, right logits first."""

from __future__ import annotations

import contextlib
import time
from collections import Counter

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.measure import timing
from blockdrop_fast.measure.tolerance import WrongLogitsError
from blockdrop_fast.measure.workload import fit_policy


def test_interleave_is_round_robin_with_one_sample_a_round():
    order = []
    calls = {name: lambda index, name=name: order.append((name, index)) for name in "abc"}
    samples = timing.interleave(calls, rounds=3, warmup=0)
    # Quick calls get an untimed call of their own before each timed one.
    assert order == [(name, index) for index in range(3) for name in "abc" for _ in range(2)]
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys("abc", 3)


def test_interleave_warms_up_and_goes_on_for_the_minimal_time():
    seen = []
    samples = timing.interleave({"a": seen.append}, rounds=1, min_seconds=0.02, warmup=2)
    assert seen[:2] == [0, 1]
    assert len(samples["a"]) > 1
    assert sum(samples["a"]) <= 0.03 + samples["a"][-1]


def test_interleave_measures_seconds():
    samples = timing.interleave({"a": lambda _: time.sleep(0.02)}, rounds=2, warmup=0)
    assert all(0.02 <= value < 2 for value in samples["a"])


def test_interleave_needs_a_round():
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        timing.interleave({}, rounds=0)


@pytest.mark.parametrize("kind", ["baseline", "blockdrop"])
@pytest.mark.parametrize("fault", ["other decisions", "nan", "shape"])
def test_a_wrong_contender_is_not_timed(workload, kind, fault):
    timed = []

    def wrong(images, keep):
        timed.append(len(images))
        other = ~keep if kind == "blockdrop" else keep
        logits = workload.model.backbone(images, other)
        if fault == "nan":
            logits[0, 0] = float("nan")
        return logits[:, :-1] if fault == "shape" else logits

    batches = timing.chunks(32, workload.images, workload.decisions)
    with pytest.raises(WrongLogitsError, match=r"^wrong: "):
        timing.time_contenders(
            [timing.Contender("wrong", wrong, kind)],
            batches,
            workload.all_kept,
            workload.at_decisions,
        )
    assert timed == [32, 32]


def test_a_failure_may_be_swallowed(workload):
    def right(images, _):
        return workload.model.backbone(images)

    calls = {"wrong": lambda images, _: right(images, _) + 1, "right": right}
    contenders = [timing.Contender(name, call, "baseline") for name, call in calls.items()]
    failed = {}

    @contextlib.contextmanager
    def attempt(name):
        try:
            yield
        except WrongLogitsError as error:
            failed[name] = str(error)

    timed = timing.time_contenders(
        contenders,
        timing.chunks(32, workload.images, workload.decisions),
        *(workload.all_kept, workload.at_decisions),
        rounds=1,
        attempt=attempt,
    )
    assert list(timed.samples) == ["right"]
    assert failed["wrong"].startswith("wrong: ")


def test_captures_of_graphs_are_not_timed(workload, monkeypatch):
    """A graph is recorded when a batch has been seen often enough, here at its fifth call."""
    events, seen = [], Counter()

    def call(images, _):
        seen[images.data_ptr()] += 1
        events.append("capture" if seen[images.data_ptr()] == 5 else "call")
        return workload.model.backbone(images)

    def stopwatch(run, index):
        events.append("timed")
        run(index)
        return 1.0

    monkeypatch.setattr(timing, "WARM_CALLS", {"cpu": 64})
    monkeypatch.setattr(timing, "_host_stopwatch", stopwatch)
    batches = timing.chunks(8, workload.images, workload.decisions)
    contender = timing.Contender("records", call, "baseline")
    timing.time_contenders(
        [contender], batches, workload.all_kept, workload.at_decisions, rounds=15
    )
    assert events.count("capture") == 8
    assert "capture" not in events[events.index("timed") :]


def test_warming_up_ends_in_time(monkeypatch):
    monkeypatch.setattr(timing, "WARM_CALLS", {"cpu": 1000})
    monkeypatch.setattr(timing, "WARM_SECONDS", 0.01)
    called = []
    timing._warm_up(lambda index: (called.append(index), time.sleep(0.01)), 3, torch.device("cpu"))
    assert called == list(range(6))


@pytest.mark.parametrize("fault", ["decisions", "logits", "shape"])
def test_a_contender_that_decides_wrongly_is_not_timed(workload, fault):
    def call(images, _):
        logits, keep = workload.model(images)
        if fault == "decisions":
            keep = torch.zeros_like(keep)  # the fastest ones there are
            logits = workload.model.backbone(images, keep)
        if fault == "shape":
            keep = keep[:, 1:]
        return bdf.Output(logits + (fault == "logits"), keep)

    workload = fit_policy(workload)
    assert workload.policy_logits.logits.max() > workload.policy_logits.tolerance
    batches = timing.chunks(64, workload.images, workload.decisions)
    with pytest.raises(WrongLogitsError, match=r"^wrong: "):
        timing.time_contenders(
            [timing.Contender("wrong", call, "decides")],
            batches,
            workload.all_kept,
            workload.at_decisions,
            workload.check_own,
        )


def test_contender_names_are_unique(workload):
    right = timing.Contender("one", lambda images, _: workload.model.backbone(images), "baseline")
    batches = timing.chunks(64, workload.images, workload.decisions)
    with pytest.raises(ValueError, match="two are called 'one'"):
        timing.time_contenders(
            [right, right], batches, workload.all_kept, workload.at_decisions, rounds=1
        )


def test_chunks_are_whole_batches():
    values = torch.arange(6)
    assert [part.tolist() for (part,) in timing.chunks(2, values)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="divisor of the 6 images, got 4"):
        timing.chunks(4, values)


@pytest.mark.parametrize("host", [False, True])
def test_gpu_stopwatch_leaves_the_head_start_out(fake_cuda, host):
    stopwatch = timing._CudaStopwatch(torch.device("cpu"), host)
    took = stopwatch(lambda index: time.sleep(index), 0.01)
    assert 0.01 <= took < 1
    short = min(stopwatch(lambda _: None, 0) for _ in range(5))
    assert short < timing.HEAD_START_SECONDS
