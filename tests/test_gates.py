"""Engines of models that decide on the way, against their references in float64."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import blockdrop_fast as bdf
from blockdrop_fast.executors.gather_graph import GraphGatherExecutor
from blockdrop_fast.executors.walk_half import WalkHalfExecutor
from blockdrop_fast.measure.tolerance import make_output_reference
from blockdrop_fast.networks.folding import fold_network
from blockdrop_fast.networks.resnet import ResNetConfig
from tests.random_networks import (
    BOTTLENECK,
    CIFAR,
    CUSTOM,
    GATED,
    IMAGES,
    make_decisions,
    make_gated_model,
    make_images,
    make_network,
)

STRATEGIES = ["walk", "gather"]
# A gate closer to its threshold than this may fall on either side. At 16 bits most are.
TIES = {torch.float32: 1e-4, torch.float64: 1e-11}


def shifted(model, shift):
    """The model in float64 with all its thresholds moved."""
    model = copy.deepcopy(model).double()
    policy = model.policy
    if isinstance(policy, bdf.SequentialPolicy):
        for gate in policy.gates:
            gate.bias.data += shift
    elif isinstance(policy, bdf.HaltingPolicy):
        policy.epsilon += shift
    else:
        policy.rules[:, 5] += shift
    return model


def check_logits(engine, logits, images, output):
    """Compare with the model at the output's decisions and weights, under the tolerance rule."""
    if engine.dtype == torch.float64:
        model = copy.deepcopy(engine.model).double()
        with torch.no_grad():
            expected = model.policy.replay(model.backbone, images, output)
        torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)
    else:
        reference = make_output_reference(engine.model, images, output, engine.dtype)
        reference.check(engine.strategy, logits)


@torch.no_grad()
def check(engine, output, images):
    """Decisions but near ties, weights there, and logits at the engine's decisions and weights."""
    check_logits(engine, output.logits, images, output)
    expected = shifted(engine.model, 0.0)(images.double())
    if engine.dtype in TIES:
        tie = TIES[engine.dtype]
        low, high = (shifted(engine.model, one)(images.double()).decisions for one in (-tie, tie))
        sure = (low == high).all(1)
        assert sure.float().mean() >= 0.5
        assert torch.equal(output.decisions[sure], expected.decisions[sure])
    else:
        tie, sure = 0.03, (output.decisions == expected.decisions).all(1)
        assert sure.float().mean() >= 0.8
    assert type(output) is type(expected)
    if isinstance(output, bdf.WeightedOutput):
        assert output.weights.dtype == torch.promote_types(engine.dtype, torch.float32)
        wrong = output.weights.double() - expected.weights
        assert wrong[sure].abs().max() < 10 * tie
        assert not output.weights[~output.decisions].any()
        segments = output.weights.split(engine.config.layers, 1)
        ones = torch.ones(len(images), len(segments)).to(output.weights)
        torch.testing.assert_close(torch.stack([one.sum(1) for one in segments], 1), ones)


def in_batches(engine, images, batch):
    parts = [engine(part) for part in images.split(batch)]
    return type(parts[0])(*(torch.cat(one) for one in zip(*parts, strict=True)))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", GATED)
@settings(max_examples=3, deadline=None)
@given(
    layers=st.tuples(*[st.integers(1, 3)] * 3).filter(lambda layers: max(layers) > 1),
    shortcut=st.sampled_from(["average_pool", "subsample"]),
    classes=st.sampled_from([2, 10, 100]),
    batch=st.sampled_from([1, 7, 64]),
    seed=st.integers(0, 2**31),
)
def test_cifar_networks(strategy, kind, layers, shortcut, classes, batch, seed):
    config = ResNetConfig("basic", layers, (16, 32, 64), "cifar", shortcut, classes)
    model, images = make_gated_model(kind, config, seed)
    engine = bdf.compile(model, strategy=strategy)
    check(engine, in_batches(engine, images, batch), images)


