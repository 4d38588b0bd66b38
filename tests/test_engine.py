"""Every strategy of the engine against the float64 reference, and what the engine refuses."""

import copy
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import blockdrop_fast as bdf
from blockdrop_fast._extension import extension_status
from blockdrop_fast.executors import crossover
from blockdrop_fast.executors.gather import GatherExecutor
from blockdrop_fast.executors.layers import Conv
from blockdrop_fast.executors.walk import WalkExecutor
from blockdrop_fast.measure.tolerance import make_reference
from blockdrop_fast.networks.architectures import resnet50, resnet_imagenet
from blockdrop_fast.networks.folding import FoldedConv
from blockdrop_fast.networks.policy import PolicyNetwork
from blockdrop_fast.networks.resnet import ResNetConfig
from tests.random_networks import (
    BOTTLENECK,
    CIFAR,
    CUSTOM,
    GROUPED,
    IMAGES,
    NARROWER,
    keep_half,
    make_decisions,
    make_images,
    make_look_model,
    make_model,
    make_network,
    make_policy,
    random_images,
)

STRATEGIES = ["walk", "gather", "dense"]
KINDS = st.sampled_from(["all kept", "all dropped", "one image", "random", "random"])


def check(engine: bdf.Engine, logits, images, decisions) -> None:
    """Compare with the float64 reference under the tolerance rule."""
    assert logits.dtype == engine.dtype
    if engine.dtype == torch.float64:
        # The rule measures PyTorch's rounding against float64: there is none to measure here.
        with torch.no_grad():
            expected = copy.deepcopy(engine.backbone).double()(images, decisions)
        torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)
    else:
        backbone = copy.deepcopy(engine.backbone).eval()
        make_reference(backbone, images, decisions, engine.dtype).check(engine.strategy, logits)


def in_batches(engine: bdf.Engine, images, decisions, batch: int) -> torch.Tensor:
    parts = zip(images.split(batch), decisions.split(batch), strict=True)
    return torch.cat([engine.run(*part) for part in parts])


@contextmanager
def poisoned_memory():
    """Fresh memory of PyTorch's is full of NaN, so that unwritten elements show."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(64).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------ against the reference


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(1, 3),
    shortcut=st.sampled_from(["average_pool", "subsample"]),
    classes=st.sampled_from([1, 10, 100]),
    batch=st.sampled_from([1, 2, 7, 64]),
    kind=KINDS,
    seed=st.integers(0, 2**31),
)
def test_cifar_networks(strategy, n, shortcut, classes, batch, kind, seed):
    config = ResNetConfig("basic", (n, n, n), (16, 32, 64), "cifar", shortcut, classes)
    images, decisions = make_images(config, IMAGES, seed), make_decisions(kind, IMAGES, 3 * n, seed)
    engine = bdf.compile(make_network(config, seed), strategy=strategy)
    check(engine, in_batches(engine, images, decisions, batch), images, decisions)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["all kept", "random"])
def test_narrower_blocks(strategy, kind):
    images = make_images(NARROWER, IMAGES)
    decisions = make_decisions(kind, IMAGES, NARROWER.num_blocks)
    engine = bdf.compile(make_network(NARROWER), strategy=strategy)
    check(engine, in_batches(engine, images, decisions, 16), images, decisions)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "gather", "dense"])
@pytest.mark.parametrize("name", CUSTOM)
@settings(max_examples=4, deadline=None)
@given(batch=st.sampled_from([1, 5, 64]), kind=KINDS, seed=st.integers(0, 2**31))
def test_custom_networks(strategy, name, batch, kind, seed):
    config = CUSTOM[name]
    images = make_images(config, IMAGES, seed)
    decisions = make_decisions(kind, IMAGES, config.num_blocks, seed)
    engine = bdf.compile(make_network(config, seed), strategy=strategy)
    check(engine, in_batches(engine, images, decisions, batch), images, decisions)


@pytest.mark.parametrize("strategy", ["gather", "dense"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config", [CIFAR, BOTTLENECK, GROUPED], ids=["cifar", "bottleneck", "grouped"]
)
def test_dtypes(strategy, dtype, config):
    images = make_images(config, IMAGES, dtype=dtype)
    decisions = make_decisions("random", IMAGES, config.num_blocks)
    engine = bdf.compile(make_network(config), dtype=dtype, strategy=strategy)
    check(engine, in_batches(engine, images, decisions, 16), images, decisions)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "width_per_group"), [(32, 4), (1, 128)], ids=["resnext50_32x4d", "wide_resnet50_2"]
)
@pytest.mark.parametrize("batch", [1, 16])
def test_channels_of_resnext_and_wide_networks(groups, width_per_group, batch):
    """ImageNet's own widths and classes, few blocks."""
    with torch.device("meta"):
        few = resnet_imagenet((1, 1, 2, 1), groups=groups, width_per_group=width_per_group)
    network = make_network(few.config)
    images = random_images(IMAGES, torch.float32, (64, 48))
    decisions = make_decisions("random", IMAGES, 5)
    engine = bdf.compile(network)
    check(engine, in_batches(engine, images, decisions, batch), images, decisions)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=10, deadline=None)
