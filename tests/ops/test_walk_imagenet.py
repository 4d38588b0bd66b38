"""The walk of ImageNet networks against its reference, float64 networks and itself."""

from __future__ import annotations

import functools
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdrop_fast.executors.walk_imagenet import WalkImageNetExecutor, pack
from blockdrop_fast.networks.architectures import resnet_cifar
from blockdrop_fast.networks.folding import fold_network
from blockdrop_fast.networks.policy import PolicyNetwork
from blockdrop_fast.networks.resnet import ResNetConfig
from blockdrop_fast.ops.walk_imagenet import (
    walk_imagenet,
    walk_imagenet_policy,
    walk_imagenet_policy_reference,
    walk_imagenet_reference,
)
from tests.ops.walk_checks import assert_within_tolerance, compiled
from tests.random_networks import (
    NEAR_ZERO,
    keep_half,
    make_network,
    random_decisions,
    random_images,
)

# Blocks of weights end at 512 channels out and 256 in; panels at 32.
BASIC = ResNetConfig("basic", (2, 1), (64, 40), "imagenet", "projection", 10)
BOTTLENECK = ResNetConfig("bottleneck", (2, 1), (16, 20), "imagenet", "projection", 33)
WIDE = ResNetConfig("bottleneck", (1, 2), (64, 136), "imagenet", "projection", 5)
NARROW = ResNetConfig("basic", (2, 1), (64, 40), "imagenet", "projection", 7, (24, 64, 70))
POLICY = ResNetConfig("basic", (1, 1), (32, 64), "imagenet", "projection", 3)


def make_executor(network, policy=None, compact=False) -> WalkImageNetExecutor:
    executor = WalkImageNetExecutor(fold_network(network, torch.float32), compact)
    if policy is not None:
        folded = fold_network(policy.network, torch.float32)
        assert executor.set_policy(folded, policy.input_pool)
    return executor


def make_policy(images, config=POLICY, pool=2) -> PolicyNetwork:
    """A policy network that keeps about half of the images' blocks."""
    policy = PolicyNetwork(make_network(config, seed=1), pool).eval()
    keep_half(policy, images)
    return policy


def run_policy(executor, images):
    """What the executor runs, with the policy logits."""
    return walk_imagenet_policy(images, *executor._network, *executor._policy)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    block=st.sampled_from(["basic", "bottleneck"]),
    layers=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    widths=st.lists(st.sampled_from([8, 32, 40, 64, 96]), min_size=3, max_size=3),
    num_classes=st.sampled_from([1, 2, 32, 33, 100]),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    channels_last=st.booleans(),
    compact=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_same_logits_as_float64(
    block, layers, widths, num_classes, height, width, channels_last, compact, threads, seed
):
    torch.set_num_threads(threads)
    widths = tuple(widths[: len(layers)])
    config = ResNetConfig(block, tuple(layers), widths, "imagenet", "projection", num_classes)
    network = make_network(config, seed)
    images = random_images(64, torch.float32, (height, width), seed)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    decisions = random_decisions(torch.Generator().manual_seed(seed), 64, network.num_blocks)
    logits = make_executor(network, compact=compact).run(images, decisions)
    assert_within_tolerance(logits, network, images, decisions)


@pytest.mark.slow
@pytest.mark.parametrize("config", [BASIC, WIDE, NARROW], ids=["basic", "bottleneck", "narrow"])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("keep", ["random", "all", "none"])
def test_every_instruction_set(isa, config, compact, keep):
    network = make_network(config)
    images = random_images(64, torch.float32, (37, 64))
    decisions = random_decisions(torch.Generator().manual_seed(0), 64, network.num_blocks)
    if keep != "random":
        decisions.fill_(keep == "all")
    logits = make_executor(network, compact=compact).run(images, decisions)
    assert_within_tolerance(logits, network, images, decisions)


@pytest.mark.slow
@pytest.mark.parametrize("config", [
    ResNetConfig("bottleneck", (1, 1, 6, 1), (64, 128, 256, 512), "imagenet", "projection", 1000),
    ResNetConfig("basic", (1, 1, 1, 2), (64, 128, 256, 512), "imagenet", "projection", 1000),
], ids=["bottleneck", "basic"])  # fmt: skip
def test_channels_of_imagenet_networks(config):
    network = make_network(config)
    images = random_images(64, torch.float32, (64, 48))
    decisions = random_decisions(torch.Generator().manual_seed(0), 64, network.num_blocks)
    logits = make_executor(network).run(images, decisions)
    assert_within_tolerance(logits, network, images, decisions)


