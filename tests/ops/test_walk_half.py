"""The 16-bit walk: the CUDA kernel's own device code on the CPU, against its reference.

``tests/simt`` runs it, one fiber a CUDA thread. That shim also fails (aborts) on races between
barriers, on accesses out of bounds, and poisons all memory with NaN.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import itertools
import subprocess
from pathlib import Path

import pytest
import torch

from blockdrop_fast import BlockDrop, engine
from blockdrop_fast._extension import extension_status
from blockdrop_fast.executors import choice
from blockdrop_fast.executors.walk_half import WalkHalfExecutor
from blockdrop_fast.measure.tolerance import make_reference
from blockdrop_fast.networks.architectures import resnet_cifar
from blockdrop_fast.networks.folding import fold_network
from blockdrop_fast.networks.resnet import ResNet
from blockdrop_fast.ops.walk_half import (
    walk_half,
    walk_half_policy,
    walk_half_reference,
)
from tests.random_networks import (
    IMAGES,
    NEAR_ZERO,
    keep_half,
    make_policy,
    make_policy_of_logits,
    random_decisions,
)
from tests.random_networks import make_cifar_network as make_network
from tests.random_networks import random_images as make_images
from tests.simt.build import compile_for_cpu, needs_compiler

DTYPES = [torch.bfloat16, torch.float16]
CLUSTERS = 0  # "thread blocks" that stand for a cluster an image, as for small batches


class _Call(ctypes.Structure):
    """``Call`` of tests/simt/walk_half_on_cpu.cpp."""

    _fields_ = (
        ("images", ctypes.c_void_p),
        ("given", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("num_images", ctypes.c_int64),
        ("num_paths", ctypes.c_int64),
        ("num_blocks", ctypes.c_int64),
        ("weights", ctypes.c_void_p * 2),
        ("layers", (ctypes.c_int64 * 3) * 2),
        ("num_classes", ctypes.c_int64 * 2),
        ("subsample", ctypes.c_int64 * 2),
        ("logits", ctypes.c_void_p),
        ("decisions", ctypes.c_void_p),
        ("policy_logits", ctypes.c_void_p),
    )


class Simulator:
    """Calls the kernel as the operators do, on the CPU."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self._run = self.library.run_walk
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        self._run.restype = None

    def walk(self, images, decisions, network, *, thread_blocks=2, order=None):
        """``walk_half`` of an executor's packed network."""
        logits = torch.full((*decisions.shape[:-1], network[2]), torch.nan)
        call = self._call(images, decisions.shape[:-1].numel(), logits, network)
        decisions = decisions.contiguous()
        call.given = decisions.data_ptr()
        call.order = None if order is None else order.data_ptr()
        self._run(ctypes.addressof(call), thread_blocks, images.dtype == torch.bfloat16)
        return logits

    def walk_policy(self, images, network, policy, *, thread_blocks=2):
        """``walk_half_policy`` of an executor's packed networks."""
        num_blocks = sum(network[1])
        logits = torch.full((len(images), network[2]), torch.nan)
        policy_logits = torch.full((len(images), num_blocks), torch.nan)
        decisions = torch.full((len(images), num_blocks), 0xFF, dtype=torch.uint8)
        call = self._call(
            images, len(images), logits, network, (policy[0], policy[1], num_blocks, False)
        )
        call.decisions, call.policy_logits = decisions.data_ptr(), policy_logits.data_ptr()
        self._run(ctypes.addressof(call), thread_blocks, images.dtype == torch.bfloat16)
        assert decisions.max() <= 1  # all are written
        return logits, decisions.bool(), policy_logits

    @staticmethod
    def _call(images, num_paths, logits, *networks):
        assert images.is_contiguous()
        call = _Call(images=images.data_ptr(), num_images=len(images), num_paths=num_paths)
        call.num_blocks, call.logits = sum(networks[0][1]), logits.data_ptr()
        for i, (weights, layers, num_classes, subsample) in enumerate(networks):
            call.weights[i] = weights.data_ptr()
            call.layers[i][:] = layers
            call.num_classes[i], call.subsample[i] = num_classes, subsample
        return call


@pytest.fixture(scope="module")
def simulators(tmp_path_factory):
    """stmatrix -> the device code as for sm_90, which has that instruction, or as for sm_80."""

    @functools.cache
    def make(stmatrix: bool) -> Simulator:
        library = tmp_path_factory.mktemp("simt") / f"walk{int(stmatrix)}.so"
        flags = ("-shared", "-fPIC", f"-DSIMT_HAS_STMATRIX={int(stmatrix)}")
        return Simulator(compile_for_cpu("walk_half_on_cpu.cpp", library, *flags))

    return make