@given(sets=st.integers(1, 4), data=st.data(), seed=st.integers(0, 2**31))
def test_sets(strategy, sets, data, seed):
    """Each set gives what it gives alone; sets fork anywhere, or nowhere, image by image."""
    num_blocks = CIFAR.num_blocks
    decisions = torch.stack(
        [make_decisions("random", IMAGES, num_blocks, seed + s) for s in range(sets)]
    )
    for s in range(1, sets):
        generator = torch.Generator().manual_seed(seed + s)
        low, high = data.draw(st.sampled_from([(0, 1), (0, num_blocks + 1), (num_blocks,) * 2]))
        forks = torch.randint(low, high + (low == high), (IMAGES, 1), generator=generator)
        earlier = decisions[data.draw(st.integers(0, s - 1))]
        decisions[s] = torch.where(torch.arange(num_blocks) < forks, earlier, decisions[s])
    images = make_images(CIFAR, IMAGES, seed)
    engine = bdf.compile(make_network(CIFAR, seed), strategy=strategy)
    logits = engine.run_sets(images, decisions)
    assert logits.shape == (sets, IMAGES, 10)
    for result, one in zip(logits, decisions, strict=True):
        check(engine, result, images, one)


@pytest.mark.parametrize("strategy", ["auto", "gather"])
@pytest.mark.parametrize("name", CUSTOM)
def test_sets_of_custom_networks(name, strategy):
    config = CUSTOM[name]
    images = make_images(config, IMAGES)
    decisions = torch.stack(
        [make_decisions("random", IMAGES, config.num_blocks, seed) for seed in (0, 1, 0)]
    )
    decisions[1, ::2, 0] = decisions[0, ::2, 0]
    engine = bdf.compile(make_network(config), strategy=strategy)
    for result, one in zip(engine.run_sets(images, decisions), decisions, strict=True):
        check(engine, result, images, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64, torch.bfloat16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_decisions_of_any_dtype(strategy, dtype):
    images, decisions = make_images(CIFAR, 6), make_decisions("random", 6, CIFAR.num_blocks)
    engine = bdf.compile(make_network(CIFAR), strategy=strategy)
    expected = engine.run(images, decisions)
    assert torch.equal(engine.run(images, decisions.to(dtype)), expected)
    sets = torch.stack([decisions, ~decisions])
    assert torch.equal(engine.run_sets(images, sets.to(dtype)), engine.run_sets(images, sets))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_element_is_written(strategy):
    model, images = make_model()
    engine = bdf.compile(model, strategy=strategy)
    sets = torch.stack([make_decisions("random", IMAGES, CIFAR.num_blocks, s) for s in range(3)])
    with poisoned_memory():
        output = engine(images)
        results = engine.run_sets(images, sets)
    check(engine, output.logits, images, output.decisions)
    for result, one in zip(results, sets, strict=True):
        check(engine, result, images, one)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_image_does_not_touch_another(strategy):
    """An image's logits stay the same, up to rounding, whatever the others of its batch are."""
    images, decisions = make_images(CIFAR, 8), make_decisions("random", 8, CIFAR.num_blocks)
    engine = bdf.compile(make_network(CIFAR), strategy=strategy)
    expected = engine.run(images, decisions)[3]
    others = torch.randn(images.shape, generator=torch.Generator().manual_seed(5)) * 100
    others[3], flipped = images[3], ~decisions
    flipped[3] = decisions[3]
    torch.testing.assert_close(engine.run(others, flipped)[3], expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ policy


class Probabilities(nn.Module):
    """A policy network with a backbone's signature, for ``make_reference``."""

    def __init__(self, policy: PolicyNetwork):
        super().__init__()
        self.policy = policy

    def forward(self, images, decisions=None):
        return self.policy(images)


def check_policy(engine: bdf.Engine, images: torch.Tensor) -> None:
    logits, decisions = engine(images)
    probabilities = engine.probabilities(images)
    policy = copy.deepcopy(engine.model.policy).eval()
    reference = make_reference(Probabilities(policy), images, None, engine.dtype)
    reference.check(f"{engine.strategy} policy", probabilities)
    assert decisions.dtype == torch.bool
    assert torch.equal(decisions, engine.decide(images))
    tied = probabilities == 0.5  # of a logit around zero, on either side of it
    assert torch.equal(decisions | tied, bdf.decide(probabilities) | tied)
    assert 0.2 < decisions.float().mean() < 0.8
    check(engine, logits, images, decisions)


@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [
        ("walk", torch.float32),
        ("gather", torch.float32),
        ("dense", torch.float32),
        ("gather", torch.bfloat16),
        ("auto", torch.bfloat16),
    ],
)
def test_policy(strategy, dtype):
    model, images = make_model()
    check_policy(bdf.compile(model, dtype=dtype, strategy=strategy), images.to(dtype))


@pytest.mark.parametrize("strategy", ["auto", "walk"])
def test_policy_that_the_walk_does_not_run(strategy):
    """A backbone that the walk runs with a policy network that it does not run."""
    images = make_images(CIFAR, IMAGES)
    backbone = make_network(CIFAR)
    config = ResNetConfig("basic", (1, 1), (8, 24), "cifar", "subsample", backbone.num_blocks)
    policy = PolicyNetwork(make_network(config, 1)).eval()
    keep_half(policy, images)
    engine = bdf.compile(bdf.BlockDrop(backbone, policy), strategy=strategy)
    if extension_status().loaded:
        assert engine.strategy == "walk"
    check_policy(engine, images)


def test_policy_beside_groups():
    model, images = make_model(GROUPED)
    check_policy(bdf.compile(model), images)


def test_policy_on_pooled_images():
    config = ResNetConfig("basic", (2, 1), (16, 20), "cifar", "average_pool", 5)
    images = torch.randn(IMAGES, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    model = bdf.BlockDrop(make_network(config), make_policy(3, images, pool=2))
    engine = bdf.compile(model)
    check_policy(engine, images)
    message = r"images: .* multiples of 4 for the policy network \(after pooling by 2\), got 7x12"
    for call in (engine, engine.probabilities):
        with pytest.raises(ValueError, match=message):
            call(images[:, :, :14])


LOOKS = {
    "walk": ("walk", torch.float32, CIFAR),
    "auto": ("auto", torch.float32, CIFAR),
    "gather": ("gather", torch.float32, CIFAR),
    "gather float64": ("gather", torch.float64, CIFAR),
    "dense float64": ("dense", torch.float64, CIFAR),
    "gather bottleneck": ("gather", torch.float64, BOTTLENECK),
    "gather bfloat16": ("gather", torch.bfloat16, CIFAR),
}
SETS = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 1, 1]]).bool()


