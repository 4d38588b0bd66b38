"""The walk against its reference, against float64 networks and against itself."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdrop_fast.executors.walk import WalkExecutor
from blockdrop_fast.networks.architectures import resnet50, resnet_cifar
from blockdrop_fast.networks.folding import fold_network
from blockdrop_fast.networks.policy import policy_resnet8
from blockdrop_fast.networks.resnet import ResNet, ResNetConfig
from blockdrop_fast.ops.walk import walk, walk_policy, walk_policy_reference, walk_reference
from tests.ops.walk_checks import assert_within_tolerance, compiled
from tests.random_networks import NEAR_ZERO, make_policy, make_policy_of_logits, random_decisions
from tests.random_networks import make_cifar_network as make_network


def make_executor(network, policy=None) -> WalkExecutor:
    executor = WalkExecutor(fold_network(network, torch.float32))
    if policy is not None:
        assert executor.set_policy(fold_network(policy.network, torch.float32), 1)
    return executor


def run_policy(executor, images):
    """What the executor runs, with the policy logits."""
    return walk_policy(images, *executor._network, *executor._policy)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    layers=st.tuples(*[st.integers(1, 3)] * 3),
    shortcut=st.sampled_from(["average_pool", "subsample"]),
    num_classes=st.sampled_from([1, 2, 10, 16, 17, 100]),
    height=st.sampled_from([4, 8, 12, 20, 32]),
    width=st.sampled_from([4, 8, 12, 20, 32, 36]),
    channels_last=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_same_logits_as_float64(
    layers, shortcut, num_classes, height, width, channels_last, threads, seed
):
    torch.set_num_threads(threads)
    network = make_network(layers, shortcut, num_classes, seed)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(64, 3, height, width, generator=generator)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    decisions = random_decisions(generator, 64, network.num_blocks)
    logits = make_executor(network).run(images, decisions)
    assert_within_tolerance(logits, network, images, decisions)


@pytest.mark.slow
@pytest.mark.parametrize("shortcut", ["average_pool", "subsample"])
@pytest.mark.parametrize("keep", ["random", "all", "none"])
def test_every_instruction_set(isa, shortcut, keep):
    network = make_network((2, 2, 2), shortcut)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 32, 32, generator=generator)
    decisions = random_decisions(generator, 64, 6)
    if keep != "random":
        decisions.fill_(keep == "all")
    logits = make_executor(network).run(images, decisions)
    assert_within_tolerance(logits, network, images, decisions)


@pytest.mark.slow
def test_deep_network(isa):
    network = make_network((18, 18, 18))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 16, 16, generator=generator)
    decisions = random_decisions(generator, 64, 54)
    logits = make_executor(network).run(images, decisions)
    assert_within_tolerance(logits, network, images, decisions)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 36), (12, 20), (32, 32)])
def test_same_logits_whatever_threads_and_batch(isa, height, width):
    """Bit for bit: alone, in a batch, split over threads, in another order."""
    generator = torch.Generator().manual_seed(2)
    executor = make_executor(make_network((2, 1, 3)))
    images = torch.randn(9, 3, height, width, generator=generator)
    decisions = random_decisions(generator, 9, 6)
    torch.set_num_threads(1)
    expected = executor.run(images, decisions)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(executor.run(images, decisions), expected)
        assert torch.equal(executor.run(images.flip(0), decisions.flip(0)), expected.flip(0))
        for image in (0, 4, 8):
            one = slice(image, image + 1)
            assert torch.equal(executor.run(images[one], decisions[one]), expected[one])
        assert torch.equal(executor.run(images[:2], decisions[:2]), expected[:2])


@settings(max_examples=25, deadline=None)
@given(
    num_sets=st.integers(1, 4),
    batch=st.integers(1, 3),
    threads=st.integers(1, 3),
    data=st.data(),
)
def test_sets_equal_one_by_one(num_sets, batch, threads, data):
    """Sets that fork anywhere, coincide, or come in any order give what each gives alone."""
    torch.set_num_threads(threads)
    layers = (2, 1, 2)
    bits = st.lists(st.booleans(), min_size=5, max_size=5)
    decisions = torch.tensor(
        [[data.draw(bits) for _ in range(batch)] for _ in range(num_sets)], dtype=torch.bool
    )
    images = torch.randn(batch, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    executor = make_executor(make_network(layers))
    logits = executor.run(images, decisions)
    assert logits.shape == (num_sets, batch, 10)
    for result, one in zip(logits, decisions, strict=True):
        assert torch.equal(result, executor.run(images, one))


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 64])
def test_policy_decides(isa, threads, batch):
    torch.set_num_threads(threads)
    network = make_network((2, 2, 2), "subsample", num_classes=7)
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    policy = make_policy(6, images)
    executor = make_executor(network, policy)
    logits, decisions, policy_logits = run_policy(executor, images[:batch])
    assert torch.equal(decisions, policy_logits >= 0)
    assert torch.equal(logits, executor.run(images[:batch], decisions))
    if batch == 64:
        assert 0.2 < decisions.float().mean() < 0.8
        keep_all = torch.ones(batch, 3, dtype=torch.bool)
        assert_within_tolerance(policy_logits, policy.network, images, keep_all)
        assert_within_tolerance(logits, network, images, decisions)


@pytest.mark.parametrize(
    "function", [pytest.param(walk_policy, marks=compiled), walk_policy_reference]
)
def test_keeps_where_the_logit_is_not_negative(function):
    """Also where float32 rounds the sigmoid of a negative logit to 0.5."""
    policy = make_policy_of_logits(NEAR_ZERO)
    executor = make_executor(make_network((2, 2, 2)), policy)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    _, decisions, policy_logits = function(images, *executor._network, *executor._policy[:2])
    assert torch.equal(policy_logits[1], torch.tensor(NEAR_ZERO))
    assert decisions[1].tolist() == [logit >= 0 for logit in NEAR_ZERO]


@pytest.mark.parametrize("threads", [1, 3])
def test_every_element_is_written(isa, threads):
    """Outputs and scratch memory that are NaN before leave no trace."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(3)
    network = make_network((2, 1, 2), num_classes=19)
    executor = make_executor(network, make_policy(5))
    images = torch.randn(5, 3, 12, 20, generator=generator)
    decisions = random_decisions(generator, 2, 5, 5)
    assert torch.empty(64).isnan().all()
    poisoned = (executor.run(images, decisions), *run_policy(executor, images))
    torch.use_deterministic_algorithms(False)
    expected = (executor.run(images, decisions), *run_policy(executor, images))
    for result, one in zip(poisoned, expected, strict=True):
        assert torch.equal(result, one)