@pytest.fixture(params=[True, False], ids=["stmatrix", "without stmatrix"])
def simulator(request, simulators) -> Simulator:
    return simulators(request.param)


@pytest.fixture
def sm90(simulators) -> Simulator:
    """Only sm_90 has clusters."""
    return simulators(True)


def make_executor(network: ResNet, dtype, policy=None) -> WalkHalfExecutor:
    executor = WalkHalfExecutor(fold_network(network, dtype))
    if policy is not None:
        assert executor.set_policy(fold_network(policy.network, dtype), 1)
    return executor


@functools.cache
def shared_network(layers, shortcut, num_classes) -> ResNet:
    """A network that tests share, and its tolerance with it; not to be changed."""
    return make_network(layers, shortcut, num_classes)


@functools.cache
def tolerance_of(network: ResNet, dtype) -> float:
    """The error allowed: by the rule of ``make_reference``, over 64 images on random paths."""
    paths = random_decisions(torch.Generator().manual_seed(7), IMAGES, network.num_blocks)
    return make_reference(network, make_images(IMAGES, dtype), paths, dtype).tolerance


def assert_right(logits, network: ResNet, images, decisions, tolerance: float) -> None:
    """Compare with the float64 network."""
    with torch.no_grad():
        y64 = copy.deepcopy(network).double()(images.double(), decisions)
    error = float((logits - y64).abs().max())
    assert error <= tolerance, f"error {error:.3g}, limit {tolerance:.3g}"


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shortcut", ["average_pool", "subsample"])
def test_every_path(simulator, dtype, shortcut):
    """All 16 ways through a network of every kind of block, more paths than thread blocks."""
    network = shared_network((1, 2, 1), shortcut, 7)
    packed = make_executor(network, dtype)._network
    paths = torch.tensor(list(itertools.product([False, True], repeat=4)))
    images = make_images(2, dtype)
    decisions = paths[:, None].expand(16, 2, 4).contiguous()
    logits = simulator.walk(images, decisions, packed, thread_blocks=3)
    tolerance = tolerance_of(network, dtype)
    for result, one in zip(logits, decisions, strict=True):
        assert_right(result, network, images, one, tolerance)
    # What the reference computes, but for the order of sums and the roundings that it turns.
    reference = walk_half_reference(images, decisions, *packed)
    assert (logits - reference).abs().max() <= 4 * torch.finfo(dtype).eps * reference.abs().max()


@needs_compiler
@pytest.mark.parametrize("keep", ["random", "all", "none"])
def test_deep_network_of_one_image(simulator, keep):
    """More than 32 blocks, one image, one thread block."""
    network = shared_network((13, 12, 12), "average_pool", 300)
    decisions = random_decisions(torch.Generator().manual_seed(5), 1, 37)
    if keep != "random":
        decisions.fill_(keep == "all")
    images = make_images(1)
    packed = make_executor(network, torch.bfloat16)._network
    logits = simulator.walk(images, decisions, packed, thread_blocks=1)
    assert_right(logits, network, images, decisions, tolerance_of(network, torch.bfloat16))


def make_deciding(dtype, policy_layers):
    """Backbone, policy network, their executor and images for which it keeps and drops."""
    network = make_network((1, 1, 1), "subsample", num_classes=1)
    policy = make_policy(3)
    policy.network = make_network(policy_layers, "average_pool", 3, seed=1)
    images = make_images(8, dtype)
    keep_half(policy, images)
    return network, policy, make_executor(network, dtype, policy), images


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy_layers", [(1, 1, 1), (2, 1, 2)])
def test_policy_decides(simulator, dtype, policy_layers):
    """Also a policy network of more blocks than the backbone has."""
    network, policy, executor, images = make_deciding(dtype, policy_layers)
    logits, decisions, policy_logits = simulator.walk_policy(
        images, executor._network, executor._policy, thread_blocks=3
    )
    assert torch.equal(decisions, policy_logits >= 0)
    assert 0.2 < decisions.float().mean() < 0.8
    everything = torch.ones(8, sum(policy_layers), dtype=torch.bool)
    tolerance = tolerance_of(policy.network, dtype)
    assert_right(policy_logits, policy.network, images, everything, tolerance)
    assert_right(logits, network, images, decisions, tolerance_of(network, dtype))
    assert torch.equal(logits, simulator.walk(images, decisions, executor._network))