@pytest.mark.slow
@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("name", CUSTOM)
def test_custom_networks(kind, name):
    model, images = make_gated_model(kind, CUSTOM[name])
    engine = bdf.compile(model)
    if engine.strategy == "walk":  # of the backbone, at decisions from anywhere
        assert "gates by gather" in engine.strategy_reason
    check(engine, in_batches(engine, images, 64), images)
    check(engine, in_batches(engine, images, 9), images)


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(kind, dtype):
    model, images = make_gated_model(kind, BOTTLENECK)
    engine, images = bdf.compile(model, dtype=dtype), images.to(dtype)
    check(engine, in_batches(engine, images, 16), images)


def set_gates(model, fires):
    """Let every gate keep, halt or let go (or none)."""
    policy, sign = model.policy, 1 if fires else -1
    with torch.no_grad():
        if isinstance(policy, bdf.Exits):
            policy.set_rules(torch.tensor([[0.0, 0, 0, 0, 0, sign]] * len(policy.rules)))
        elif isinstance(policy, bdf.SequentialPolicy):
            for gate in policy.gates:
                gate.bias.fill_(1e4 * sign)
        else:
            for head in policy.heads:
                if not isinstance(head, nn.Identity):
                    head[1].bias.fill_(1e4 * sign)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fires", [True, False])
@pytest.mark.parametrize("kind", GATED)
def test_gates_that_always_or_never_fire(strategy, kind, fires):
    model, images = make_gated_model(kind)
    set_gates(model, fires)
    engine = bdf.compile(model, strategy=strategy)
    output = engine(images)
    check(engine, output, images)
    usage = {"sequential": (0, 5), "exits": (5, 1)}.get(kind, (5, 3))[fires]
    assert (output.decisions.sum(1) == usage).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", GATED)
def test_every_element_is_written(strategy, kind):
    model, images = make_gated_model(kind)
    engine = bdf.compile(model, strategy=strategy)
    torch.use_deterministic_algorithms(True)  # which fills fresh memory with NaN
    try:
        output = engine(images)
        replayed = engine.run(images, *output[1:])
    finally:
        torch.use_deterministic_algorithms(False)
    check(engine, output, images)
    check_logits(engine, replayed, images, output)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", GATED)
def test_same_bits_in_any_batch(strategy, kind):
    model, images = make_gated_model(kind)
    engine = bdf.compile(model, strategy=strategy)
    if engine._gated.strategy != "walk":
        pytest.skip("block by block, sums are as the library likes them for the batch")
    whole = engine(images)
    for batch in (1, 5):
        for a, b in zip(whole, in_batches(engine, images, batch), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(engine.run(images[3:4], *(one[3:4] for one in whole[1:])), whole.logits[3:4])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", GATED)
def test_replays(strategy, kind):
    """run gives what the call gave, at its decisions and weights."""
    model, images = make_gated_model(kind)
    engine = bdf.compile(model, strategy=strategy)
    output = engine(images)
    assert torch.equal(engine.decide(images), output.decisions)
    check_logits(engine, engine.run(images, *output[1:]), images, output)
    if kind in ("sequential", "halting hard"):
        [logits] = engine.run_sets(images, output.decisions[None])
        check_logits(engine, logits, images, output)


@pytest.mark.parametrize("strategy", ["walk", "gather", "dense"])
@settings(max_examples=8, deadline=None)
@given(
    kind=st.sampled_from(["all kept", "all dropped", "one image", "random"]),
    seed=st.integers(0, 2**31),
)
def test_any_weights_of_any_decisions(strategy, kind, seed):
    images, backbone = make_images(CIFAR, IMAGES, seed), make_network(CIFAR, seed)
    decisions = make_decisions(kind, IMAGES, 5, seed)
    weights = torch.randn(IMAGES, 5, generator=torch.Generator().manual_seed(seed))
    weights[~decisions] = torch.nan
    engine = bdf.compile(backbone, strategy=strategy)
    model = bdf.BlockDrop(backbone, bdf.HaltingPolicy(CIFAR)).eval()
    output = bdf.WeightedOutput(None, decisions, weights)
    reference = make_output_reference(model, images, output, torch.float32)
    reference.check(strategy, engine.run(images, decisions, weights))


@pytest.mark.parametrize("executor", [GraphGatherExecutor, WalkHalfExecutor])
def test_executors_of_gpus_take_weights(executor):
    images, backbone = make_images(CIFAR, 8).bfloat16(), make_network(CIFAR)
    decisions, weights = make_decisions("random", 8, 5), torch.rand(8, 5)
    expected = bdf.compile(backbone, dtype=torch.bfloat16).run(images, decisions, weights)
    found = executor(fold_network(backbone, torch.bfloat16)).run_weighted(
        images, decisions, weights
    )
    assert torch.equal(found, expected.to(found.dtype))


@pytest.mark.parametrize("kind", GATED)
def test_empty_batch(kind):
    model, images = make_gated_model(kind)
    engine = bdf.compile(model)
    output = engine(images[:0])
    assert [tuple(one.shape) for one in output] == [(0, 10), (0, 5), (0, 5)][: len(output)]
    assert [one.dtype for one in output] == [one.dtype for one in engine(images[:1])]
    assert engine.run(images[:0], *output[1:]).shape == (0, 10)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", GATED)
def test_two_threads_at_once(strategy, kind):
    model, images = make_gated_model(kind)
    engine = bdf.compile(model, strategy=strategy)
    halves = images.chunk(2)
    expected = [engine(half) for half in halves]

    def repeat(which):
        for _ in range(5):
            for a, b in zip(engine(halves[which]), expected[which], strict=True):
                assert torch.equal(a, b)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(repeat, (0, 1)))


