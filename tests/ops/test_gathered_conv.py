"""gathered_conv_: reference against a composition, its checks, its kernel in the interpreter.

The kernel's cases are in ``gathered_conv_cases.py``, which runs in a process of its own.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import blockdrop_fast.triton_kernels as kernels
from blockdrop_fast.ops import gathered_conv_, pack_conv
from blockdrop_fast.ops.gathered_conv import unpack_conv
from blockdrop_fast.triton_kernels import config as configs
from blockdrop_fast.triton_kernels.config import Config, Problem, candidates, default_config
from tests.ops.gathered_conv_cases import case_names, make_case

CASES = Path(__file__).with_name("gathered_conv_cases.py")
SHAPE = (5, 6, 7, 4)
NAMES = ("out", "x", "weight", "bias", "active", "count", "kernel_size", "stride")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(123.0), other.nan_to_num(123.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 3, 5])
@pytest.mark.parametrize(("gather", "scatter"), [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_reference_like_conv2d(kernel_size, stride, gather, scatter, count, dtype):
    """One image at a time in float64, rounded at the end; other rows stay as they are."""
    arguments = make_case(kernel_size, stride, SHAPE, count, bool(gather), bool(scatter), dtype)
    out, x, weight, bias, active = arguments[:5]
    if dtype == torch.float64:
        bias = bias.double()
    expected = out.clone()
    filters = unpack_conv(weight, kernel_size).double()
    for slot, image in enumerate(active[:count].tolist()):
        taken = x[image if gather else slot].double()
        sums = F.conv2d(taken[None], filters, bias.double(), stride, kernel_size // 2)[0]
        if scatter:
            sums += expected[image].double()
        expected[image if scatter else slot] = F.relu(sums).to(dtype)
    gathered_conv_(out, x, weight, bias, *arguments[4:])
    assert torch.equal(out.isnan(), expected.isnan())
    # float32 sums, then one rounding; another rounding where the two sums part at a tie.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=2 * eps, atol=8 * eps, equal_nan=True)


def test_in_place_on_channels_last_memory():
    arguments = make_case(3, 1, SHAPE, 3, True, True, torch.float32)
    pointer = arguments[0].data_ptr()
    assert gathered_conv_(*arguments) is None
    assert arguments[0].data_ptr() == pointer
    assert arguments[0].is_contiguous(memory_format=torch.channels_last)


def test_input_of_more_rows_than_slots():
    """Four slots of buffers for seven images."""
    out, x, *operands, active, count, kernel_size, stride, _, _ = make_case(
        3, 1, SHAPE, 3, True, False, torch.float32, images=7
    )
    expected = out.clone()
    gathered_conv_(expected, x, *operands, active, count, kernel_size, stride, True, False)
    few = out[:4].clone(memory_format=torch.channels_last)
    gathered_conv_(few, x, *operands, active[:4], count, kernel_size, stride, True, False)
    assert is_same(few, expected[:4])


def test_pack_is_by_tap_then_channel():
    weight = torch.arange(4 * 5 * 9).reshape(4, 5, 3, 3)
    packed = pack_conv(weight)
    assert packed.shape == (45, 4)
    assert packed.is_contiguous()
    for tap, channel, filter_ in [(0, 0, 0), (4, 2, 3), (8, 4, 1)]:
        expected = weight[filter_, channel, tap // 3, tap % 3]
        assert packed[tap * 5 + channel, filter_] == expected
    assert torch.equal(unpack_conv(packed, 3), weight)


@pytest.mark.parametrize(("gather", "scatter"), [(False, False), (True, False), (True, True)])
def test_opcheck(gather, scatter):
    arguments = make_case(3, 2, SHAPE, 5, gather, scatter, torch.float32)
    # Its checks compare tensors, and NaN equals nothing.
    arguments = (arguments[0].nan_to_num(0.0), arguments[1].nan_to_num(0.0), *arguments[2:])
    torch.library.opcheck(torch.ops.blockdrop_fast.gathered_conv_.default, arguments)


def test_traced_without_graph_breaks():
    arguments = make_case(1, 1, SHAPE, 3, True, True, torch.float32)
    expected = arguments[0].clone()
    gathered_conv_(expected, *arguments[1:])

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(*arguments):
        gathered_conv_(*arguments)
        return arguments[0] * 2

    assert is_same(run(*arguments), expected * 2)
    assert is_same(arguments[0], expected)


def nchw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("kernel_size", lambda _: 5, ValueError, "kernel_size: expected 1 or 3, got 5"),
        ("stride", lambda _: 3, ValueError, "stride: expected 1 or 2, got 3"),
        ("x", nchw, ValueError, "x: expected channels-last memory, got shape"),
        ("out", nchw, ValueError, "out: expected channels-last memory, got shape"),
        ("x", torch.Tensor.int, TypeError, "x: expected a floating-point dtype, got torch.int32"),
        ("x", lambda x: x[0], ValueError, r"x: expected shape \(R, C_in, H, W\), got \(5, 7, 4\)"),
        ("out", torch.Tensor.half, TypeError, "out: expected dtype torch.float32, got .*16"),
        ("out", lambda o: o[:, :, :-1], ValueError, r"out: expected shape .*\(any, 6, 7, 4\), got"),
        ("weight", torch.Tensor.half, TypeError, "weight: expected dtype torch.float32, got .*16"),
        ("weight", lambda w: w[:-1], ValueError, r"weight: expected shape .* = \(45, 6\), got"),
        (
            "weight",
            lambda w: w.repeat(1, 2)[:, ::2],
            ValueError,
            "weight: expected contiguous memory",
        ),
        ("bias", torch.Tensor.double, TypeError, "bias: expected dtype torch.float32, got .*64"),
        ("bias", lambda b: b[1:], ValueError, r"bias: expected shape \(C_out,\) = \(6,\), got"),
        ("active", torch.Tensor.long, TypeError, "active: expected dtype torch.int32, got .*64"),
        ("active", lambda a: a.repeat(2), ValueError, "active: expected at most 5 images, as x"),
        ("active", lambda a: a + 1, ValueError, "active: expected images from 0 to 4, got"),
        ("active", lambda a: a * 0, ValueError, "active: expected each image once"),
        ("count", torch.Tensor.long, TypeError, "count: expected dtype torch.int32, got .*64"),
        ("count", lambda c: c[0], ValueError, r"count: expected shape \(1,\).*, got \(\)"),
        ("count", lambda c: c + 1, ValueError, "count: expected 0 to 5, as active is long, got 6"),
        ("count", lambda c: c - 6, ValueError, "count: expected 0 to 5, as active is long, got -1"),
    ],
)
def test_bad_input(name, change, error, message):
    arguments = list(make_case(3, 1, SHAPE, 5, True, True, torch.float32))
    arguments[NAMES.index(name)] = change(arguments[NAMES.index(name)])
    with pytest.raises(error, match=message):
        gathered_conv_(*arguments)


def test_input_must_not_be_the_output():
    """Not even partly: pixels are read after their neighbours were written."""
    buffer = torch.zeros(7, 5, 7, 4).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.zeros(45, 5), torch.zeros(5)
    active, count = torch.arange(4).int(), torch.tensor([4], dtype=torch.int32)
    operands = (weight, bias, active, count, 3, 1, True, True)
    with pytest.raises(ValueError, match="x: expected other memory than out's"):
        gathered_conv_(buffer[:4], buffer[3:], *operands)
    gathered_conv_(buffer[:3], buffer[3:], weight, bias, active[:3], count - 1, 3, 1, True, True)


# The kernel in the interpreter ----------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, str]:
    """Case -> what is wrong with it."""
    folder = tmp_path_factory.mktemp("interpreter")
    results = folder / "results.json"
    process = subprocess.run(
        [sys.executable, str(CASES), str(results), str(folder / "tables")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(results.read_text())


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", case_names())
def test_kernel_in_interpreter(interpreted, name):
    assert interpreted[name] == ""


@pytest.mark.slow
@needs_triton
def test_every_case_has_a_test(interpreted):
    assert set(interpreted) == set(case_names())


def test_why_there_are_no_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton cannot be imported" in kernels.why_not.__wrapped__()
    monkeypatch.undo()
    if importlib.util.find_spec("triton") and not torch.cuda.is_available():
        assert kernels.why_not() == "torch sees no CUDA device"


@pytest.mark.slow
def test_package_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, blockdrop_fast.triton_kernels as kernels\n"
        "from blockdrop_fast.ops import gathered_conv_, pack_conv\n"
        "out, x = torch.zeros(1, 2, 1, 1), torch.ones(1, 3, 1, 1)\n"
        "weight, bias = pack_conv(torch.ones(2, 3, 1, 1)), torch.ones(2)\n"
        "active, count = torch.tensor([0]).int(), torch.tensor([1]).int()\n"
        "gathered_conv_(out, x, weight, bias, active, count, 1, 1, True, True)\n"
        "assert out.flatten().tolist() == [4.0, 4.0]\n"
        "assert kernels.why_not()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# Configurations -------------------------------------------------------------------------------


def make_problem(**changes) -> Problem:
    return dataclasses.replace(Problem(3, 1, 256, 256, 196, "bfloat16", 64), **changes)


@pytest.mark.parametrize(
    ("config", "problem", "message"),
    [
        (Config(48, 64, 32, 4, 2), make_problem(), "block_m: expected a power of two from 16 on"),
        (Config(64, 8, 32, 4, 2), make_problem(), "block_n: expected a power of two from 16 on"),
        (Config(64, 64, 32, 8, 2), make_problem(), "warps: expected 1, 2, 4 or 8, at most 4"),
        (Config(64, 64, 32, 3, 2), make_problem(), "warps: expected 1, 2, 4 or 8, at most 4"),
        (Config(64, 64, 32, 4, 0), make_problem(), "stages: expected at least 1"),
        (Config(128, 256, 32, 4, 2), make_problem(), "warps: 4 lack registers"),
        (Config(128, 128, 64, 4, 8), make_problem(), "stages: 262144 bytes .* 232448 available"),
    ],
)
def test_configurations_that_cannot_run(config, problem, message):
    shared = configs.shared_bytes((9, 0))
    reason = config.why_not(problem.kernel_size, shared)
    assert re.match(message, reason)


@given(
    kernel_size=st.sampled_from([1, 3]),
    c_in=st.integers(1, 3000),
    c_out=st.integers(1, 3000),
    pixels=st.integers(1, 60000),
    rows=st.integers(1, 2000),
    shared=st.sampled_from(list(configs.SHARED_BYTES.values())),
)
def test_configurations_of_any_problem_can_run(shared, kernel_size, **sizes):
    problem = Problem(kernel_size, 1, dtype="float16", **sizes)
    for config in [default_config(problem, 132, shared), *candidates(problem, shared)]:
        assert config.why_not(kernel_size, shared) == ""


def test_rule_takes_small_tiles_for_few_images():
    tiles = {}
    for rows in (1, 8, 64, 256):
        config = default_config(make_problem(rows=rows), multiprocessors=132)
        tiles[rows] = (config.block_m, config.block_n)
    assert tiles == {1: (64, 16), 8: (64, 64), 64: (128, 128), 256: (128, 128)}
    many = default_config(make_problem(rows=8), multiprocessors=16)
    assert (many.block_m, many.block_n) == (128, 128)
    narrow = make_problem(c_in=16, c_out=24)
    assert (default_config(narrow).block_n, default_config(narrow).block_k) == (32, 16)


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> Path:
    """A make-believe H200 and the user's folder of tables."""
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setenv("BLOCKDROP_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(configs, "PACKAGED", tmp_path / "packaged")
    configs.forget_tables()
    yield tmp_path
    configs.forget_tables()


def write_table(folder: Path, **config) -> None:
    entry = {"problem": dataclasses.asdict(make_problem()), "config": {**TUNED, **config}}
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-h200.json").write_text(json.dumps({"entries": [entry]}))
    configs.forget_tables()


TUNED = dataclasses.asdict(Config(64, 128, 32, 4, 4))


def test_tables_decide_where_they_have_an_entry(gpu):
    cuda = torch.device("cuda", 0)
    rule = default_config(make_problem())
    assert configs.choose_config(make_problem(), cuda) == rule
    write_table(gpu / "packaged")
    assert configs.choose_config(make_problem(), cuda) == Config(**TUNED)
    assert configs.choose_config(make_problem(rows=33), cuda) == Config(**TUNED)  # same bucket
    assert configs.choose_config(make_problem(rows=65), cuda) == default_config(
        make_problem(rows=65)
    )
    write_table(gpu / "user", stages=2)  # overrules the package's
    assert configs.choose_config(make_problem(), cuda) == Config(**{**TUNED, "stages": 2})
    write_table(gpu / "user", warps=8)  # not allowed for 3x3
    assert configs.choose_config(make_problem(), cuda) == rule


@pytest.mark.parametrize("content", ["", "[]", '{"entries": [{"problem": {}}]}'])
def test_bad_table(gpu, content):
    (gpu / "user").mkdir()
    (gpu / "user" / "nvidia-h200.json").write_text(content)
    with pytest.raises(ValueError, match=r"nvidia-h200.json: not a table of configurations"):
        configs.choose_config(make_problem(), torch.device("cuda", 0))


def test_folder_of_tables(monkeypatch, tmp_path):
    monkeypatch.delenv("BLOCKDROP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert configs.cache_folder() == tmp_path / "blockdrop_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert configs.cache_folder() == tmp_path / ".cache" / "blockdrop_fast"
