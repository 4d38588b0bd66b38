"""The op `plan`: compiled kernel, reference and definition agree exactly."""

import collections
import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdrop_fast import ops
from blockdrop_fast._extension import extension_status
from tests.simt.build import compile_for_cpu, needs_compiler

needs_extension = pytest.mark.skipif(
    not extension_status().loaded, reason=f"no compiled kernels: {extension_status().reason}"
)


def random_decisions(batch: int, num_blocks: int, keep: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, num_blocks, generator=generator) < keep


def assert_same(found, expected):
    for name, left, right in zip(("indices", "counts", "order"), found, expected, strict=True):
        assert left.dtype == right.dtype == torch.int32, name
        assert torch.equal(left, right), name


def plan_by_definition(decisions: torch.Tensor):
    """The schema's words in plain Python."""
    rows = decisions.tolist()
    batch, num_blocks = decisions.shape
    active = [[b for b in range(batch) if rows[b][k]] for k in range(num_blocks)]
    indices = torch.tensor([row + [-1] * (batch - len(row)) for row in active], dtype=torch.int32)
    counts = torch.tensor([len(row) for row in active], dtype=torch.int32)
    order = sorted(range(batch), key=lambda b: (-sum(rows[b]), b))
    return indices.reshape(num_blocks, batch), counts, torch.tensor(order, dtype=torch.int32)


@given(
    batch=st.integers(0, 70),
    num_blocks=st.integers(0, 40),
    keep=st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_reference_matches_the_definition(batch, num_blocks, keep, seed):
    decisions = random_decisions(batch, num_blocks, keep, seed)
    assert_same(ops.plan_reference(decisions), plan_by_definition(decisions))


@needs_extension
@given(
    batch=st.integers(0, 300),
    num_blocks=st.integers(0, 700),
    keep=st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_kernel_matches_the_reference(batch, num_blocks, keep, seed):
    decisions = random_decisions(batch, num_blocks, keep, seed)
    assert_same(ops.plan(decisions), ops.plan_reference(decisions))


@needs_extension
@pytest.mark.parametrize("threads", [1, 2])
def test_kernel_split_over_threads(threads):
    decisions = random_decisions(3000, 601, 0.3, seed=7)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = ops.plan(decisions)
    finally:
        torch.set_num_threads(before)
    assert_same(found, ops.plan_reference(decisions))


@needs_extension
def test_kernel_writes_every_element():
    poisoned = torch.empty(1, dtype=torch.int32).item()
    assert poisoned == torch.iinfo(torch.int32).max
    for keep in (0.0, 0.5, 1.0):
        for result in ops.plan(random_decisions(65, 54, keep, seed=1)):
            assert poisoned not in result


@needs_extension
def test_memory_of_kernels_is_poisoned():
    """What C++ allocates is filled: at::empty is followed by a fill that otherwise is not there."""

    def count_calls():
        with torch.profiler.profile() as profile:
            ops.plan(decisions)
        calls = collections.Counter()
        for event in profile.key_averages():
            calls[event.key] += event.count
        return calls["aten::empty"], calls["aten::fill_"]

    decisions = random_decisions(65, 54, 0.5, seed=1)
    allocations, fills = count_calls()
    torch.use_deterministic_algorithms(False)
    assert count_calls() == (allocations, fills - allocations)
    assert allocations >= 3


@pytest.fixture(scope="module")
def plan_of_cuda(tmp_path_factory):
    """The CUDA kernel's device code, run on the CPU by tests/simt."""
    library = tmp_path_factory.mktemp("simt") / "plan.so"
    run = ctypes.CDLL(str(compile_for_cpu("plan_on_cpu.cpp", library, "-shared", "-fPIC"))).run_plan
    run.argtypes = [*[ctypes.c_void_p] * 5, ctypes.c_int64, ctypes.c_int64]

    def plan(decisions: torch.Tensor):
        batch, num_blocks = decisions.shape
        shapes = [(num_blocks, batch), (num_blocks,), (batch,), (2, batch)]
        buffers = [torch.empty(shape, dtype=torch.int32) for shape in shapes]  # poisoned
        run(decisions.data_ptr(), *(buffer.data_ptr() for buffer in buffers), batch, num_blocks)
        return buffers[:3]

    return plan


@needs_compiler
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("batch", "num_blocks"), [
    (0, 5), (1, 1), (7, 0), (31, 33), (33, 32), (1023, 15), (1024, 54), (1025, 64), (2500, 3),
    (40, 255), (70, 256), (300, 601),
])  # fmt: skip
def test_cuda_kernel_on_the_cpu(plan_of_cuda, batch, num_blocks, keep):
    """More than a step of images, more than 255 blocks: a second pass of the sort."""
    decisions = random_decisions(batch, num_blocks, keep, seed=batch)
    assert_same(plan_of_cuda(decisions), ops.plan_reference(decisions))


@needs_compiler
def test_cuda_kernel_on_images_of_very_different_usage(plan_of_cuda):
    keep = torch.rand(2100, 1, generator=torch.Generator().manual_seed(2))
    decisions = torch.rand(2100, 300, generator=torch.Generator().manual_seed(3)) < keep
    assert_same(plan_of_cuda(decisions), ops.plan_reference(decisions))


@pytest.mark.parametrize("plan", [ops.plan, ops.plan_reference])
def test_all_kept_and_all_dropped(plan):
    images = torch.arange(5, dtype=torch.int32)
    indices, counts, order = plan(torch.ones(5, 3, dtype=torch.bool))
    assert torch.equal(indices, images.expand(3, 5))
    assert counts.tolist() == [5, 5, 5]
    assert torch.equal(order, images)

    indices, counts, order = plan(torch.zeros(5, 3, dtype=torch.bool))
    assert torch.equal(indices, torch.full((3, 5), -1, dtype=torch.int32))
    assert counts.tolist() == [0, 0, 0]
    assert torch.equal(order, images)


@pytest.mark.parametrize("plan", [ops.plan, ops.plan_reference])
def test_empty_batch(plan):
    indices, counts, order = plan(torch.zeros(0, 54, dtype=torch.bool))
    assert indices.shape == (54, 0)
    assert counts.tolist() == [0] * 54
    assert order.shape == (0,)


def test_decisions_need_not_be_contiguous():
    decisions = random_decisions(54, 33, 0.5, seed=3).t()
    assert_same(ops.plan(decisions), ops.plan_reference(decisions.contiguous()))


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 33)])
def test_opcheck(shape):
    decisions = torch.rand(shape) < 0.5
    torch.library.opcheck(torch.ops.blockdrop_fast.plan.default, (decisions,))


@pytest.mark.parametrize("plan", [ops.plan, torch.ops.blockdrop_fast.plan, ops.plan_reference])
def test_wrong_dtype_and_shape(plan):
    with pytest.raises(TypeError, match=r"decisions: expected dtype torch\.bool, got"):
        plan(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"decisions: expected shape \(B, K\), got .*3"):
        plan(torch.ones(3, dtype=torch.bool))


def test_not_a_tensor():
    with pytest.raises(TypeError, match=r"decisions: expected a torch\.Tensor, got list"):
        ops.plan([[True]])