@pytest.mark.parametrize("kind", GATED)
def test_engine_is_a_snapshot(kind):
    model, images = make_gated_model(kind)
    engine = bdf.compile(model)
    before = engine(images)
    set_gates(model, fires=True)
    for a, b in zip(engine(images), before, strict=True):
        assert torch.equal(a, b)
    engine.refresh()
    assert not torch.equal(engine(images).decisions, before.decisions)
    check(engine, engine(images), images)


@pytest.mark.parametrize("kind", GATED)
def test_refuses(kind):
    model, images = make_gated_model(kind)
    with pytest.raises(ValueError, match="'dense' runs no policy that decides on the way"):
        bdf.compile(model, strategy="dense")
    engine = bdf.compile(model)
    with pytest.raises(RuntimeError, match="probabilities: gates on the way"):
        engine.probabilities(images)
    with pytest.raises(ValueError, match="budget: expected none"):
        engine(images, 3.0)
    with pytest.raises(ValueError, match="budget: expected none"):
        engine.decide(images, 3.0)
    decisions = engine(images).decisions
    if kind in ("halting", "exits"):
        what = "weighted means" if kind == "halting" else "exits"
        with pytest.raises(RuntimeError, match=f"run_sets: the model has {what}"):
            engine.run_sets(images, decisions[None])
    if kind == "exits":
        with pytest.raises(ValueError, match="weights: expected none"):
            engine.run(images, decisions, torch.ones(IMAGES, 5))
        with pytest.raises(ValueError, match=r"decisions: expected the first .* or all 5"):
            engine.run(images, ~decisions)


BAD_WEIGHTS = [
    ([[1.0] * 5] * 2, TypeError, "weights: expected a torch.Tensor, got list"),
    (torch.ones(2, 5, dtype=torch.int64), TypeError, "weights: expected a floating-point dtype"),
    (torch.ones(2, 4), ValueError, r"weights: expected the shape of decisions, \(2, 5\), got"),
    (torch.ones(2, 5, device="meta"), TypeError, "weights: expected a tensor with values"),
    (torch.full((2, 5), torch.nan), ValueError, "weights: contain NaN or infinite values"),
]


@pytest.mark.parametrize(("weights", "error", "message"), BAD_WEIGHTS)
def test_bad_weights(weights, error, message):
    engine = bdf.compile(make_network(CIFAR))
    with pytest.raises(error, match=message):
        engine.run(make_images(CIFAR, 2), torch.ones(2, 5), weights)


def test_gates_of_another_backbone():
    """Also where the policy is exchanged for another one and the engine refreshed."""
    other = dataclasses.replace(CIFAR, layers=(2, 2, 1))
    with pytest.raises(ValueError, match=r"gates are for a backbone of layers \(2, 2, 1\), got"):
        bdf.BlockDrop(make_network(CIFAR), bdf.SequentialPolicy(other))