@needs_compiler
@pytest.mark.parametrize("thread_blocks", [2, CLUSTERS])
def test_keeps_where_the_logit_is_not_negative(sm90, thread_blocks):
    """Also where float32 rounds the sigmoid of a negative logit to 0.5."""
    policy = make_policy_of_logits(NEAR_ZERO)
    executor = make_executor(make_network((2, 2, 2)), torch.bfloat16, policy)
    networks = (executor._network, executor._policy)
    _, decisions, policy_logits = sm90.walk_policy(
        make_images(1), *networks, thread_blocks=thread_blocks
    )
    assert torch.equal(policy_logits[0], torch.tensor(NEAR_ZERO).bfloat16().float())
    assert decisions[0].tolist() == [logit >= 0 for logit in NEAR_ZERO]


@needs_compiler
def test_no_bank_conflicts(sm90):
    """Loads and stores of matrices, but where a convolution takes every second pixel."""
    packed = make_executor(make_network((1, 2, 2)), torch.bfloat16)._network
    counts = (ctypes.c_int64 * 2)()
    per_block = {}
    for block in (None, 0, 1, 2, 3, 4):
        decisions = torch.tensor([[k == block for k in range(5)]])
        sm90.walk(make_images(1), decisions, packed, thread_blocks=1)
        sm90.library.count_matrices(ctypes.byref(counts), ctypes.byref(counts, 8))
        matrices, conflicts = counts
        assert conflicts == 0 or block in (1, 3)
        per_block[block] = matrices
    stem = per_block[None]
    # Clocks for input, output and residual; csrc/cuda/NOTES.md reckons with them.
    assert stem == 960 + 256
    assert per_block[0] - stem == 2 * (960 + 256) + 256
    assert per_block[2] - stem == 2 * (960 + 128) + 128
    assert per_block[4] - stem == 2 * (384 + 64) + 64


@needs_compiler
def test_same_logits_whoever_walks(simulator):
    """Bit for bit: any number of thread blocks, any order, whatever was walked before."""
    packed = make_executor(make_network((2, 1, 1)), torch.bfloat16)._network
    images = make_images(7)
    decisions = random_decisions(torch.Generator().manual_seed(1), 7, 4)
    expected = simulator.walk(images, decisions, packed, thread_blocks=7)
    order = torch.tensor([3, 6, 0, 2, 5, 1, 4], dtype=torch.int32)
    for thread_blocks in (1, 2, 7):
        result = simulator.walk(images, decisions, packed, thread_blocks=thread_blocks, order=order)
        assert torch.equal(result, expected)


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "shortcut"), [(torch.bfloat16, "average_pool"), (torch.float16, "subsample")]
)
def test_clusters_on_every_path(sm90, dtype, shortcut):
    """The bits of one thread block an image: sums are added in the same order."""
    packed = make_executor(shared_network((1, 2, 1), shortcut, 7), dtype)._network
    images = make_images(1, dtype)
    decisions = torch.tensor(list(itertools.product([False, True], repeat=4)))[:, None]
    logits = torch.stack([
        sm90.walk(images, one, packed, thread_blocks=CLUSTERS) for one in decisions
    ])  # fmt: skip
    assert torch.equal(logits, sm90.walk(images, decisions, packed, thread_blocks=3))
    reference = walk_half_reference(images, decisions, *packed)
    assert (logits - reference).abs().max() <= 4 * torch.finfo(dtype).eps * reference.abs().max()


@needs_compiler
def test_cluster_in_a_deep_network(sm90):
    """Gaps of dropped blocks, and more classes than a thread block has threads."""
    network = shared_network((13, 12, 12), "average_pool", 300)
    decisions = random_decisions(torch.Generator().manual_seed(5), 1, 37)
    images = make_images(1)
    packed = make_executor(network, torch.bfloat16)._network
    logits = sm90.walk(images, decisions, packed, thread_blocks=CLUSTERS)
    assert_right(logits, network, images, decisions, tolerance_of(network, torch.bfloat16))


@needs_compiler
def test_clusters_decide_alike(sm90):
    """Every thread block of a cluster computes the decisions; several clusters."""
    *_, executor, images = make_deciding(torch.bfloat16, (2, 1, 2))
    networks = (executor._network, executor._policy)
    results = sm90.walk_policy(images[:3], *networks, thread_blocks=CLUSTERS)
    for result, expected in zip(results, sm90.walk_policy(images[:3], *networks), strict=True):
        assert torch.equal(result, expected)
    assert 0 < results[1].float().mean() < 1


