"""Measuring which configurations ``gathered_conv_`` should use on a GPU model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from blockdrop_fast.files import write_json
from blockdrop_fast.ops.gathered_conv import gathered_conv_reference_, pack_conv
from blockdrop_fast.triton_kernels.config import (
    Config,
    Problem,
    cache_folder,
    candidates,
    forget_tables,
    read_table,
    shared_bytes,
    table_name,
)
from blockdrop_fast.triton_kernels.gathered_conv import compiling_together, launch_gathered_conv

# Of the rows, while timing: about what the paper's policy for ResNet-101 keeps.
ACTIVE_SHARE = 0.75
# Rounding of one operand or of the result, whichever is larger.
_ROUNDING = {"float16": 2**-11, "bfloat16": 2**-8}


@dataclass(frozen=True)
class Shape:
    """One convolution: kernel size, stride, channels, and the size of its input."""

    kernel_size: int
    stride: int
    c_in: int
    c_out: int
    height: int
    width: int


@dataclass(frozen=True)
class Entry:
    """The fastest right configuration of a problem, and its time."""

    problem: Problem
    config: Config
    microseconds: float


def tune(
    shapes: Iterable[Shape],
    dtype: torch.dtype,
    rows: int,
    timer: Callable[[Callable[[], None]], float] | None = None,
    choices: Callable[[Problem, int], list[Config]] = candidates,
    device: torch.device | str = "cuda",
    folder: Path | None = None,
) -> list[Entry]:
    """Time the candidates of each shape, and write the fastest into the user's table.

    A candidate whose result is not within rounding of a float64 reference is not timed, nor is one
    that the device has too few resources for. Entries of other shapes stay in the table.

    Args:
        shapes: the convolutions; equal ones are timed once.
        dtype: of the activations, one that the kernel takes.
        rows: images of the buffers; the entry serves all sizes with the same next power of two.
        timer: calls its argument as often as it likes and returns the microseconds of one call;
            None: the median of Triton's ``do_bench``.
        choices: (problem, bytes of shared memory) -> the configurations to try.
        device: where; "cpu" only under Triton's interpreter.
        folder: of the table; None: ``cache_folder()``.

    Returns:
        One entry for each shape, in their order.

    Raises:
        RuntimeError: no candidate of a shape gave a right result.
        ValueError: the table that is there already is not one.
    """
    device = torch.device(device)
    timer = timer or _median_microseconds
    shared = _shared_bytes(device)
    entries = []
    for shape in dict.fromkeys(shapes):
        trial = _Trial(shape, dtype, rows, device)
        configs = choices(trial.problem, shared)
        if device.type == "cuda":
            with compiling_together():
                for config in configs:
                    trial.run(config)
        times = {
            config: timer(lambda trial=trial, config=config: trial.run(config))
            for config in configs
            if trial.is_right(config)
        }
        if not times:
            raise RuntimeError(f"{shape}, {dtype}, {rows} rows: no candidate gave a right result")
        best = min(times, key=times.__getitem__)
        entries.append(Entry(trial.problem.bucket(), best, times[best]))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    write_table((folder or cache_folder()) / table_name(name), entries, name)
    return entries


def write_table(path: Path, entries: list[Entry], gpu: str) -> None:
    """Add entries to a table, or replace those of the same problems; the folder is made.

    Args:
        path: of the table.
        entries: the new ones.
        gpu: the name of the GPU model.

    Raises:
        ValueError: the file that is there is not a table.
        OSError: it cannot be written.
    """
    chosen = read_table(path) if path.exists() else {}
    chosen.update({entry.problem: entry.config for entry in entries})
    table = {
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "entries": [
            {"problem": dataclasses.asdict(problem), "config": dataclasses.asdict(config)}
            for problem, config in sorted(
                chosen.items(), key=lambda item: dataclasses.astuple(item[0])
            )
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, table)
    forget_tables()


class _Trial:
    """Random inputs of one problem, poisoned where nothing may be read, and the right result."""

    def __init__(self, shape: Shape, dtype: torch.dtype, rows: int, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)

        def random(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device)

        height, width = ((size - 1) // shape.stride + 1 for size in (shape.height, shape.width))
        self.problem = Problem(
            *(shape.kernel_size, shape.stride, shape.c_in, shape.c_out, height * width),
            *(str(dtype).removeprefix("torch."), rows),
        )
        reduction = shape.kernel_size**2 * shape.c_in
        kernel = (shape.kernel_size, shape.kernel_size)
        weight = pack_conv(random(shape.c_out, shape.c_in, *kernel) / reduction**0.5).to(dtype)
        order = torch.randperm(rows, generator=generator, device=device).int()
        count = torch.tensor([max(1, int(ACTIVE_SHARE * rows))], dtype=torch.int32, device=device)
        self._inactive = order[int(count) :].long()
        x = random(rows, shape.c_in, shape.height, shape.width).to(dtype)
        x[self._inactive] = torch.nan
        self._x = x.contiguous(memory_format=torch.channels_last)
        self._out = random(rows, shape.c_out, height, width).to(dtype)
        self._out = self._out.contiguous(memory_format=torch.channels_last)
        self._out[self._inactive] = torch.nan
        self._operands = (weight, random(shape.c_out), order, count)
        # As in a block: the convolution that widens adds to the residual.
        self._form = (shape.kernel_size, shape.stride, True, shape.c_out > shape.c_in)
        self._expected = self._reference()
        rounding = _ROUNDING[self.problem.dtype] + 2**-24 * reduction**0.5
        largest = self._expected.nan_to_num(0.0).abs().max().item()
        self._limit = 8 * rounding * max(largest, 1.0)
        self._scratch = self._out.clone()

    def run(self, config: Config) -> None:
        launch_gathered_conv(self._scratch, self._x, *self._operands, *self._form, config=config)

    def is_right(self, config: Config) -> bool:
        """Whether the configuration can run, and computes what it should, and nothing else."""
        self._scratch.copy_(self._out)
        try:
            self.run(config)
        except (triton.CompilationError, triton.runtime.errors.OutOfResources):
            return False
        error = (self._scratch.double() - self._expected).abs()
        same_rows = self._scratch.isnan() == self._expected.isnan()
        return bool(same_rows.all() and error.nan_to_num(0.0).max() <= self._limit)

    def _reference(self) -> Tensor:
        weight, bias, active, count = self._operands
        out = self._out.double()
        operands = (weight.double(), bias.double(), active, count)
        gathered_conv_reference_(out, self._x.double(), *operands, *self._form)
        return out


def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return shared_bytes((9, 0))
    return shared_bytes(torch.cuda.get_device_capability(device))


def _median_microseconds(call: Callable[[], None]) -> float:
    return triton.testing.do_bench(call, return_mode="median") * 1e3
