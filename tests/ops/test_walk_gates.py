"""Walks that decide on the way: against gates at float64, their references, and themselves."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockdrop_fast.executors.walk import WalkExecutor
from blockdrop_fast.networks.exits import confidence_features
from blockdrop_fast.networks.folded_gates import (
    FoldedExits,
    FoldedGates,
    FoldedLinear,
    FoldedSequential,
    fold_gates,
)
from blockdrop_fast.networks.folding import fold_head, fold_network
from blockdrop_fast.ops.walk import unpack, walk
from blockdrop_fast.ops.walk_gates import (
    look_serves,
    pack_gates,
    pack_heads,
    pack_look,
    walk_exits,
    walk_exits_reference,
    walk_halting,
    walk_halting_reference,
    walk_look,
    walk_look_reference,
    walk_sequential,
    walk_sequential_reference,
    walk_weighted,
    walk_weighted_reference,
)
from blockdrop_fast.ops.walk_network import ReferenceNetwork
from tests.ops.walk_checks import compiled
from tests.random_networks import (
    make_cifar_network,
    make_gated_model,
    make_look_model,
    random_decisions,
)

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
        self.shares = torch.rand(batch, self.num_blocks, generator=self.generator)
        self.before, self.behind = self._gates(self.inputs), self._gates(self.outputs)
        self._make_exits(num_classes)
        self._make_look()

    def _gates(self, channels: list[int]) -> Tensor:
        """(K, 65) gates of so many channels each."""
        bias = {"never": -math.inf, "always": math.inf, "some": 0.0}[self.kind]
        weights = (2 * torch.randn(count, generator=self.generator) for count in channels)
        return pack_gates(list(weights), [bias] * self.num_blocks)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _make_exits(self, num_classes: int) -> None:
        """After the first, the middle and the last block but one."""
        self.after = sorted({1, self.num_blocks // 2, self.num_blocks - 1})
        channels = [self.outputs[block - 1] for block in self.after]
        self.heads = [(self.randn(num_classes, one), self.randn(num_classes)) for one in channels]
        self.rules = self.randn(len(self.after), 6)
        if self.kind != "some":
            self.rules *= torch.tensor([0.0] * 5 + [1.0])
            self.rules[:, 5] = {"never": -1.0, "always": 1.0}[self.kind]
        self.ends = torch.tensor([*self.after, self.num_blocks])
        left = self.ends[
            torch.randint(len(self.ends), (len(self.images),), generator=self.generator)
        ]
        self.prefixes = torch.arange(self.num_blocks) < left[:, None]

    def _make_look(self) -> None:
        """After the last block of the first segment; a menu of five sets."""
        self.look_after = self.layers[0]
        self.look_convs = [(self.randn(32, 16, 3, 3) / 10, self.randn(32) / 4),
                           (self.randn(64, 32, 3, 3) / 10, self.randn(64) / 4)]  # fmt: skip
        bias = {"never": -math.inf, "always": math.inf, "some": 0.0}[self.kind]
        self.look_fc = self.randn(self.num_blocks, 64), torch.full((self.num_blocks,), bias)
        self.menu_fc = self.randn(5, 64), self.randn(5)
        self.sets = random_decisions(self.generator, 5, self.num_blocks)
        self.sets[:, : self.look_after] = True
        self.costs = torch.rand(5, generator=self.generator)

    def run(self, name: str, rows=slice(None), images: Tensor | None = None) -> tuple[Tensor, ...]:
        """What an operator gives for some of the images."""
        images = (self.images if images is None else images)[rows]
        if name == "sequential":
            return walk_sequential(images, *self.network, self.before)
        if name == "weighted":
            given = (self.decisions[rows], self.shares[rows])
            return (walk_weighted(images, *given, *self.network),)
        if name.startswith("exits"):
            given = self.prefixes[rows] if name == "exits replayed" else None
            heads = pack_heads(*zip(*self.heads, strict=True))
            return walk_exits(images, *self.network, self.after, heads, self.rules, given)
        if name == "look":
            head = pack_look(self.look_convs, *self.look_fc)
            return walk_look(images, *self.network, self.look_after, head, self.num_blocks)
        if name == "look, menu":
            head, menu = pack_look(self.look_convs, *self.menu_fc), (self.sets, self.costs)
            return walk_look(images, *self.network, self.look_after, head, 5, *menu)
        return walk_halting(images, *self.network, self.behind, EPSILON, name == "halting hard")

    def on_the_way(
        self, decisions: Tensor, shares: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """In float64, of each block at given decisions: its input and output, both pooled."""
        return [(x.mean((2, 3)), y.mean((2, 3))) for x, y in self.features(decisions, shares)]

    def features(
        self, decisions: Tensor, shares: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """In float64, of each block at given decisions: its input and output."""
        weights, layers, num_classes, subsample = self.exact
        parameters = list(unpack(weights, layers, num_classes, subsample))
        network = ReferenceNetwork(parameters, layers, subsample, torch.float64)
        x, found = network.stem(self.images.double()), []
        for segment in self.segments:
            given = 0.0
            for block in segment:
                before, x = x, network.run_block(int(block), x, decisions[:, block])
                found.append((before, x))
                if shares is not None:
                    given = given + shares[:, block, None, None, None] * x
            x = x if shares is None else given
        return found


OPERATORS = ("sequential", "halting", "halting hard", "weighted", "exits", "exits replayed", "look",
             "look, menu")  # fmt: skip
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
# Making a case is what takes time, on a busy machine more than hypothesis finds healthy.
quick = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])


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
def test_exits(case, threads):
    torch.set_num_threads(threads)
    logits, decisions = case.run("exits")
    pooled = [output for _, output in case.on_the_way(torch.ones_like(decisions))]
    going = torch.ones(len(logits), dtype=torch.bool)
    for block, (weight, bias), rule in zip(case.after, case.heads, case.rules, strict=True):
        found = F.linear(pooled[block - 1], weight.double(), bias.double())
        leaves = ~decisions[:, block]
        distance = confidence_features(found) @ rule[:5].double() + rule[5]
        assert_decided(leaves[going], distance[going])
        assert_close(logits[going & leaves], found[going & leaves])
        assert not decisions[going & leaves, block:].any()
        going = going & ~leaves
    assert decisions[going].all()
    assert torch.equal(logits[going], walk(case.images, decisions, *case.network)[going])
    if case.kind != "some":
        assert (decisions.sum(1) == case.ends[0 if case.kind == "always" else -1]).all()
    case.prefixes = decisions
    for result, one in zip(case.run("exits replayed"), (logits, decisions), strict=True):
        assert torch.equal(result, one)


@quick
@given(case=cases, threads=st.integers(1, 3))
def test_exits_where_they_are_told(case, threads):
    torch.set_num_threads(threads)
    logits, decisions = case.run("exits replayed")
    assert torch.equal(decisions, case.prefixes)
    heads = pack_heads(*zip(*case.heads, strict=True)).double()
    weights, *network = case.exact
    options = (case.after, heads, case.rules.double(), case.prefixes)
    exact, _ = walk_exits_reference(case.images.double(), weights, *network, *options)
    assert_close(logits, exact)


@quick
@given(
    case=cases,
    threads=st.integers(1, 3),
    size=st.tuples(*[st.sampled_from([4, 12, 16, 32])] * 2),
    menu=st.booleans(),
)
def test_look(case, threads, size, menu):
    torch.set_num_threads(threads)
    case.images = case.randn(len(case.images), 3, *size)
    logits, decisions, look_logits = case.run("look, menu" if menu else "look")
    assert torch.equal(logits, walk(case.images, decisions, *case.network))
    x = case.features(decisions)[case.look_after - 1][1]
    x = F.adaptive_avg_pool2d(x, [min(one, 16) for one in size])
    for weight, bias in case.look_convs:
        x = F.relu(F.conv2d(x, weight.double(), bias.double(), 2, 1))
    weight, bias = (one.double() for one in (case.menu_fc if menu else case.look_fc))
    exact = F.linear(x.mean((2, 3)), weight, bias)
    assert_close(look_logits, exact)
    assert decisions[:, : case.look_after].all()
    if menu:
        worth = exact.sigmoid() - case.costs
        clear = worth.topk(2, 1).values.diff(dim=1).abs()[:, 0] > CLEAR
        assert torch.equal(decisions[clear], case.sets[worth.argmax(1)][clear])
    else:
        assert_decided(decisions[:, case.look_after :], exact[:, case.look_after :])


def test_a_menu_is_chosen_from_as_argmax_does():
    """The first of equal worths, and the first that is not a number."""
    case = Case((1, 1, 1), batch=1)
    case.sets = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 1, 1], [1, 1, 0]]).bool()
    for bias, chosen in (
        ([0.0, 1.0, 1.0, 0.0, 1.0], 1),
        ([0.0, 9.0, math.nan, 0.0, math.nan], 2),
        ([-math.inf] * 5, 0),
        ([0.0, 0.0, 0.0, math.inf, 1.0], 3),
    ):
        case.menu_fc, case.costs = (torch.zeros(5, 64), torch.tensor(bias)), torch.zeros(5)
        assert torch.equal(case.run("look, menu")[1][0], case.sets[chosen])


def test_look_serves_a_size():
    for size in range(4, 72, 4):
        case = Case((1, 1, 1), size=(size, 8), batch=1)
        if look_serves(size, 8):
            case.run("look")
        else:
            with pytest.raises(ValueError, match="height and width up to 16, or 32"):
                case.run("look")


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


@pytest.mark.parametrize("size", [(4, 4), (12, 32)])
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
    if name in ("sequential", "halting", "halting hard", "exits"):
        # Sequential gates keep nothing, others go on to the end.
        assert (results[1][1] == (name != "sequential")).all()
    if name != "sequential":
        assert results[0][1].isnan().all()


@pytest.mark.parametrize("name", OPERATORS)
def test_no_images(name):
    case = Case()
    for result, one in zip(case.run(name, slice(0, 0)), case.run(name), strict=True):
        assert result.shape == (0, *one.shape[1:])
        assert result.dtype == one.dtype


@pytest.mark.parametrize("kind", ["sequential", "halting", "halting hard", "exits", "look", "menu"])
def test_reference_agrees_with_the_policy(kind):
    """References read packed weights and gates; in float64 they are the models, up to rounding."""
    sets = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 1, 1], [1, 1, 1, 1, 1]]).bool()
    if kind in ("look", "menu"):
        model, images = make_look_model(sets=sets if kind == "menu" else None)
    else:
        model, images = make_gated_model(kind)
    model, images = model.double(), images[:16].double()
    policy, config = model.policy, model.backbone.config
    weights = WalkExecutor.pack(fold_network(model.backbone, torch.float64))
    network = (weights, config.layers, config.num_classes, config.shortcut == "subsample")
    with torch.no_grad():
        if kind in ("look", "menu"):
            head = fold_head(policy, torch.float64)
            convs = [(conv.weight, conv.bias) for conv in head.convs]
            packed = pack_look(convs, head.fc_weight, head.fc_bias)
            options = (len(head.fc_bias),)
            if kind == "menu":
                options += (sets, policy.menu.price() * sets.sum(1).double())
            results = walk_look_reference(images, *network, policy.after, packed, *options)
        else:
            results = _run_reference(fold_gates(policy, torch.float64), images, network)
        expected = model(images)
    assert torch.equal(results[1], expected.decisions)
    torch.testing.assert_close(results[0], expected.logits, rtol=1e-9, atol=1e-9)
    if kind == "halting":
        torch.testing.assert_close(results[2], expected.weights, rtol=1e-9, atol=1e-9)


def _run_reference(gates: FoldedGates, images: Tensor, network: tuple) -> tuple[Tensor, ...]:
    if isinstance(gates, FoldedExits):
        heads = pack_heads(*zip(*((one.weight, one.bias) for one in gates.heads), strict=True))
        return walk_exits_reference(images, *network, gates.after, heads, gates.rules.double())
    sequential = isinstance(gates, FoldedSequential)
    none = FoldedLinear(torch.zeros(1, 64).double(), torch.zeros(1).double())
    linear = gates.gates if sequential else [one or none for one in gates.heads]
    packed = pack_gates([one.weight[0] for one in linear], [one.bias[0] for one in linear])
    if sequential:
        return walk_sequential_reference(images, *network, packed)
    return walk_halting_reference(images, *network, packed, gates.epsilon, gates.hard)


_small_case = functools.cache(lambda: Case((1, 1, 1), batch=2))


def arguments(name: str, **changes) -> tuple[Callable, Callable, dict]:
    """An operator, its reference, and arguments for two images through ResNet-8, some replaced."""
    case = _small_case()
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
    if name.startswith("exits"):
        heads = pack_heads(*zip(*case.heads, strict=True))
        values |= {"after": case.after, "heads": heads, "rules": case.rules}
        values["decisions"] = case.prefixes if name == "exits replayed" else None
        return walk_exits, walk_exits_reference, values | changes
    if name.startswith("look"):
        menu = name == "look, menu"
        head = pack_look(case.look_convs, *(case.menu_fc if menu else case.look_fc))
        values |= {"after": 1, "head": head, "outputs": 5 if menu else 3}
        values |= {"sets": case.sets, "costs": case.costs} if menu else {}
        return walk_look, walk_look_reference, values | changes
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
    ("exits", {"after": [0, 2]}, ValueError, r"after: expected ascending blocks out of 1 to 2"),
    ("exits", {"after": [1, 3]}, ValueError, r"after: expected ascending blocks out of 1 to 2"),
    ("exits", {"after": [2, 2]}, ValueError, r"after: expected ascending blocks out of 1 to 2"),
    ("exits", {"heads": torch.zeros(2, 64)}, ValueError, r"heads: expected shape \(2, 1040\)"),
    ("exits", {"rules": torch.zeros(2, 5)}, ValueError, r"rules: expected shape \(2, 6\)"),
    ("exits", {"decisions": torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()}, ValueError,
     "decisions: expected the first blocks of each image"),
    ("exits", {"decisions": torch.zeros(2, 3).bool()}, ValueError, "decisions: expected the first"),
    ("look", {"after": 2}, ValueError, "after: expected a block of the first segment, 1 to 1"),
    ("look", {"outputs": 4}, ValueError, "outputs: expected"),
    ("look", {"head": torch.zeros(9)}, ValueError, "head: expected a vector of 24176 packed"),
    ("look, menu", {"sets": torch.ones(5, 4).bool()}, ValueError, r"sets: expected shape \(5, 3\)"),
    ("look, menu", {"sets": torch.ones(5, 3)}, TypeError, "sets: expected dtype torch.bool"),
    ("look, menu", {"sets": torch.zeros(5, 3).bool()}, ValueError, "sets: expected blocks 1 to 1"),
    ("look, menu", {"costs": None}, ValueError, "costs: expected one of each of 5 sets"),
    ("look, menu", {"costs": torch.zeros(4)}, ValueError, "costs: expected one of each of 5 sets"),
])  # fmt: skip
def test_bad_arguments(which, name, changes, error, message):
    *functions, values = arguments(name, **changes)
    with pytest.raises(error, match=message):
        functions[which](**values)
