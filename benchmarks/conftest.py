"""What the benchmarks share: the quick form, groups timed round-robin, and how samples get from
there into pytest-benchmark."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import blockdrop_fast.machine

# For `train`, which is not installed. Appended, so that an installed blockdrop_fast stays first.
sys.path.append(str(Path(__file__).resolve().parents[1]))


class ReplayClock:
    """A timer that tells recorded durations again.

    Contenders are timed together, round-robin, before the first of them is reported; then each
    benchmark replays its own samples: pytest-benchmark reads this clock before and after a call
    that only moves the clock on by one sample.
    """

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def replay(self, samples: Sequence[float]) -> Callable[[], None]:
        """A function that takes, by this clock, the next sample at each call."""
        remaining: Iterator[float] = iter(samples)

        def move() -> None:
            self._now += next(remaining)

        return move


CLOCK = ReplayClock()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="three minutes on two cores: fewer repeats and cases, no torch.compile",
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    if "report" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["blockdrop_fast"] = blockdrop_fast.machine.machine_info()


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether the quick form was asked for."""
    return request.config.getoption("--quick")


@pytest.fixture(scope="module")
def once() -> Callable:
    """``once(key, make)``: what ``make()`` returned, or raised, when the module first asked for it.

    The benchmarks of a group share one round-robin measurement.
    """
    outcomes: dict = {}

    def get(key, make: Callable):
        if key not in outcomes:
            try:
                outcomes[key] = (make(), None)
            except Exception as error:
                outcomes[key] = (None, error)
        value, error = outcomes[key]
        if error is not None:
            raise error
        return value

    return get


@pytest.fixture(scope="session")
def machine() -> dict:
    """The machine as it was when the benchmarks started."""
    return blockdrop_fast.machine.machine_info()


@pytest.fixture
def report(benchmark, machine: dict) -> Callable:
    """``report(samples, **extra_info)``: hand recorded samples to pytest-benchmark."""

    def hand_over(samples: Sequence[float], **extra_info: object) -> None:
        benchmark.extra_info |= extra_info | {"machine": machine}
        benchmark.pedantic(CLOCK.replay(samples), rounds=len(samples), iterations=1)

    return hand_over