@pytest.mark.parametrize("config", [BASIC, BOTTLENECK], ids=["basic", "bottleneck"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (33, 50), (64, 64)])
def test_same_logits_whatever_threads_and_batch(isa, config, height, width):
    """Bit for bit: alone, in a batch, split over threads, in another order; in plain form, too."""
    images = random_images(9, torch.float32, (height, width), seed=2)
    decisions = random_decisions(torch.Generator().manual_seed(2), 9, config.num_blocks)
    for compact in (False, True):
        executor = make_executor(make_network(config), compact=compact)
        torch.set_num_threads(1)
        expected = executor.run(images, decisions)
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(executor.run(images, decisions), expected)
            assert torch.equal(executor.run(images.flip(0), decisions.flip(0)), expected.flip(0))
            for image in (0, 4, 8):
                one = slice(image, image + 1)
                assert torch.equal(executor.run(images[one], decisions[one]), expected[one])


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
    bits = st.lists(st.booleans(), min_size=3, max_size=3)
    decisions = torch.tensor(
        [[data.draw(bits) for _ in range(batch)] for _ in range(num_sets)], dtype=torch.bool
    )
    images = random_images(batch, torch.float32, (24, 20))
    executor = make_executor(make_network(BOTTLENECK))
    logits = executor.run(images, decisions)
    assert logits.shape == (num_sets, batch, 33)
    for result, one in zip(logits, decisions, strict=True):
        assert torch.equal(result, executor.run(images, one))


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [2, 64])
@pytest.mark.parametrize("pool", [1, 3])
def test_policy_decides(isa, threads, batch, pool):
    """In groups of images whose size depends on batch and threads, and whose logits do not."""
    torch.set_num_threads(threads)
    network = make_network(BASIC)
    images = random_images(64, torch.float32, (45, 34))
    policy = make_policy(images, pool=pool)
    executor = make_executor(network, policy)
    logits, decisions, policy_logits = run_policy(executor, images[:batch])
    assert torch.equal(decisions, policy_logits >= 0)
    assert torch.equal(logits, executor.run(images[:batch], decisions))
    if batch == 64:
        pooled = torch.nn.functional.avg_pool2d(images, pool)
        keep_all = torch.ones(batch, 2, dtype=torch.bool)
        assert_within_tolerance(policy_logits, policy.network, pooled, keep_all)
        assert 0.2 < decisions.float().mean() < 0.8
        torch.set_num_threads(1)
        alone = [run_policy(executor, images[i : i + 1])[2] for i in range(8)]
        assert torch.equal(torch.cat(alone), policy_logits[:8])