@pytest.mark.parametrize("sets", [(), (3,)])
def test_empty_batch(sets):
    executor = make_executor(make_network((1, 1, 1)), make_policy(3))
    logits = executor.run(torch.empty(0, 3, 8, 8), torch.empty(*sets, 0, 3, dtype=torch.bool))
    assert logits.shape == (*sets, 0, 10)
    logits, decisions, policy_logits = run_policy(executor, torch.empty(0, 3, 8, 8))
    assert logits.shape == (0, 10)
    assert decisions.shape == policy_logits.shape == (0, 3)
    assert decisions.dtype == torch.bool


def test_no_sets():
    executor = make_executor(make_network((1, 1, 1)))
    logits = executor.run(torch.zeros(2, 3, 8, 8), torch.empty(0, 2, 3, dtype=torch.bool))
    assert logits.shape == (0, 2, 10)


def test_images_of_any_strides():
    executor = make_executor(make_network((1, 1, 1)))
    images = torch.randn(5, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    decisions = torch.ones(5, 3, dtype=torch.bool)
    expected = executor.run(images, decisions)
    wide = torch.zeros(5, 3, 16, 12)
    wide[:, :, ::2] = images
    assert torch.equal(executor.run(wide[:, :, ::2], decisions), expected)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(executor.run(channels_last, decisions), expected)
    assert torch.equal(
        executor.run(images[:1].expand(5, -1, -1, -1), decisions), expected[:1].expand(5, -1)
    )


def test_nan_stays_with_its_image():
    executor = make_executor(make_network((1, 1, 1)))
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[1, 2, 4, 4] = torch.nan
    logits = executor.run(images, torch.ones(3, 3, dtype=torch.bool))
    assert logits[1].isnan().all()
    assert logits[[0, 2]].isfinite().all()


_small_network = functools.cache(lambda: make_executor(make_network((1, 1, 1)))._network)


def arguments(**changes):
    """Arguments of ``walk`` for two images through ResNet-8, some replaced."""
    weights, layers, num_classes, subsample = _small_network()
    values = {
        "images": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        "decisions": torch.tensor([[True, False, True], [False, True, True]]),
        "weights": weights,
        "layers": list(layers),
        "num_classes": num_classes,
        "subsample": subsample,
    }
    return values | changes


def test_opcheck():
    values = arguments()
    torch.library.opcheck(torch.ops.blockdrop_fast.walk.default, tuple(values.values()))
    sets = arguments(decisions=torch.stack([values["decisions"], ~values["decisions"]]))
    torch.library.opcheck(torch.ops.blockdrop_fast.walk.default, tuple(sets.values()))
    del values["decisions"]
    policy = make_executor(make_policy(3).network)._network
    torch.library.opcheck(
        torch.ops.blockdrop_fast.walk_policy.default, (*values.values(), *policy[:2])
    )


def test_reference_agrees_with_the_network():
    """The reference reads packed weights; in float64 it is the network, up to rounding."""
    network = make_network((2, 1, 2), "subsample", num_classes=5).double()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 8, 12, generator=generator).double()
    decisions = random_decisions(generator, 2, 4, 5)
    folded = fold_network(network, torch.float64)
    logits = walk_reference(images, decisions, WalkExecutor.pack(folded), (2, 1, 2), 5, True)
    with torch.no_grad():
        expected = torch.stack([network(images, one) for one in decisions])
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("function", [
    pytest.param(walk, marks=compiled, id="walk"), pytest.param(walk_reference, id="reference"),
])  # fmt: skip
@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.float64)}, TypeError, "images: expected dtype"),
    ({"images": torch.zeros(2, 1, 8, 8)}, ValueError, r"images: expected shape \(B, 3, H, W\)"),
    ({"images": torch.zeros(2, 3, 8, 6)}, ValueError, "multiples of 4, got 8x6"),
    ({"images": torch.zeros(2, 3, 0, 8)}, ValueError, "multiples of 4, got 0x8"),
    ({"decisions": torch.ones(2, 3)}, TypeError, "decisions: expected dtype torch.bool"),
    ({"decisions": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "decisions: expected shape"),
    ({"decisions": torch.ones(3, 3, dtype=torch.bool)}, ValueError, "decisions: expected shape"),
    ({"weights": torch.zeros(7)}, ValueError, "weights: expected"),
    ({"layers": [1, 1]}, ValueError, "layers: expected"),
    ({"layers": [1, 0, 2]}, ValueError, "layers: expected"),
    ({"num_classes": 17}, ValueError, "weights: expected"),
    ({"num_classes": 9}, ValueError, "weights: packed for another network than the arguments say"),
    ({"subsample": True}, ValueError, "weights: packed for another network than"),
])  # fmt: skip
def test_bad_arguments(function, changes, error, message):
    with pytest.raises(error, match=message):
        function(**arguments(**changes))


