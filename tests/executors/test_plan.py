"""Plans of several decision sets: as few rows as there are prefixes, and forks that are right."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blockdrop_fast.executors.plan import plan, plan_sets


def naive_live_rows(decisions: torch.Tensor) -> list[int]:
    """Rows that block k runs on, for each k: one for each different prefix of an image.

    ``decisions`` (S, B, K). The prefixes of an image are the nodes of a trie of its S sets.
    """
    sets, batch, num_blocks = decisions.shape
    values = decisions.tolist()
    return [
        sum(len({tuple(values[s][b][: k + 1]) for s in range(sets)}) for b in range(batch))
        for k in range(num_blocks)
    ]


def execute(planned, batch: int, num_blocks: int) -> list[tuple]:
    """What an executor does with the plan: (image, blocks decided so far) of each final row."""
    rows = [(image, ()) for image in range(batch)]
    for k in range(num_blocks):
        rows += [rows[parent] for parent in planned.fork_parents[k].tolist()]
        active = set(planned.plan.active(k).tolist())
        assert max(active, default=-1) < len(rows), "a row is active before it exists"
        rows = [(image, (*done, row in active)) for row, (image, done) in enumerate(rows)]
    return rows


def check(decisions: torch.Tensor) -> None:
    sets, batch, num_blocks = decisions.shape
    before = decisions.clone()
    planned = plan_sets(decisions)
    assert torch.equal(decisions, before)
    live = naive_live_rows(decisions)
    assert len(planned.fork_parents) == num_blocks
    assert planned.rows.shape == (sets, batch)
    assert planned.rows.dtype == torch.int64
    # As many rows as there are different prefixes, at each block.
    forks = torch.tensor([parents.numel() for parents in planned.fork_parents])
    assert (batch + forks.cumsum(0)).tolist() == live
    assert planned.plan.decisions.shape == (live[-1], num_blocks)
    # And each set of each image arrives at the row that took its decisions.
    final = execute(planned, batch, num_blocks)
    for s, row in enumerate(planned.rows.tolist()):
        assert [final[number] for number in row] == [
            (image, tuple(decisions[s, image].tolist())) for image in range(batch)
        ]
    assert planned.rows[0].tolist() == list(range(batch))


@st.composite
def decision_sets(draw) -> torch.Tensor:
    """(S, B, K) decisions; a set follows an earlier one up to a block that each image draws."""
    sets, batch = draw(st.integers(1, 6)), draw(st.integers(0, 5))
    num_blocks = draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    keep = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    decisions = torch.rand(sets, batch, num_blocks, generator=generator) < keep
    for s in range(1, sets):
        earlier = decisions[draw(st.integers(0, s - 1))]
        fork = torch.randint(0, num_blocks + 1, (batch, 1), generator=generator)
        decisions[s] = torch.where(torch.arange(num_blocks) < fork, earlier, decisions[s])
    return decisions


@settings(max_examples=150, deadline=None)
@given(decision_sets())
@example(torch.zeros(4, 3, 5, dtype=torch.bool))
@example(torch.eye(5, dtype=torch.bool)[:, None])
def test_random_sets(decisions):
    check(decisions)


def test_all_sets_there_are():
    """Every decision of four blocks as a set, in an order that shares prefixes with any before."""
    every = torch.cartesian_prod(*[torch.tensor([False, True])] * 4)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    decisions = torch.stack([every[order], every.flip(0)], dim=1)
    check(decisions)
    assert naive_live_rows(decisions) == [4, 8, 16, 32]


def test_one_set_is_the_plan_of_a_batch():
    decisions = torch.rand(1, 7, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    planned, alone = plan_sets(decisions), plan(decisions[0])
    assert torch.equal(planned.plan.decisions, decisions[0])
    assert torch.equal(planned.plan.indices, alone.indices)
    assert torch.equal(planned.plan.counts, alone.counts)
    assert all(parents.numel() == 0 for parents in planned.fork_parents)


def test_many_blocks():
    """ResNet-1202 has 600 blocks: nothing is a 64-bit mask."""
    decisions = torch.rand(3, 4, 600, generator=torch.Generator().manual_seed(0)) < 0.5
    decisions[1, :, :599] = decisions[0, :, :599]
    decisions[1, :, 599] = ~decisions[0, :, 599]
    check(decisions)


def test_sets_from_elsewhere():
    """Decisions that are views of something else, in any order of strides."""
    wide = torch.rand(6, 4, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    check(wide.permute(1, 2, 0)[::2, :7])