class Looking(nn.Module):
    """The logits of a model's policy with a backbone's signature, for ``make_reference``."""

    def __init__(self, model: bdf.BlockDrop):
        super().__init__()
        self.model = model

    def forward(self, images, decisions=None):
        return self.model.policy_logits(images)


@pytest.mark.parametrize("sets", [None, SETS], ids=["thresholds", "menu"])
@pytest.mark.parametrize("case", LOOKS)
def test_policy_that_looks(case, sets):
    strategy, dtype, config = LOOKS[case]
    model, images = make_look_model(config, 1, sets)
    engine, images = bdf.compile(model, dtype=dtype, strategy=strategy), images.to(dtype)
    for budget in [None] if sets is None else [None, 1.5, 4.0]:
        logits, decisions = engine(images, budget=budget)
        assert decisions[:, 0].all()
        assert torch.equal(decisions, engine.decide(images, budget=budget))
        check(engine, logits, images, decisions)
        check(engine, engine.run(images, decisions), images, decisions)
        if dtype == torch.float64:
            expected = copy.deepcopy(model).double().decide(images, budget)
            assert torch.equal(decisions, expected)
            assert torch.equal(decisions[:1], engine(images[:1], budget=budget).decisions)
    assert not decisions.all()
    assert len(decisions.unique(dim=0)) > 1
    sets = torch.stack([decisions, torch.ones_like(decisions)])
    for result, one in zip(engine.run_sets(images, sets), sets, strict=True):
        check(engine, result, images, one)
    reference = make_reference(Looking(model), images, None, dtype)
    reference.check("the head's logits", engine._logits_of_policy(images))
    probabilities, decisions = engine.probabilities(images), engine.decide(images)
    tied = probabilities == 0.5
    assert torch.equal(decisions | tied, bdf.decide(probabilities) | tied)
    assert engine(images[:0]).decisions.shape == (0, config.num_blocks)


