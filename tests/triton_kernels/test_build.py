"""The Triton kernels compiled ahead of time, which needs no GPU: instructions and limits.

The limits are beside the configurations, in ``blockdrop_fast/triton_kernels/config.py``.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from blockdrop_fast.triton_kernels import config as configs  # noqa: E402
from blockdrop_fast.triton_kernels.config import Problem, default_config  # noqa: E402
from blockdrop_fast.triton_kernels.gathered_conv import (  # noqa: E402
    compiling_together,
    gathered_conv_kernel,
    launch_gathered_conv,
)

pytestmark = pytest.mark.slow

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"float16": "*fp16", "bfloat16": "*bf16"}
MULTIPROCESSORS = {80: 108, 90: 132}


@dataclass(frozen=True)
class Case:
    """A convolution at an input size, in one of its forms."""

    kernel_size: int
    stride: int
    c_in: int
    c_out: int
    size: int
    gather: bool = False
    scatter: bool = False
    dtype: str = "bfloat16"
    rows: int = 64

    def problem(self) -> Problem:
        pixels = ((self.size - 1) // self.stride + 1) ** 2
        channels = (self.c_in, self.c_out)
        return Problem(self.kernel_size, self.stride, *channels, pixels, self.dtype, self.rows)


REDUCE = Case(1, 1, 1024, 256, 14, gather=True)
MIDDLE = Case(3, 1, 256, 256, 14)
EXPAND = Case(1, 1, 256, 1024, 14, scatter=True)
MAIN = {  # ResNet-101 in 16 bits
    "reduce-14": REDUCE,
    "middle-14": MIDDLE,
    "expand-14": EXPAND,
    "middle-stride2": Case(3, 2, 256, 256, 28),
    "expand-7": Case(1, 1, 512, 2048, 7, scatter=True, dtype="float16"),
    "middle-56": Case(3, 1, 64, 64, 56),
    "middle-7-one-image": Case(3, 1, 512, 512, 7, rows=1),
}
OTHERS = {
    "resnet18-first": Case(3, 2, 64, 128, 56, gather=True, dtype="float16"),
    "cifar-second": Case(3, 1, 16, 16, 32, scatter=True),
}
ON_SM_80 = ("reduce-14", "middle-14", "expand-14", "cifar-second")
CASES = [(90, name) for name in MAIN | OTHERS] + [(80, name) for name in ON_SM_80]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"sm_{case[0]}-{case[1]}")
def built(request, tmp_path_factory):
    """(compute capability, case, configuration, compiled kernel, path of its machine code)."""
    capability, name = request.param
    case = (MAIN | OTHERS)[name]
    folder = tmp_path_factory.mktemp("triton")
    shared = configs.shared_bytes(divmod(capability, 10))
    config = default_config(case.problem(), MULTIPROCESSORS[capability], shared)
    pointer = POINTERS[case.dtype]
    signature = {"out": pointer, "x": pointer, "weight": pointer, "bias": "*fp32"}
    signature |= {"active": "*i32", "count": "*i32"}
    constants = {
        "C_IN": case.c_in,
        "C_OUT": case.c_out,
        "H": case.size,
        "W": case.size,
        "KERNEL_SIZE": case.kernel_size,
        "STRIDE": case.stride,
        "GATHER": case.gather,
        "SCATTER": case.scatter,
        "WIDE": False,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    source = ASTSource(
        fn=gathered_conv_kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        # As a launch finds tensors that PyTorch allocated; active and count may lie anywhere.
        attrs={(index,): [["tt.divisibility", 16]] for index in range(4)},
    )
    options = {"num_warps": config.warps, "num_stages": config.stages}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    machine_code = folder / "kernel.cubin"
    machine_code.write_bytes(kernel.asm["cubin"])
    return capability, case, config, kernel, machine_code


def test_instructions(built):
    """Tensor cores of the kind that the GPU has, fed by copies of 16 bytes that run ahead."""
    capability, case, config, kernel, _ = built
    ptx = kernel.asm["ptx"]
    warpgroup, warp = ptx.count("wgmma.mma_async"), ptx.count("mma.sync")
    assert (warpgroup > 0, warp > 0) == (capability == 90, capability == 80)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^,]*, \[[^,]*, 0x(\w+)", ptx)
    assert len(copies) > 0
    if case in MAIN.values():  # a tile of 16 x 16 weights is less than 16 bytes a thread
        assert set(copies) == {"10"}
    # All but the last stage are under way when the loop begins.
    waits = re.findall(r"cp\.async\.wait_group\s+(?:0x)?(\d+)", ptx)
    assert max(map(int, waits)) >= config.stages - 2


def test_limits(built):
    capability, case, config, kernel, machine_code = built
    usage = run_tool("-res-usage", machine_code)
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    largest = config.block_m * config.block_n == configs.SUMS_PER_THREAD * 32 * config.warps
    assert registers <= 255
    assert local == 0
    assert stack <= (configs.STACK_BYTES if largest and case.scatter else 0)
    assert kernel.metadata.shared <= configs.shared_bytes(divmod(capability, 10))
    assert kernel.metadata.shared <= config.shared_bytes + 1024


def test_no_stack_within_loops(built):
    """What does not fit into registers is touched once a tile, outside the loop of products."""
    instructions = [
        (int(address, 16), text)
        for address, text in re.findall(
            r"/\*([0-9a-f]{4,})\*/\s+(.*?);", run_tool("-sass", built[-1])
        )
    ]
    products = re.compile(r"\b(HGMMA|HMMA|FFMA)")
    loops = 0
    for end, text in instructions:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        body = [t for a, t in instructions if branch and int(branch[1], 16) <= a <= end]
        if any(map(products.search, body)) and not any("STG" in t for t in body):
            loops += 1
            assert not [t for t in body if re.search(r"\b(LDL|STL)\b", t)]
    # Up to nine steps are unrolled, and then the only loop is the one over tiles.
    case, config = built[1:3]
    steps = case.kernel_size**2 * case.c_in // config.block_k
    assert loops == 1 or (loops == 0 and steps <= 9)


def run_tool(option: str, machine_code: Path) -> str:
    """cuobjdump, as triton brings it."""
    process = subprocess.run(
        [TOOLS / "cuobjdump", option, machine_code],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


class _Driver:
    """What a launch asks of a GPU before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def test_compiled_together_is_what_launches_find(tmp_path, monkeypatch):
    """Each kernel once, whatever else fails, and nothing is run."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    caches = defaultdict(gathered_conv_kernel.create_binder)
    monkeypatch.setattr(gathered_conv_kernel, "device_caches", caches)
    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver())
    x = torch.full((2, 16, 5, 5), torch.nan, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.zeros_like(x)
    active, count = torch.arange(2, dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    operands = (out, x, torch.zeros(16, 16).bfloat16(), torch.zeros(16), active, count)
    choices = [configs.Config(64, 16, 16, 4, stages) for stages in (2, 3)]
    for _ in range(2):
        with compiling_together(2):
            for config in choices:
                launch_gathered_conv(*operands, 1, 1, True, False, config=config)
    assert len(caches[0][0]) == len(choices)
    assert (out == 0).all()
