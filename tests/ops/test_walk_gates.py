"""Walks that decide on the way: against gates at float64, their references, and themselves."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from blockdrop_fast.executors.walk import WalkExecutor
from blockdrop_fast.networks.folding import fold_network
from blockdrop_fast.ops.walk import unpack, walk
from blockdrop_fast.ops.walk_gates import (
    pack_gates,
    walk_halting,
    walk_halting_reference,
    walk_sequential,
    walk_sequential_reference,
    walk_weighted,
    walk_weighted_reference,
)
from blockdrop_fast.ops.walk_network import ReferenceNetwork
from tests.ops.walk_checks import compiled
from tests.random_networks import make_cifar_network, make_gated_model, random_decisions

WIDTHS = (16, 32, 64)
EPSILON = 0.01
# What rounding cannot do to what a gate computes from features of order one: closer to its
# threshold an image may go either way.
CLEAR = 1e-3


class Case:
    """A network in float32 and float64, images, and gates that treat them unlike.

    ``kind`` of gates: "some" fire; "never" and "always" say when.
    """

    def __init__(self, layers=(2, 1, 3), shortcut="average_pool", num_classes=10, size=(8, 12),
                 batch=6, seed=0, kind="some"):  # fmt: skip
        module = make_cifar_network(layers, shortcut, num_classes, seed)
        self.layers, self.num_blocks, self.kind = layers, sum(layers), kind
        self.generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(batch, 3, *size, generator=self.generator)
        rest = (layers, num_classes, shortcut == "subsample")
        self.network, self.exact = (
            (WalkExecutor.pack(fold_network(module, dtype)), *rest)
            for dtype in (torch.float32, torch.float64)
        )
        self.outputs = [width for width, n in zip(WIDTHS, layers, strict=True) for _ in range(n)]
        self.inputs = [WIDTHS[0], *self.outputs[:-1]]
        self.segments = torch.tensor(range(self.num_blocks)).split(list(layers))
        self.decisions = random_decisions(self.generator, batch, self.num_blocks)
        self.shares = torch.randn(batch, self.num_blocks, generator=self.generator)
        self.before, self.behind = self._gates(self.inputs), self._gates(self.outputs)

    def _gates(self, channels: list[int]) -> Tensor:
        """(K, 65) gates of so many channels each."""
        bias = {"never": -math.inf, "always": math.inf, "some": 0.0}[self.kind]
        weights = (2 * torch.randn(count, generator=self.generator) for count in channels)
        return pack_gates(list(weights), [bias] * self.num_blocks)

    def run(self, name: str, rows=slice(None), images: Tensor | None = None) -> tuple[Tensor, ...]:
        """What an operator gives for some of the images."""
        images = (self.images if images is None else images)[rows]
        if name == "sequential":
            return walk_sequential(images, *self.network, self.before)
        if name == "weighted":
            given = (self.decisions[rows], self.shares[rows])
            return (walk_weighted(images, *given, *self.network),)
        return walk_halting(images, *self.network, self.behind, EPSILON, name == "halting hard")

    def on_the_way(
        self, decisions: Tensor, shares: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """In float64, of each block at given decisions: its input and output, both pooled."""
        weights, layers, num_classes, subsample = self.exact
        parameters = list(unpack(weights, layers, num_classes))
        network = ReferenceNetwork(parameters, layers, subsample, torch.float64)
        x, found = network.stem(self.images.double()), []
        for segment in self.segments:
            given = 0.0
            for block in segment:
                before, x = x, network.run_block(int(block), x, decisions[:, block])
                found.append((network.pooled(before), network.pooled(x)))
                if shares is not None:
                    given = given + shares[:, block, None, None, None] * x
            x = x if shares is None else given
        return found


OPERATORS = ("sequential", "halting", "halting hard", "weighted")
cases = st.builds(
    Case,
    layers=st.tuples(*[st.integers(1, 3)] * 3),
    shortcut=st.sampled_from(["average_pool", "subsample"]),
    num_classes=st.sampled_from([1, 2, 10, 17]),
    size=st.tuples(*[st.sampled_from([4, 8, 12, 20, 36])] * 2),
    batch=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["some", "some", "never", "always"]),
)
quick = settings(max_examples=15, deadline=None)


def logit(gate: Tensor, pooled: Tensor) -> Tensor:
    """(65,) gate in float32, (B, C) float64 features -> (B,) float64."""
    return pooled @ gate[1 : 1 + pooled.shape[1]].double() + gate[0]


def assert_decided(decided: Tensor, distance: Tensor) -> None:
    """Decided by the sign of a float64 distance to the threshold, unless that is close."""
    clear = distance.abs() > CLEAR
    assert torch.equal(decided[clear], distance[clear] >= 0)


def assert_close(actual: Tensor, exact: Tensor) -> None:
    """Values of order one, after a few blocks in float32."""
    torch.testing.assert_close(actual.double(), exact.double(), rtol=1e-4, atol=1e-4)


@quick
@given(case=cases, threads=st.integers(1, 3))
def test_sequential_gates(case, threads):
    torch.set_num_threads(threads)
    logits, decisions = case.run("sequential")
    assert torch.equal(logits, walk(case.images, decisions, *case.network))
    for block, (pooled, _) in enumerate(case.on_the_way(decisions)):
        assert_decided(decisions[:, block], logit(case.before[block], pooled))
    if case.kind != "some":
        assert decisions.all() if case.kind == "always" else not decisions.any()


@quick
@given(case=cases, threads=st.integers(1, 3), hard=st.booleans())
def test_halting(case, threads, hard):
    torch.set_num_threads(threads)
    logits, decisions, shares = case.run("halting hard" if hard else "halting")
    replayed = (
        walk(case.images, decisions, *case.network)
        if hard
        else walk_weighted(case.images, decisions, shares, *case.network)
    )
    assert torch.equal(logits, replayed)
    assert not shares[~decisions].any()
    way = case.on_the_way(decisions, None if hard else shares)
    pooled = [output for _, output in way]
    for segment in case.segments:
        own, total = decisions[:, segment], 0.0
        assert own[:, 0].all()
        last = own.sum(1) - 1
        for index, block in enumerate(segment[:-1]):
            score = logit(case.behind[block], pooled[block]).sigmoid()
            goes_on, ran = own[:, index + 1], own[:, index]
            assert_decided(~goes_on[ran], (total + score - (1 - EPSILON))[ran])
            if not hard:
                assert_close(shares[ran & goes_on, block], score[ran & goes_on])
            total = total + score
        if hard:
            assert torch.equal(shares[:, segment].nonzero()[:, 1], last)
            assert (shares[:, segment].sum(1) == 1).all()
        else:
            assert_close(shares[:, segment].sum(1), torch.ones(len(own)))
    if case.kind != "some":
        expected = [kept for n in case.layers for kept in (n if case.kind == "never" else 1,)]
        assert all(decisions[:, s].sum(1).eq(n).all()
                   for s, n in zip(case.segments, expected, strict=True))  # fmt: skip


@quick
@given(case=cases, threads=st.integers(1, 3))
def test_weighted(case, threads):
    torch.set_num_threads(threads)
    images, (weights, *network) = case.images.double(), case.exact
    exact = walk_weighted_reference(images, case.decisions, case.shares.double(), weights, *network)
    assert_close(case.run("weighted")[0], exact)


@pytest.mark.parametrize("name", ["sequential", "halting", "halting hard"])
def test_images_go_their_own_way(isa, name):
    """Gates that treat images unlike, and logits as exact as PyTorch's."""
    case = Case((2, 2, 3), size=(16, 16), batch=64)
    reference = walk_sequential_reference if name == "sequential" else walk_halting_reference
    gates = case.before if name == "sequential" else case.behind
    # Of the images that reach a gate half are on either side.
    threshold = 0.0 if name == "sequential" else math.log((1 - EPSILON) / EPSILON)
    for block in range(case.num_blocks):
        _, kept, *shares = case.run(name)
        way = case.on_the_way(kept, *(shares if name == "halting" else ()))
        pooled = way[block][name != "sequential"]
        gates[block] *= 4 / logit(gates[block], pooled).std()
        gates[block, 0] += threshold - logit(gates[block], pooled).quantile(0.5)
    logits, decisions, *shares = case.run(name)
    assert len(decisions.unique(dim=0)) >= 2
    options = () if name == "sequential" else (EPSILON, name == "halting hard")
    expected = reference(case.images, *case.network, gates, *options)
    weights, *network = case.exact
    exact = reference(case.images.double(), weights, *network, gates.double(), *options)
    same = (decisions == exact[1]).all(1) & (expected[1] == exact[1]).all(1)
    assert same.sum() >= 60
    error = (logits - exact[0])[same].abs().max()
    limit = 2 * (expected[0] - exact[0])[same].abs().max()
    assert error <= limit + 4 * torch.finfo(torch.float32).eps * exact[0].abs().max()
    for one, other in zip(shares, exact[2:], strict=True):
        assert_close(one[same], other[same])