def test_auto_says_what_runs_twice():
    said = "; blocks 1 to 2, which the policy looks at, run twice"
    model, _ = make_look_model(after=2)
    assert not bdf.compile(model, strategy="walk").strategy_reason.endswith(said)
    model = bdf.BlockDrop(model.backbone, bdf.LookPolicy(CIFAR, 2, widths=(32, 32)))
    assert bdf.compile(model, strategy="walk").strategy_reason.endswith(said)


@pytest.mark.parametrize("sets", [None, SETS], ids=["thresholds", "menu"])
@pytest.mark.parametrize("size", [(32, 32), (8, 12), (20, 24)])
def test_the_walk_looks_on_its_way(sets, size, monkeypatch):
    """Where it serves the head and the images' size; decisions are those of the float64 model."""
    model, _ = make_look_model(CIFAR, 1, sets)
    images = random_images(IMAGES, torch.float32, size)
    engine = bdf.compile(model, strategy="walk")
    assert engine._looks_at(images) == (size != (20, 24))
    if size != (20, 24):
        monkeypatch.setattr(engine, "_look", None)
    for budget in [None] if sets is None else [None, 1.5, 4.0]:
        output = engine(images, budget)
        check(engine, output.logits, images, output.decisions)
        expected = copy.deepcopy(model).double().decide(images.double(), budget)
        assert (output.decisions == expected).all(1).float().mean() > 0.95
        for a, b in zip(engine(images[5:6], budget), output, strict=True):
            assert torch.equal(a, b[5:6])


def test_the_first_blocks_run_once_where_the_executor_can_begin_behind_them(monkeypatch):
    model, images = make_look_model(after=2)
    engine, ran = bdf.compile(model, strategy="gather"), []
    monkeypatch.setattr(engine._choice.executor, "run", _noting(engine._choice.executor, ran))
    engine(images)
    assert not ran


@pytest.mark.parametrize("strategy", ["gather", "dense"])
def test_policy_that_looks_is_a_snapshot_until_refreshed(strategy):
    model, images = make_look_model()
    engine = bdf.compile(model, strategy=strategy)
    old = engine(images)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.1)
    again = engine(images)
    assert torch.equal(again.logits, old.logits)
    engine.refresh()
    new = engine(images)
    assert not torch.allclose(new.logits, old.logits, rtol=1e-3)
    check(engine, new.logits, images, new.decisions)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bare_backbone_keeps_everything(strategy):
    images, backbone = make_images(CIFAR, IMAGES), make_network(CIFAR)
    engine = bdf.compile(backbone, strategy=strategy)
    logits, decisions = engine(images)
    assert decisions.dtype == torch.bool
    assert decisions.shape == (IMAGES, CIFAR.num_blocks)
    assert decisions.all()
    check(engine, logits, images, None)
    with pytest.raises(RuntimeError, match=r"probabilities: .* bare backbone"):
        engine.probabilities(images)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_empty_batch(strategy):
    model, _ = make_model()
    engine = bdf.compile(model, strategy=strategy)
    images, decisions = make_images(CIFAR, 0), torch.empty(0, CIFAR.num_blocks)
    output = engine(images)
    assert output.logits.shape == engine.run(images, decisions).shape == (0, 10)
    assert output.decisions.shape == (0, CIFAR.num_blocks)
    assert output.decisions.dtype == torch.bool
    assert engine.probabilities(images).shape == (0, CIFAR.num_blocks)
    sets = engine.run_sets(images, decisions.expand(3, -1, -1))
    assert sets.shape == (3, 0, 10)
    assert sets.dtype == output.logits.dtype == torch.float32


# ------------------------------------------------------------------ what stays as it is