@pytest.mark.parametrize("config", [
    ResNetConfig("basic", (1, 1), (32, 64), "imagenet", "projection", 3, (70, 24)),
    ResNetConfig("bottleneck", (2, 1), (16, 40), "imagenet", "projection", 3),
], ids=["narrow", "bottleneck"])  # fmt: skip
def test_policy_of_another_architecture(config):
    images = random_images(3, torch.float32, (40, 33))
    policy = make_policy(images, config)
    executor = make_executor(make_network(BASIC), policy)
    logits, decisions, policy_logits = run_policy(executor, images)
    pooled = torch.nn.functional.avg_pool2d(images, policy.input_pool)
    keep_all = torch.ones(3, config.num_blocks, dtype=torch.bool)
    alone = make_executor(policy.network).run(pooled, keep_all)
    torch.testing.assert_close(policy_logits, alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(decisions, policy_logits >= 0)
    assert torch.equal(logits, executor.run(images, decisions))


@pytest.mark.parametrize(
    "function",
    [pytest.param(walk_imagenet_policy, marks=compiled), walk_imagenet_policy_reference],
)
def test_keeps_where_the_logit_is_not_negative(function):
    """Also where float32 rounds the sigmoid of a negative logit to 0.5."""
    config = ResNetConfig("basic", (1,), (64,), "imagenet", "projection", len(NEAR_ZERO))
    policy = PolicyNetwork(make_network(config), 2)
    with torch.no_grad():
        policy.network.fc.weight.zero_()
        policy.network.fc.bias.copy_(torch.tensor(NEAR_ZERO))
    backbone = ResNetConfig("basic", (6,), (64,), "imagenet", "projection", 2)
    executor = make_executor(make_network(backbone), policy)
    images = random_images(2, torch.float32, 8)
    _, decisions, policy_logits = function(images, *executor._network, *executor._policy)
    assert torch.equal(policy_logits[1], torch.tensor(NEAR_ZERO))
    assert decisions[1].tolist() == [logit >= 0 for logit in NEAR_ZERO]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("config", [BASIC, BOTTLENECK], ids=["basic", "bottleneck"])
def test_every_element_is_written(isa, threads, config):
    """Outputs and scratch memory that are NaN before leave no trace."""
    torch.set_num_threads(threads)
    images = random_images(5, torch.float32, (35, 50))
    executor = make_executor(make_network(config), make_policy(images))
    decisions = random_decisions(torch.Generator().manual_seed(3), 2, 5, 3)
    assert torch.empty(64).isnan().all()
    poisoned = (executor.run(images, decisions), *run_policy(executor, images))
    torch.use_deterministic_algorithms(False)
    expected = (executor.run(images, decisions), *run_policy(executor, images))
    for result, one in zip(poisoned, expected, strict=True):
        assert result.isfinite().all()
        assert torch.equal(result, one)


@pytest.mark.parametrize("sets", [(), (3,)])
def test_empty_batch(sets):
    executor = make_executor(make_network(BASIC), make_policy(random_images(2, torch.float32)))
    logits = executor.run(torch.empty(0, 3, 8, 8), torch.empty(*sets, 0, 3, dtype=torch.bool))
    assert logits.shape == (*sets, 0, 10)
    logits, decisions, policy_logits = run_policy(executor, torch.empty(0, 3, 8, 8))
    assert logits.shape == (0, 10)
    assert decisions.shape == policy_logits.shape == (0, 3)
    assert decisions.dtype == torch.bool


def test_no_sets():
    executor = make_executor(make_network(BASIC))
    logits = executor.run(torch.zeros(2, 3, 8, 8), torch.empty(0, 2, 3, dtype=torch.bool))
    assert logits.shape == (0, 2, 10)


def test_images_of_any_strides():
    executor = make_executor(make_network(BOTTLENECK))
    images = random_images(5, torch.float32, (16, 21))
    decisions = torch.ones(5, 3, dtype=torch.bool)
    expected = executor.run(images, decisions)
    wide = torch.zeros(5, 3, 32, 21)
    wide[:, :, ::2] = images
    assert torch.equal(executor.run(wide[:, :, ::2], decisions), expected)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(executor.run(channels_last, decisions), expected)
    assert torch.equal(
        executor.run(images[:1].expand(5, -1, -1, -1), decisions), expected[:1].expand(5, -1)
    )


def test_nan_stays_with_its_image(isa):
    images = random_images(9, torch.float32, 40)
    policy = make_policy(images)
    images[4, 2, 11, 7] = torch.nan
    executor = make_executor(make_network(BASIC), policy)
    logits = executor.run(images, torch.ones(9, 3, dtype=torch.bool))
    for one in (logits, run_policy(executor, images)[2]):  # the policy's walk in groups
        assert one[4].isnan().all()
        assert one[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@compiled
@pytest.mark.parametrize("threads", [1, 2])
def test_memory_is_kept_between_calls(threads):
    """From the second call of a kind on, no pages are faulted in for activations."""
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    images = random_images(3, torch.float32, 112)
    executor = make_executor(make_network(BASIC), make_policy(images))
    for _ in range(2):
        executor.run_policy(images)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        executor.run_policy(images)
    # A thread's activations are 350 pages and more.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 100


@functools.cache
def _packed(config):
    return pack(fold_network(make_network(config), torch.float32), 1)


def arguments(**changes):
    """Arguments of ``walk_imagenet`` for two images through a small network, some replaced."""
    names = ("weights", "bottleneck", "layers", "channels", "widths", "num_classes", "winograd")
    network = _packed(BOTTLENECK)
    values = {
        "images": random_images(2, torch.float32, (16, 17)),
        "decisions": torch.tensor([[True, False, True], [False, True, True]]),
        **dict(zip(names, network, strict=True)),
    }
    return values | changes


def policy_arguments(**changes):
    """The rest of those of ``walk_imagenet_policy``."""
    policy = _packed(POLICY)
    names = ("weights", "bottleneck", "layers", "channels", "widths")
    values = {f"policy_{name}": one for name, one in zip(names, policy, strict=False)}
    return values | {"policy_winograd": 1, "pool": 2} | changes


def test_opcheck():
    values = arguments()
    operators = torch.ops.blockdrop_fast
    torch.library.opcheck(operators.walk_imagenet.default, tuple(values.values()))
    sets = arguments(decisions=torch.stack([values["decisions"], ~values["decisions"]]))
    torch.library.opcheck(operators.walk_imagenet.default, tuple(sets.values()))
    del values["decisions"]
    values |= policy_arguments()
    torch.library.opcheck(operators.walk_imagenet_policy.default, tuple(values.values()))


@pytest.mark.parametrize("config", [BASIC, BOTTLENECK, WIDE, NARROW])
@pytest.mark.parametrize("winograd", [0, 1, 2])
def test_reference_agrees_with_the_network(config, winograd):
    """The reference reads packed weights; in float64 it is the network, up to rounding."""
    network = make_network(config).double()
    images = random_images(3, torch.float64, (33, 40))
    decisions = random_decisions(torch.Generator().manual_seed(0), 2, 3, config.num_blocks)
    packed = pack(fold_network(network, torch.float64), winograd)
    logits = walk_imagenet_reference(images, decisions, *packed)
    with torch.no_grad():
        expected = torch.stack([network(images, one) for one in decisions])
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("function", [
    pytest.param(walk_imagenet, marks=compiled, id="walk"),
    pytest.param(walk_imagenet_reference, id="reference"),
])  # fmt: skip
@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.float64)}, TypeError, "images: expected dtype"),
    ({"images": torch.zeros(2, 1, 8, 8)}, ValueError, r"images: expected shape \(B, 3, H, W\)"),
    ({"images": torch.zeros(2, 3, 0, 8)}, ValueError, "must be positive, got 0x8"),
    ({"decisions": torch.ones(2, 3)}, TypeError, "decisions: expected dtype torch.bool"),
    ({"decisions": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "decisions: expected shape"),
    ({"decisions": torch.ones(3, 3, dtype=torch.bool)}, ValueError, "decisions: expected shape"),
    ({"weights": torch.zeros(7)}, ValueError, "weights: expected a vector of"),
    ({"layers": []}, ValueError, "layers: expected at least one segment"),
    ({"layers": [1, 0]}, ValueError, "layers: expected"),
    ({"layers": [2, 2]}, ValueError, "widths: expected a positive number for each of 4 blocks"),
    ({"widths": [16, 48, 20]}, ValueError, "weights: expected a vector of"),
    ({"widths": [16]}, ValueError, "widths: expected"),
    ({"widths": [16, 17, 20]}, ValueError, "weights: packed for another network than"),
    ({"layers": [1, 2], "widths": [16, 20, 16]}, ValueError, "weights: "),
    ({"channels": [64, -1]}, ValueError, "channels: expected"),
    ({"bottleneck": False}, ValueError, "weights: expected a vector of"),
    ({"num_classes": 0}, ValueError, "num_classes: expected at least 1"),
    ({"num_classes": 65}, ValueError, "weights: expected"),
    ({"winograd": 0}, ValueError, "weights: expected"),
    ({"winograd": -1}, ValueError, "winograd: expected at least 0"),
])  # fmt: skip
def test_bad_arguments(function, changes, error, message):
    with pytest.raises(error, match=message):
        function(*arguments(**changes).values())