@needs_compiler
def test_clusters_take_images_in_order(sm90):
    """Sets of decisions, an order, and NaN in one image."""
    packed = make_executor(shared_network((1, 2, 1), "average_pool", 7), torch.float16)._network
    images = make_images(2, torch.float16)
    images[1, 2, 31, 4] = torch.nan
    decisions = random_decisions(torch.Generator().manual_seed(2), 4, 4).view(2, 2, 4)
    order = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    logits = sm90.walk(images, decisions, packed, thread_blocks=CLUSTERS, order=order)
    expected = sm90.walk(images, decisions, packed)
    assert torch.equal(logits.nan_to_num(7), expected.nan_to_num(7))
    assert logits[:, 0].isfinite().all()
    assert logits[:, 1].isnan().any()


@needs_compiler
def test_nan_stays_with_its_image(simulator):
    packed = make_executor(make_network((1, 1, 1)), torch.bfloat16)._network
    images = make_images(3)
    images[1, 2, 4, 4] = torch.nan
    decisions = torch.ones(2, 3, 3, dtype=torch.bool)
    decisions[1] = False
    logits = simulator.walk(images, decisions, packed, thread_blocks=1)
    assert logits[0, 1].isnan().all()
    assert logits[1, 1].isnan().any()
    assert logits[:, [0, 2]].isfinite().all()


@needs_compiler
@pytest.mark.parametrize(("fault", "message"), [
    ("none", None),
    ("read-without-barrier", "between the same barriers"),
    ("write-without-barrier", "between the same barriers"),
    ("two-writers", "write to what another warp writes"),
    ("out-of-bounds", "access out of bounds"),
    ("misaligned", "misaligned access"),
    ("copy-not-awaited", "read NaN"),
    ("write-before-begin", "may not have begun"),
    ("no-such-block", "no such thread block"),
    ("arrives-twice", "arrives twice"),
    ("write-before-waiting", "between the same barriers"),
    ("remote-read-without-barrier", "read of what another warp writes"),
    ("remote-write-without-barrier", "write to what another warp reads"),
    ("exit-too-early", "exit while others may still write"),
])  # fmt: skip
def test_the_shim_finds_faults(fault, message, tmp_path_factory):
    program = tmp_path_factory.getbasetemp() / "simt_faults"
    if not program.exists():
        compile_for_cpu("faults.cpp", program)
    done = subprocess.run([program, fault], capture_output=True, text=True, timeout=60)
    if message is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert message in done.stderr


# ------------------------------------------------------------------ the operators, in Python


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shortcut", ["average_pool", "subsample"])
def test_reference_within_tolerance(dtype, shortcut):
    network = make_network((2, 1, 2), shortcut, num_classes=11)
    images = make_images(IMAGES, dtype)
    decisions = random_decisions(torch.Generator().manual_seed(0), IMAGES, 5)
    logits = make_executor(network, dtype).run(images, decisions)
    assert logits.dtype == torch.float32
    make_reference(network, images, decisions, dtype).check("walk_half", logits)


def test_executor_runs_policy_and_sets():
    network, policy = make_network((1, 1, 1)), make_policy(3)
    executor = make_executor(network, torch.bfloat16, policy)
    deciding, everything = make_executor(policy.network, torch.bfloat16), torch.ones(4, 3) > 0
    for size in (32, 16):  # other sizes than 32x32 run without the walk
        images = make_images(4)[..., :size, :size]
        logits, decisions = executor.run_policy(images)
        policy_logits = deciding.run(images, everything)
        assert torch.equal(decisions, policy_logits >= 0)
        assert torch.equal(logits, executor.run(images, decisions))
        sets = torch.stack([decisions, ~decisions])
        both = executor.run_sets(images, sets)
        assert both.shape == (2, 4, 10)
        assert logits.dtype == both.dtype == policy_logits.dtype == torch.float32
        for result, one in zip(both, sets, strict=True):
            torch.testing.assert_close(result, executor.run(images, one), rtol=0, atol=1e-2)


@pytest.mark.parametrize("sets", [(), (3,), (0,)])
def test_no_images_or_sets(sets):
    executor = make_executor(make_network((1, 1, 1)), torch.float16, make_policy(3))
    batch = 2 if sets == (0,) else 0
    images = make_images(batch, torch.float16)
    logits = executor.run(images, torch.empty(*sets, batch, 3, dtype=torch.bool))
    assert logits.shape == (*sets, batch, 10)
    assert executor.run_policy(images[:0])[1].shape == (0, 3)


def arguments(**changes):
    """Arguments of ``walk_half`` for two images through ResNet-8, some replaced."""
    weights, layers, num_classes, subsample = make_executor(
        make_network((1, 1, 1)), torch.bfloat16
    )._network
    values = {
        "images": make_images(2),
        "decisions": torch.tensor([[True, False, True], [False, True, True]]),
        "weights": weights,
        "layers": list(layers),
        "num_classes": num_classes,
        "subsample": subsample,
        "order": torch.tensor([1, 0], dtype=torch.int32),
    }
    return values | changes