def snapshot(model: nn.Module) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_model_in_train_mode_stays_as_it_is(strategy):
    model, images = make_model()
    model.train()
    model.policy.eval()
    before, modes = snapshot(model), [module.training for module in model.modules()]
    engine = bdf.compile(model, strategy=strategy)
    logits, decisions = engine(images)
    engine.run_sets(images, torch.stack([decisions, ~decisions]))
    engine.refresh()
    check(engine, logits, images, decisions)
    assert modes == [module.training for module in model.modules()]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_engine_is_a_snapshot_until_refreshed(strategy, dtype):
    if strategy == "walk" and dtype != torch.float32:
        pytest.skip("the walk is float32")
    model, images = make_model()
    # In the model's own dtype, where a conversion would not copy.
    model, images = model.to(dtype), images.to(dtype)
    engine = bdf.compile(model, dtype=dtype, strategy=strategy)
    old = engine(images)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.1)
    again = engine(images)
    assert torch.equal(again.logits, old.logits)
    assert torch.equal(again.decisions, old.decisions)
    engine.refresh()
    new = engine(images)
    assert not torch.allclose(new.logits, old.logits, rtol=1e-3)
    check(engine, new.logits, images, new.decisions)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_arguments_of_any_strides_are_not_modified(strategy):
    model, images = make_model()
    engine = bdf.compile(model, strategy=strategy)
    decisions = engine(images).decisions
    height, width = images.shape[2:]
    transposed = torch.empty(IMAGES, width, height, 3).permute(0, 3, 2, 1)
    sliced = torch.zeros(2 * IMAGES, 3, height, 3 * width)[::2, :, :, ::3]
    forms = {
        "contiguous": images.clone(),
        "channels-last": images.contiguous(memory_format=torch.channels_last),
        "transposed": transposed.copy_(images),
        "sliced": sliced.copy_(images),
        "inference": torch.inference_mode()(images.clone)(),
        "differentiable": images.clone().requires_grad_(),
    }
    wide = torch.zeros(IMAGES, 2 * CIFAR.num_blocks, dtype=torch.bool)[:, ::2].copy_(decisions)
    sets = torch.stack([decisions, ~decisions], dim=2).permute(2, 0, 1)
    for name, form in forms.items():
        strides = form.stride()
        check(engine, engine(form).logits, images, decisions)
        check(engine, engine.run(form, wide), images, decisions)
        check(engine, engine.run_sets(form, sets)[1], images, ~decisions)
        assert torch.equal(form.detach(), images), name
        assert form.stride() == strides, name
        assert torch.equal(wide, decisions), name
        assert torch.equal(sets[0], decisions), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_autocast_does_not_reach_the_engine(strategy):
    """The engine computes in its dtype, and what it refuses it refuses under autocast, too."""
    model, images = make_model()
    engine = bdf.compile(model, strategy=strategy)
    expected = engine(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = engine(images)
        assert torch.is_autocast_enabled("cpu")
        with pytest.raises(TypeError, match=r"images: expected dtype torch.float32"):
            engine(images.bfloat16())
    assert found.logits.dtype == torch.float32
    check(engine, found.logits, images, expected.decisions)


FORKED = """
import os, torch, blockdrop_fast as bdf
from tests.random_networks import make_model
torch.set_num_threads(2)
model, images = make_model()
engine = bdf.compile(model)
expected = engine(images).logits  # starts the threads that a child does not have
workers = torch.utils.data.DataLoader(images.split(16), None, num_workers=2, timeout=60,
                                      collate_fn=lambda images: engine(images).logits,
                                      multiprocessing_context="fork")
assert torch.equal(torch.cat(list(workers)), expected)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(engine(images).logits, expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_forked_processes_call_an_engine():
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=120)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_threads_at_once(strategy):
    model, images = make_model()
    engine = bdf.compile(model, strategy=strategy)
    decisions = [make_decisions("random", IMAGES, CIFAR.num_blocks, seed) for seed in (0, 1)]
    references = [make_reference(model.backbone, images, one, torch.float32) for one in decisions]

    def repeat(which: int) -> None:
        for _ in range(15):
            references[which].check("thread", engine.run(images, decisions[which]))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(repeat, (0, 1)))


def test_reference_notices_wrong_logits():
    """The checks above do see a single wrong element."""
    images, backbone = make_images(CIFAR, IMAGES), make_network(CIFAR)
    engine = bdf.compile(backbone, strategy="dense")
    logits = engine(images).logits.clone()
    for wrong in (1e-3, torch.nan):
        spoilt = logits.clone()
        spoilt[17, 3] += wrong
        with pytest.raises(AssertionError, match="dense: logits are off"):
            check(engine, spoilt, images, None)


# ------------------------------------------------------------------ strategies


def test_auto_says_why():
    on_cpu = bdf.compile(make_network(CIFAR))
    if extension_status().loaded:
        assert (on_cpu.strategy, on_cpu.strategy_reason) == (
            "walk",
            "the fastest for this network on a CPU",
        )
    else:
        assert on_cpu.strategy == "gather"
        assert "compiled extension" in on_cpu.strategy_reason
        return
    narrower = bdf.compile(make_network(NARROWER)).strategy_reason
    assert narrower.endswith(
        "narrower blocks are padded to their segment's width, and take its time"
    )


def test_a_strategy_that_was_asked_for():
    asked = bdf.compile(make_network(CIFAR), strategy="dense")
    assert (asked.strategy, asked.strategy_reason) == ("dense", "asked for")


@pytest.mark.skipif(not extension_status().loaded, reason="the walk is not chosen without it")
def test_auto_gathers_where_the_walk_cannot():
    engine = bdf.compile(make_network(CUSTOM["cifar bottleneck"]))
    assert engine.strategy == "gather"
    assert "the walk supports block 'basic' only" in engine.strategy_reason
    engine = bdf.compile(make_network(CUSTOM["imagenet average pool"]))
    assert engine.strategy == "gather"
    assert "supports shortcut 'projection' only" in engine.strategy_reason
    engine = bdf.compile(make_network(GROUPED))
    assert engine.strategy == "gather"
    assert "3x3 convolutions of one group only, got 4" in engine.strategy_reason
    engine = bdf.compile(make_network(replace(CIFAR, block_widths=(17, 16, 32, 64, 64))))
    assert engine.strategy == "gather"
    assert "up to (16, 32, 64) channels inside blocks only, got (17," in engine.strategy_reason
    engine = bdf.compile(make_network(CIFAR), dtype=torch.float64)
    assert engine.strategy == "gather"
    assert "torch.float32 only" in engine.strategy_reason


@pytest.mark.skipif(not extension_status().loaded, reason="the walk is not chosen without it")
@pytest.mark.parametrize("kind", ["all kept", "random"])
def test_auto_walks_wide_networks(kind):
    """Blocks may be wider inside than a quarter of what they give, or narrower."""
    config = CUSTOM["wide"]
    engine = bdf.compile(make_network(config))
    assert engine.strategy == "walk"
    images = make_images(config, IMAGES)
    decisions = make_decisions(kind, IMAGES, config.num_blocks)
    check(engine, in_batches(engine, images, decisions, 16), images, decisions)


# ------------------------------------------------------------------ bad input


@pytest.fixture(scope="module")
def engine():
    model, _ = make_model()
    return bdf.compile(model, strategy="gather")


def images_with(value: float) -> torch.Tensor:
    images = make_images(CIFAR, 2)
    images[1, 2, 3, 4] = value
    return images


BAD_IMAGES = [
    ([[0.0]], TypeError, "images: expected a torch.Tensor, got list"),
    (torch.zeros(2, 3, 8, 8, dtype=torch.float64), TypeError, "expected dtype torch.float32"),
    (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError, "expected dtype torch.float32"),
    (torch.zeros(2, 3, 8, 8, device="meta"), TypeError, "images: expected a tensor with values"),
    (
        torch.zeros(2, 3, 8, 8).to_sparse(),
        TypeError,
        "images: expected a dense tensor, got torch.sparse_coo of torch.float32",
    ),
    (torch.zeros(2, 1, 8, 8), ValueError, r"images: expected shape \(B, 3, H, W\), got \(2, 1,"),
    (torch.zeros(3, 8, 8), ValueError, r"images: expected shape \(B, 3, H, W\), got \(3, 8, 8\)"),
    (torch.zeros(2, 3, 8, 10), ValueError, "positive multiples of 4, got 8x10"),
    (torch.zeros(2, 3, 0, 8), ValueError, "positive multiples of 4, got 0x8"),
    (images_with(torch.nan), ValueError, "images: contain NaN or infinite values"),
    (images_with(-torch.inf), ValueError, "images: contain NaN or infinite values"),
]


@pytest.mark.parametrize(("images", "error", "message"), BAD_IMAGES)
def test_bad_images(engine, images, error, message):
    decisions = torch.ones(2, CIFAR.num_blocks)
    for call in (
        engine,
        engine.probabilities,
        lambda images: engine.run(images, decisions),
        lambda images: engine.run_sets(images, decisions[None]),
    ):
        with pytest.raises(error, match=message):
            call(images)


BAD_DECISIONS = [
    ([[1, 0, 1, 0, 1]] * 2, TypeError, "decisions: expected a torch.Tensor, got list"),
    (torch.ones(2, 4), ValueError, r"decisions: expected shape \(B, K\) = \(2, 5\), got \(2, 4\)"),
    (torch.ones(3, 5), ValueError, r"decisions: expected shape \(B, K\) = \(2, 5\), got \(3, 5\)"),
    (
        torch.ones(2, 5, device="meta"),
        TypeError,
        "decisions: expected a tensor with values, got",
    ),
    (torch.ones(2, 5).to_sparse(), TypeError, "decisions: expected a dense tensor, got .*sparse"),
    (torch.full((2, 5), 0.5), ValueError, "decisions: expected only 0 and 1, got 0.5"),
    (torch.full((2, 5), 2), ValueError, "decisions: expected only 0 and 1, got 2"),
    (torch.full((2, 5), torch.nan), ValueError, "decisions: expected only 0 and 1, got nan"),
    (torch.ones(2, 5, dtype=torch.complex64), TypeError, "decisions: expected bool or 0/1"),
]


@pytest.mark.parametrize(("decisions", "error", "message"), BAD_DECISIONS)
def test_bad_decisions(engine, decisions, error, message):
    images = make_images(CIFAR, 2)
    with pytest.raises(error, match=message):
        engine.run(images, decisions)
    sets = decisions[None] if isinstance(decisions, torch.Tensor) else [decisions]
    with pytest.raises(error, match=message):
        engine.run_sets(images, sets)


@pytest.mark.parametrize("shape", [(2, 5), (0, 2, 5), (1, 1, 2, 5)])
def test_bad_sets(engine, shape):
    with pytest.raises(ValueError, match=r"decisions: expected shape \(S, B, K\) with S at least"):
        engine.run_sets(make_images(CIFAR, 2), torch.ones(shape))
    with pytest.raises(ValueError, match=r"decisions: expected shape \(S, B, K\) with S at least"):
        engine.run_sets(make_images(CIFAR, 0), torch.ones(shape))


def half_on_meta():
    model, _ = make_model()
    model.policy.to("meta")
    return model


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (
            nn.Linear(1, 1),
            {},
            TypeError,
            "model: expected BlockDrop, .*, got Linear",
        ),
        (None, {}, TypeError, "model: expected BlockDrop, ResNet or Cascade, got NoneType"),
        (CIFAR, {"dtype": torch.int8}, TypeError, "dtype: expected one of .*, got torch.int8"),
        (CIFAR, {"dtype": "float32"}, TypeError, "dtype: expected one of .*, got float32"),
        (CIFAR, {"strategy": "run"}, ValueError, "strategy: expected 'auto', .* got 'run'"),
        (CIFAR, {"strategy": None}, ValueError, "strategy: expected 'auto', .* got None"),
        (
            CIFAR,
            {"strategy": "walk", "dtype": torch.float64},
            TypeError,
            "the walk supports torch.float32 only, got torch.float64",
        ),
        (
            CUSTOM["cifar bottleneck"],
            {"strategy": "walk"},
            ValueError,
            "walk supports block 'basic' only, got 'b",
        ),
        (GROUPED, {"strategy": "walk"}, ValueError, "walk supports .* of one group only, got 4"),
    ],
)
def test_compile_refuses(model, options, error, message):
    model = make_network(model) if isinstance(model, ResNetConfig) else model
    with pytest.raises(error, match=message):
        bdf.compile(model, **options)


def test_compile_refuses_models_without_values_or_on_two_devices():
    with torch.device("meta"):
        empty = resnet50()
    with pytest.raises(ValueError, match="model: expected weights, those on the meta device"):
        bdf.compile(empty)
    with pytest.raises(ValueError, match=r"model: expected on one device, .* on cpu and meta"):
        bdf.compile(half_on_meta())


def test_failed_call_leaves_the_engine_usable(engine):
    images = make_images(CIFAR, IMAGES)
    decisions = make_decisions("random", IMAGES, CIFAR.num_blocks)
    with pytest.raises(ValueError, match="decisions"):
        engine.run(images, decisions[:1])
    check(engine, engine.run(images, decisions), images, decisions)


def measured(batch: int, **milliseconds: float) -> list[crossover.Cell]:
    seconds = {name: value / 1e3 for name, value in milliseconds.items()}
    return [crossover.Cell(batch, keep, seconds) for keep in (0.5, 1.0)]


def test_goes_by_what_was_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("BLOCKDROP_CACHE", str(tmp_path))
    cells = measured(8, dense=1, gather=2) + measured(64, dense=2, gather=1)
    config = CUSTOM["imagenet average pool"]
    path = crossover.save(config, torch.float32, "cpu", cells)
    for strategy in ("auto", "gather"):
        engine = bdf.compile(make_network(config), strategy=strategy)
        assert engine.strategy == "gather"
        assert str(path) in engine.strategy_reason
        assert [engine._choice.executor._dense_from(batch) for batch in (8, 64)] == [0.5, 2.0]
    # Measured in another precision: not for this one.
    other = bdf.compile(make_network(config), dtype=torch.bfloat16)
    assert str(path) not in other.strategy_reason


@pytest.mark.skipif(not extension_status().loaded, reason="no compiled kernels: no walk")
def test_gathers_where_the_walk_was_measured_to_lose(monkeypatch, tmp_path):
    monkeypatch.setenv("BLOCKDROP_CACHE", str(tmp_path))
    cells = measured(8, dense=2, gather=1, walk=3) + measured(64, dense=3, gather=2, walk=1)
    path = crossover.save(CIFAR, torch.float32, "cpu", cells)
    model, images = make_model()
    engine = bdf.compile(model)
    assert engine.strategy == "walk"
    assert str(path) in engine.strategy_reason
    ran = []
    for executor in (engine._choice.executor, engine._choice.where_walk_loses):
        monkeypatch.setattr(executor, "run", _noting(executor, ran))
    decisions = make_decisions("random", IMAGES, 5)
    check(engine, in_batches(engine, images, decisions, 8), images, decisions)
    assert {type(executor) for executor in ran} == {GatherExecutor}
    output = engine(images[:8])
    torch.testing.assert_close(output.logits, engine.run(images[:8], output.decisions))
    ran.clear()
    check(engine, engine.run(images, decisions), images, decisions)
    assert {type(executor) for executor in ran} == {WalkExecutor}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("compiled_in_inference_mode", [False, True])
@pytest.mark.parametrize("called_in_inference_mode", [False, True])
def test_outputs_are_ordinary_tensors(
    strategy, compiled_in_inference_mode, called_in_inference_mode
):
    """A layer that trains takes them, whatever mode the engine was made and called in."""
    model, images = make_model()
    with torch.inference_mode(compiled_in_inference_mode):
        engine = bdf.compile(model, strategy=strategy)
    with torch.inference_mode(called_in_inference_mode):
        logits, decisions = engine(images[:4])
        outputs = [logits, engine.run(images[:4], decisions), engine.probabilities(images[:4])]
        outputs.append(engine.run_sets(images[:4], decisions[None])[0])
    assert not any(output.is_inference() for output in (*outputs, decisions))
    for output in outputs:
        layer = nn.Linear(output.shape[1], 2)
        layer(output).sum().backward()
        assert layer.weight.grad is not None


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("logit", [-5e-8, -0.0, 0.0, 5e-8])
def test_keeps_where_the_logit_is_not_negative(strategy, logit):
    """Of logits around zero the sigmoids are 0.5: decisions go by the logit."""
    model, images = make_model()
    with torch.no_grad():
        model.policy.network.fc.weight.zero_()
        model.policy.network.fc.bias.fill_(logit)
    engine = bdf.compile(model, strategy=strategy)
    assert (engine.probabilities(images[:2]) == 0.5).all()
    images = images[:2]
    for decisions in (engine(images).decisions, engine.decide(images), model(images).decisions):
        assert torch.equal(decisions, torch.full_like(decisions, logit >= 0))


def _noting(executor, ran: list):
    run = executor.run

    def call(*arguments):
        ran.append(executor)
        return run(*arguments)

    return call


def test_adds_to_images_of_one_pixel():
    """What oneDNN refuses to fuse is computed all the same."""
    weight, bias = torch.randn(8, 8, 3, 3), torch.randn(8)
    conv = Conv(FoldedConv(weight.contiguous(memory_format=torch.channels_last), bias, 1, 1))
    x, other = (torch.randn(2, 8, 1, 1) for _ in range(2))
    expected = (torch.nn.functional.conv2d(x, weight, bias, padding=1) + other).relu()
    torch.testing.assert_close(conv.add_relu(x, other), expected)


def test_refresh_keeps_what_graphs_of_the_caller_use(monkeypatch):
    model, images = make_model()
    engine = bdf.compile(model)
    old = weakref.ref(engine._choice.executor)
    with monkeypatch.context() as capturing:
        capturing.setattr("blockdrop_fast.engine.is_capturing", lambda device: True)
        engine(images)
    engine.refresh()
    assert old() is not None
    old = weakref.ref(engine._choice.executor)
    engine(images)
    engine.refresh()
    assert old() is None