@pytest.mark.parametrize("size", [(4, 4), (12, 20)])
@pytest.mark.parametrize("name", OPERATORS)
def test_same_bits_whatever_threads_and_batch(isa, name, size):
    case = Case((2, 1, 3), size=size, batch=9)
    torch.set_num_threads(1)
    expected = case.run(name)
    flipped = torch.arange(8, -1, -1)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for rows in (slice(None), slice(0, 1), slice(4, 5), slice(0, 2), flipped):
            for result, one in zip(case.run(name, rows), expected, strict=True):
                assert torch.equal(result, one[rows])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", OPERATORS)
def test_every_element_is_written(isa, name, threads):
    """Outputs and scratch memory that are NaN before leave no trace."""
    torch.set_num_threads(threads)
    case = Case(num_classes=19)
    assert torch.empty(64).isnan().all()
    poisoned = case.run(name)
    torch.use_deterministic_algorithms(False)
    for result, one in zip(poisoned, case.run(name), strict=True):
        assert torch.equal(result, one)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", OPERATORS)
def test_nan_stays_with_its_image(name, threads):
    torch.set_num_threads(threads)
    case = Case(batch=3)
    expected = case.run(name)
    images = case.images.clone()
    images[1, 2, 4, 4] = torch.nan
    results = case.run(name, images=images)
    for result, one in zip(results, expected, strict=True):
        assert torch.equal(result[[0, 2]], one[[0, 2]])
    if name != "weighted":
        # Sequential gates keep nothing, halting goes on to the end.
        assert (results[1][1] == (name != "sequential")).all()
    if name != "sequential":
        assert results[0][1].isnan().all()