def test_opcheck():
    values = arguments()
    operators = torch.ops.blockdrop_fast
    torch.library.opcheck(operators.walk_half.default, tuple(values.values()))
    decisions = torch.stack([values["decisions"], ~values["decisions"]])
    sets = arguments(decisions=decisions, order=None)
    torch.library.opcheck(operators.walk_half.default, tuple(sets.values()))
    del values["decisions"], values["order"]
    policy = make_executor(make_policy(3).network, torch.bfloat16)._network
    torch.library.opcheck(operators.walk_half_policy.default, (*values.values(), *policy[:2]))


def test_traced_without_graph_breaks():
    values = arguments()

    def run(images, decisions):
        return walk_half(images, decisions, **{k: v for k, v in values.items() if k not in given})

    given = ("images", "decisions")
    traced = torch.compile(run, fullgraph=True, backend="eager")
    arguments_given = [values[name] for name in given]
    assert torch.equal(traced(*arguments_given), run(*arguments_given))


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"images": torch.zeros(2, 3, 32, 32)}, TypeError, "images: expected dtype torch.bfloat16 or"),
    ({"images": make_images(2)[..., :16]}, ValueError, r"images: expected shape \(B, 3, 32, 32\)"),
    ({"decisions": torch.ones(2, 3)}, TypeError, "decisions: expected dtype torch.bool"),
    ({"decisions": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "decisions: expected shape"),
    ({"weights": torch.zeros(7)}, TypeError, "weights: expected dtype torch.uint8"),
    ({"weights": torch.zeros(7, dtype=torch.uint8)}, ValueError, "weights: expected a vector"),
    ({"layers": [1, 1]}, ValueError, "layers: expected"),
    ({"num_classes": 0}, ValueError, "num_classes: expected"),
    ({"order": torch.zeros(2)}, TypeError, "order: expected dtype torch.int32"),
    ({"order": torch.zeros(3, dtype=torch.int32)}, ValueError, "order: expected a vector of 2"),
])  # fmt: skip
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        walk_half(**arguments(**changes))


def test_bad_policy_arguments():
    values = arguments()
    del values["decisions"], values["order"]
    with pytest.raises(ValueError, match="weights: expected a vector"):
        walk_half_policy(
            **values, policy_weights=torch.zeros(7, dtype=torch.uint8), policy_layers=[1, 1, 1]
        )


def test_unsupported_networks():
    with pytest.raises(TypeError, match=r"network: .* torch.float16 only, got torch.float32"):
        WalkHalfExecutor(fold_network(resnet_cifar(8), torch.float32))


# ------------------------------------------------------------------ the engine


@pytest.fixture
def half_walk_engine(monkeypatch):
    """Compiles engines as on a GPU, but on the CPU, where the operator's reference runs."""
    monkeypatch.setattr(choice, "_why_no_walk_kernels", lambda device: "")
    monkeypatch.setattr(choice, "_make_walk", lambda network, *_: WalkHalfExecutor(network))
    return engine.compile


def test_engine_takes_the_half_walk(half_walk_engine):
    network, policy = make_network((1, 1, 1)), make_policy(3)
    compiled = half_walk_engine(BlockDrop(network, policy), dtype=torch.bfloat16)
    assert compiled.strategy == "walk"
    assert "one kernel launch" in compiled.strategy_reason
    images = make_images(5)
    output = compiled(images)
    assert output.logits.dtype == torch.float32
    assert torch.equal(output.logits, compiled.run(images, output.decisions))
    sets = compiled.run_sets(images, torch.stack([output.decisions] * 2))
    assert torch.equal(sets[1], output.logits)
    assert torch.equal(output.decisions, compiled.decide(images))
    empty = compiled(images[:0])
    assert empty.logits.dtype == torch.float32
    assert empty.logits.shape == (0, 10)


def test_engine_says_why_not_the_half_walk(half_walk_engine):
    compiled = half_walk_engine(make_network((1, 1, 1)), dtype=torch.float32)
    assert compiled.strategy == "gather"
    assert "torch.bfloat16 and torch.float16 only" in compiled.strategy_reason


def test_engine_names_missing_kernels():
    if extension_status().build_info.get("cuda"):
        pytest.skip("this extension has CUDA kernels")
    reason = choice._why_no_walk_kernels(torch.device("cuda"))
    if extension_status().loaded:
        assert reason.startswith("the walk on a GPU needs CUDA kernels: ")
    else:
        assert reason == f"the walk needs the compiled extension: {extension_status().reason}"