@pytest.mark.parametrize("function", [
    pytest.param(walk_policy, marks=compiled, id="walk"),
    pytest.param(walk_policy_reference, id="reference"),
])  # fmt: skip
@pytest.mark.parametrize(("num_outputs", "message"), [
    (None, "policy_weights: expected a vector of"), (4, "policy_weights: packed for another"),
])  # fmt: skip
def test_bad_policy_weights(function, num_outputs, message):
    weights, layers = torch.zeros(7), (1, 1, 1)
    if num_outputs is not None:
        weights, layers, *_ = make_executor(make_policy(num_outputs).network)._network
    values = arguments()
    del values["decisions"]
    with pytest.raises(ValueError, match=message):
        function(*values.values(), weights, layers)


@compiled
def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("BLOCKDROP_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match=r"BLOCKDROP_CPU_ISA: expected .* got 'mmx'"):
        walk(**arguments())


def test_unsupported_networks():
    def folded(network, dtype=torch.float32):
        return fold_network(network, dtype)

    small = resnet_cifar(8)
    with pytest.raises(ValueError, match="network: the walk supports block 'basic' only"):
        WalkExecutor(folded(resnet50()))
    wide = ResNetConfig("basic", (1, 1, 1), (32, 64, 128), "cifar", "average_pool", 10)
    with pytest.raises(ValueError, match=r"widths \(16, 32, 64\) only, got \(32, 64, 128\)"):
        WalkExecutor(folded(ResNet(wide)))
    projection = ResNetConfig("basic", (1, 1, 1), (16, 32, 64), "cifar", "projection", 10)
    with pytest.raises(ValueError, match="got 'projection'"):
        WalkExecutor(folded(ResNet(projection)))
    with pytest.raises(TypeError, match=r"torch.float32 only, got torch.float64"):
        WalkExecutor(folded(small, torch.float64))
    with pytest.raises(RuntimeError, match="has no policy network"):
        WalkExecutor(folded(small)).run_policy(torch.zeros(1, 3, 8, 8))


def test_executor_takes_a_policy_that_the_walk_serves():
    def folded(network, dtype=torch.float32):
        return fold_network(network, dtype)

    executor = WalkExecutor(folded(resnet_cifar(8)))
    assert (executor.strategy, executor.logits_dtype) == ("walk", torch.float32)
    policy, images = folded(policy_resnet8(3).network), torch.zeros(1, 3, 8, 8)
    wide = ResNetConfig("basic", (1, 1, 1), (32, 64, 128), "cifar", "average_pool", 3)
    for other, pool in (
        (policy, 2),
        (folded(policy_resnet8(4).network), 1),
        (folded(resnet_cifar(8, 3, "subsample")), 1),
        (folded(ResNet(wide)), 1),
        (folded(policy_resnet8(3).network, torch.float64), 1),
    ):
        assert executor.set_policy(policy, 1)
        logits, decisions = executor.run_policy(images)
        assert torch.equal(logits, executor.run(images, decisions))
        assert not executor.set_policy(other, pool)
        with pytest.raises(RuntimeError, match="has no policy network"):
            executor.run_policy(images)