@pytest.mark.parametrize("name", OPERATORS)
def test_no_images(name):
    case = Case()
    for result, one in zip(case.run(name, slice(0, 0)), case.run(name), strict=True):
        assert result.shape == (0, *one.shape[1:])
        assert result.dtype == one.dtype


@pytest.mark.parametrize("kind", ["sequential", "halting", "halting hard"])
def test_reference_agrees_with_the_policy(kind):
    """References read packed weights and gates; in float64 they are the models, up to rounding."""
    model, images = make_gated_model(kind)
    model, images = model.double(), images[:16].double()
    policy, config = model.policy, model.backbone.config
    weights = WalkExecutor.pack(fold_network(model.backbone, torch.float64))
    network = (weights, config.layers, config.num_classes, config.shortcut == "subsample")
    with torch.no_grad():
        if kind == "sequential":
            gates = pack_gates([gate.weight[0] for gate in policy.gates],
                               [gate.bias for gate in policy.gates])  # fmt: skip
            results = walk_sequential_reference(images, *network, gates)
        else:
            pairs = [_fold_gate(head) for head in policy.heads]
            gates = pack_gates(*zip(*pairs, strict=True))
            results = walk_halting_reference(images, *network, gates, policy.epsilon, policy.hard)
        expected = policy.run(model.backbone, images)
    assert torch.equal(results[1], expected.decisions)
    torch.testing.assert_close(results[0], expected.logits, rtol=1e-9, atol=1e-9)
    if kind == "halting":
        torch.testing.assert_close(results[2], expected.weights, rtol=1e-9, atol=1e-9)


def _fold_gate(head: nn.Module) -> tuple[Tensor, Tensor]:
    """A halting head as one linear gate."""
    if isinstance(head, nn.Identity):
        return torch.zeros(64, dtype=torch.float64), torch.tensor(0.0)
    norm, linear = head
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = linear.weight[0]
    return weight * scale, linear.bias[0] + weight @ (norm.bias - norm.running_mean * scale)


def arguments(name: str, **changes) -> tuple[Callable, Callable, dict]:
    """An operator, its reference, and arguments for two images through ResNet-8, some replaced."""
    case = Case((1, 1, 1), batch=2)
    values = {"images": case.images}
    if name == "weighted":
        values |= {"decisions": case.decisions, "shares": case.shares}
    values |= dict(
        zip(("weights", "layers", "num_classes", "subsample"), case.network, strict=True)
    )
    values["layers"] = list(values["layers"])
    if name == "sequential":
        return walk_sequential, walk_sequential_reference, values | {"gates": case.before} | changes
    if name == "weighted":
        return walk_weighted, walk_weighted_reference, values | changes
    values |= {"gates": case.behind, "epsilon": EPSILON, "hard": name == "halting hard"}
    return walk_halting, walk_halting_reference, values | changes


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    function, _, values = arguments(name)
    operator = getattr(torch.ops.blockdrop_fast, function.__name__).default
    torch.library.opcheck(operator, tuple(values.values()))


@pytest.mark.parametrize("which", [pytest.param(0, marks=compiled, id="kernel"), 1])
@pytest.mark.parametrize(("name", "changes", "error", "message"), [
    ("sequential", {"images": torch.zeros(2, 1, 8, 8)}, ValueError, "images: expected shape"),
    ("sequential", {"images": torch.zeros(2, 3, 8, 6)}, ValueError, "multiples of 4, got 8x6"),
    ("sequential", {"weights": torch.zeros(7)}, ValueError, "weights: expected"),
    ("sequential", {"gates": torch.zeros(3, 64)}, ValueError, r"gates: expected shape \(3, 65\)"),
    ("halting", {"gates": torch.zeros(4, 65)}, ValueError, r"gates: expected shape \(3, 65\)"),
    ("halting", {"gates": torch.zeros(3, 65).double()}, TypeError, "gates: expected dtype"),
    ("halting", {"epsilon": 0.0}, ValueError, "epsilon: expected between 0 and 1, got 0"),
    ("halting", {"epsilon": math.nan}, ValueError, "epsilon: expected between 0 and 1, got"),
    ("weighted", {"decisions": torch.ones(2, 3)}, TypeError, "decisions: expected dtype"),
    ("weighted", {"decisions": torch.ones(1, 2, 3, dtype=torch.bool)}, ValueError, r"\(B, K\)"),
    ("weighted", {"shares": torch.ones(2, 4)}, ValueError, r"shares: expected shape \(2, 3\)"),
])  # fmt: skip
def test_bad_arguments(which, name, changes, error, message):
    *functions, values = arguments(name, **changes)
    with pytest.raises(error, match=message):
        functions[which](**values)