@pytest.mark.parametrize("function", [
    pytest.param(walk_imagenet_policy, marks=compiled, id="walk"),
    pytest.param(walk_imagenet_policy_reference, id="reference"),
])  # fmt: skip
@pytest.mark.parametrize(("changes", "message"), [
    ({"policy_weights": torch.zeros(7)}, "policy_weights: expected a vector of"),
    ({"policy_channels": [32, 63]}, "policy_weights: packed for another network than"),
    ({"pool": 17}, "pool: expected 1 to the images' size, got 17"),
    ({"pool": 0}, "pool: expected 1 to the images' size, got 0"),
])  # fmt: skip
def test_bad_policy_arguments(function, changes, message):
    values = arguments()
    del values["decisions"]
    with pytest.raises(ValueError, match=message):
        function(*values.values(), *policy_arguments(**changes).values())


def test_unsupported_networks():
    def folded(config, dtype=torch.float32):
        return fold_network(make_network(config), dtype)

    with pytest.raises(ValueError, match="this walk supports stem 'imagenet' only, got 'cifar'"):
        WalkImageNetExecutor(fold_network(resnet_cifar(8), torch.float32))
    pooling = ResNetConfig("basic", (2, 1), (64, 80), "imagenet", "average_pool", 3)
    with pytest.raises(ValueError, match="shortcut 'projection' only, got 'average_pool'"):
        WalkImageNetExecutor(folded(pooling))
    with pytest.raises(TypeError, match=r"torch.float32 only, got torch.float64"):
        WalkImageNetExecutor(folded(BASIC, torch.float64))
    with pytest.raises(RuntimeError, match="has no policy network"):
        WalkImageNetExecutor(folded(BASIC)).run_policy(torch.zeros(1, 3, 8, 8))


def test_executor_takes_a_policy_that_the_walk_serves():
    executor = WalkImageNetExecutor(fold_network(make_network(BASIC), torch.float32))
    assert (executor.strategy, executor.logits_dtype) == ("walk", torch.float32)
    policy = fold_network(make_network(POLICY), torch.float32)
    images = torch.zeros(1, 3, 8, 8)
    for other in (
        fold_network(make_network(BOTTLENECK), torch.float32),  # 33 outputs
        fold_network(resnet_cifar(8, 3), torch.float32),
        fold_network(make_network(POLICY), torch.float64),
    ):
        assert executor.set_policy(policy, 2)
        logits, decisions = executor.run_policy(images)
        assert torch.equal(logits, executor.run(images, decisions))
        assert not executor.set_policy(other, 1)
        with pytest.raises(RuntimeError, match="has no policy network"):
            executor.run_policy(images)
