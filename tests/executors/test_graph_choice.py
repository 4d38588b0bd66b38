"""Which graph runs a batch: by what it takes as known, and how seldom one is recorded."""

from __future__ import annotations

import random

import pytest
import torch

from blockdrop_fast.executors import graph_choice
from blockdrop_fast.executors.graph_choice import (
    MOST_GRAPHS,
    UNIVERSAL,
    GraphChoice,
    Way,
    ways_by_count,
)
from blockdrop_fast.measure.published import published_decisions

N, S, M, A = Way.NONE, Way.SOME, Way.MASKED, Way.ALL
SERVED = {N: {N}, S: {N, S, M, A}, M: {M, A}, A: {A}}


def pattern(*ways: Way) -> int:
    return int.from_bytes(bytes(ways), "little")


@pytest.mark.parametrize(
    ("batch", "dense_from", "ways"),
    [
        (1, 2.0, [N, A]),
        (4, 2.0, [N, S, S, S, A]),
        (4, 0.75, [N, S, S, M, A]),
        (4, 0.7, [N, S, S, M, A]),
        (4, 0.0, [N, M, M, M, A]),
    ],
)
def test_way_of_each_count(batch, dense_from, ways):
    assert list(ways_by_count(batch, dense_from)) == ways


@pytest.mark.parametrize("way", Way)
def test_what_a_way_serves(way):
    choice = GraphChoice(1, 1)
    choice.graphs = (way, UNIVERSAL)
    assert {own for own in Way if choice.choose(own) == way} == SERVED[way]


def test_fewest_gather_then_fewest_are_masked(monkeypatch):
    monkeypatch.setattr(graph_choice, "RECORDING_US", 0)
    choice = GraphChoice(3, 1)
    for ways in [(N, S, S), (N, M, S), (N, A, S)]:
        choice.choose(pattern(*ways))
        assert choice.choose(pattern(*ways)) in (pattern(*ways), pattern(N, M, S))
    choice.graphs = tuple(pattern(*ways) for ways in [(N, A, S), (N, M, S), (N, S, S), (S, S, S)])
    assert choice.choose(pattern(N, A, A)) == pattern(N, A, S)
    assert choice.choose(pattern(N, M, A)) == pattern(N, M, S)
    assert choice.choose(pattern(A, A, A)) == UNIVERSAL


@pytest.mark.parametrize(("rows", "calls"), [(1, 271), (64, 100), (1024, 10)])
def test_a_graph_as_soon_as_it_would_have_paid(rows, calls):
    """10 ms, at 6 us a block of one row and another 1/6 us for each row."""
    choice, ways = GraphChoice(10, rows), pattern(*[N] * 6, *[S] * 4)
    assert {choice.choose(ways) for _ in range(calls)} == {UNIVERSAL}
    assert choice.choose(ways) == ways


def test_a_graph_of_what_batches_have_in_common():
    """No pattern comes often enough for a graph of its own."""
    generator, choice = random.Random(0), GraphChoice(40, 1)
    for _ in range(1000):
        chosen = choice.choose(pattern(*[A] * 10, *generator.choices((N, A), k=30)))
    assert chosen == pattern(*[A] * 10, *[S] * 30)


def test_the_least_used_graph_goes(monkeypatch):
    monkeypatch.setattr(graph_choice, "RECORDING_US", 0)
    choice = GraphChoice(5, 1)
    several = [pattern(*[S] * k, N, *[S] * (4 - k)) for k in range(5)]
    for ways in several[:4]:
        choice.choose(ways)
    assert {*choice.graphs} == {*several[:4], UNIVERSAL}
    for ways in (several[0], several[2], several[3], several[4]):
        choice.choose(ways)
    assert {*choice.graphs} == {*several, UNIVERSAL} - {several[1]}


def simulate(decisions, batch, calls, dense_from=2.0):
    """Choose for batches of images drawn at random.

    Returns:
        recorded: the calls after which there was another graph.
        in_vain: for each call, how many blocks gathered that need not.
    """
    generator = torch.Generator().manual_seed(0)
    choice, table = GraphChoice(decisions.shape[1], batch), ways_by_count(batch, dense_from)
    recorded, in_vain = [], []
    for call in range(calls):
        rows = torch.randint(len(decisions), (batch,), generator=generator)
        ways = [table[count] for count in decisions[rows].sum(0).tolist()]
        graphs = choice.graphs
        chosen = choice.choose(pattern(*ways))
        assert chosen in graphs  # nothing runs without a graph
        graph = chosen.to_bytes(len(ways), "little")
        assert all(own in SERVED[way] for way, own in zip(graph, ways, strict=True))
        in_vain.append(sum(way == S != own for way, own in zip(graph, ways, strict=True)))
        recorded += [call] * len({*choice.graphs} - {*graphs})
        assert len(choice.graphs) <= MOST_GRAPHS + 1
    return recorded, in_vain


@pytest.mark.parametrize("dense_from", [2.0, 0.75])
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("network", ["resnet101", "resnet110"])  # 10 policies, 469 policies
def test_few_graphs_are_recorded(network, batch, dense_from):
    recorded, in_vain = simulate(published_decisions(network), batch, 3000, dense_from)
    for start in (1000, 2000):
        assert sum(start <= call < start + 1000 for call in recorded) <= 10
    if network == "resnet101":
        # One graph of what all ten policies share; the universal one alone would be at 26 or more.
        assert sum(in_vain[1000:]) <= 8 * 2000
