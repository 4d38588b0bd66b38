"""Which tiles ``gathered_conv_`` computes: tables of measured choices, and a rule without them.

A choice depends on the number of rows of the buffers, never on the number of active images, so
that nothing is compiled or tuned anew when that changes. Tables are files, one for each GPU model,
written by ``blockdrop_fast.measure.tune``: the user's own, in the folder ``cache_folder()``,
precede those of the package.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

PACKAGED = Path(__file__).parent / "configs"

# limits: a thread can have 255 registers; the sums of a tile may take half of them. The largest
# tiles keep up to STACK_BYTES outside, which they touch once a tile, never in a loop.
SUMS_PER_THREAD = 128
STACK_BYTES = 160
# limits: bytes of shared memory that a thread block can have, by compute capability.
SHARED_BYTES = {(8, 0): 163 * 1024, (8, 6): 99 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024}
# Triton's own convolutions were wrong with 8 warps where the loop over a 3x3 filter's taps is not
# unrolled, as it is not here.
MOST_WARPS = {1: 8, 3: 4}
ELEMENT_BYTES = 2  # float16 and bfloat16
# (block_m, block_n, warps), largest first.
TILES = (
    (128, 256, 8),
    (128, 128, 8),
    (128, 128, 4),
    (64, 256, 4),
    (128, 64, 4),
    (64, 128, 4),
    (64, 64, 4),
    (64, 32, 4),
    (64, 16, 4),
)
# What the rule chooses from; wider tiles with 8 warps are for measurements to find.
DEFAULT_TILES = ((128, 128, 4), (128, 64, 4), (64, 64, 4), (64, 32, 4), (64, 16, 4))
# Small tiles are for few images, where little else hides that a copy from the L2 cache takes as
# long as several steps.
_STAGES = {128: 3, 64: 6}
# For the rule, of an H100 or H200 at its usual clock: multiplications and additions of a
# multiprocessor, its share of the L2 cache's bandwidth, and what a tile costs besides its steps.
MACS_PER_CLOCK = 2048
L2_BYTES_PER_CLOCK = 40
TILE_CLOCKS = 2000


@dataclass(frozen=True)
class Config:
    """A tile of block_m pixels by block_n output channels, block_k input channels at a time.

    Args:
        block_m, block_n, block_k: powers of two from 16 on.
        warps: 4 or 8 for 1x1 convolutions, 4 for 3x3 (fewer work, too).
        stages: how many block_k are in shared memory at once, at least 1.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the tiles of x and weight that are in flight."""
        return self.stages * (self.block_m + self.block_n) * self.block_k * ELEMENT_BYTES

    def why_not(self, kernel_size: int, shared_bytes: int) -> str:
        """Why this cannot run with so much shared memory; empty if it can."""
        for name in ("block_m", "block_n", "block_k"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                return f"{name}: expected a power of two from 16 on, got {size}"
        if self.warps not in (1, 2, 4, 8) or self.warps > MOST_WARPS[kernel_size]:
            most = MOST_WARPS[kernel_size]
            return f"warps: expected 1, 2, 4 or 8, at most {most}, got {self.warps}"
        if self.stages < 1:
            return f"stages: expected at least 1, got {self.stages}"
        if self.block_m * self.block_n > SUMS_PER_THREAD * 32 * self.warps:
            return f"warps: {self.warps} lack registers for {self.block_m} x {self.block_n} sums"
        if self.shared_bytes > shared_bytes:
            needed = f"{self.shared_bytes} bytes of shared memory needed"
            return f"stages: {needed}, {shared_bytes} available"
        return ""


@dataclass(frozen=True)
class Problem:
    """What a choice depends on: one convolution of a network at one size of the buffers.

    Args:
        kernel_size, stride, c_in, c_out: of the convolution.
        pixels: H_out · W_out.
        dtype: of activations, "float16" or "bfloat16".
        rows: images that the buffers are made for, at least 1.
    """

    kernel_size: int
    stride: int
    c_in: int
    c_out: int
    pixels: int
    dtype: str
    rows: int

    def tiles(self, config: Config) -> int:
        """Tiles if all images are active."""
        tiles_m = -(-self.rows * self.pixels // config.block_m)
        return tiles_m * -(-self.c_out // config.block_n)

    def bucket(self) -> Problem:
        """What tables are searched for: the same with the next power of two of rows."""
        return dataclasses.replace(self, rows=1 << (self.rows - 1).bit_length())


def choose_config(problem: Problem, device: torch.device) -> Config:
    """The measured choice for this problem on this device, or ``default_config``.

    Args:
        problem: the convolution.
        device: a CUDA device; on others (the interpreter) the rule alone decides.
    """
    if device.type != "cuda":
        return default_config(problem)
    index = torch.cuda.current_device() if device.index is None else device.index
    return _choose(problem, index, str(cache_folder()))


@functools.cache
def _choose(problem: Problem, index: int, folder: str) -> Config:
    properties = torch.cuda.get_device_properties(index)
    shared = shared_bytes((properties.major, properties.minor))
    found = read_tables(properties.name, Path(folder)).get(problem.bucket())
    if found and not found.why_not(problem.kernel_size, shared):
        return found
    return default_config(problem, properties.multi_processor_count, shared)


def forget_tables() -> None:
    """Read the tables anew at the next choice."""
    _choose.cache_clear()


def shared_bytes(capability: tuple[int, int]) -> int:
    """Shared memory that a thread block can have; of unknown GPUs the least that any has."""
    return SHARED_BYTES.get(capability, min(SHARED_BYTES.values()))


def default_config(
    problem: Problem, multiprocessors: int = 132, shared: int = SHARED_BYTES[9, 0]
) -> Config:
    """The rule where no table has an entry: the tile of the least predicted time.

    A prediction from arithmetic, not a measurement; NOTES.md has it at length. With enough images
    the largest tile wins, as it needs the least traffic; with few images one that is small enough
    for all multiprocessors to have work.

    Args:
        problem: the convolution.
        multiprocessors: of the GPU.
        shared: bytes of shared memory that a thread block can have.
    """
    configs = [
        config
        for tile in DEFAULT_TILES
        for config in _configs(problem, tile, shared, (_STAGES[tile[0]], 3, 2))[:1]
    ]
    return min(configs, key=lambda config: _predicted_clocks(problem, config, multiprocessors))


def _predicted_clocks(problem: Problem, config: Config, multiprocessors: int) -> float:
    """What the busiest multiprocessor takes: for each tile a fill and a drain, and its steps."""
    macs = config.block_m * config.block_n * config.block_k
    computing = macs / MACS_PER_CLOCK
    loading = config.shared_bytes / config.stages / L2_BYTES_PER_CLOCK
    steps = problem.kernel_size**2 * -(-problem.c_in // config.block_k)
    tiles = -(-problem.tiles(config) // multiprocessors)
    return tiles * (TILE_CLOCKS + steps * max(computing, loading))


def candidates(
    problem: Problem, shared: int = SHARED_BYTES[9, 0], multiprocessors: int = 132
) -> list[Config]:
    """The configurations worth timing for a problem, each of them valid, largest tiles first.

    Those whose predicted time is more than twice the least one are left out.
    """
    configs = [config for tile in TILES for config in _configs(problem, tile, shared, (2, 3, 4, 6))]
    clocks = [_predicted_clocks(problem, config, multiprocessors) for config in configs]
    return [
        config for config, count in zip(configs, clocks, strict=True) if count <= 2 * min(clocks)
    ]


def _configs(
    problem: Problem, tile: tuple[int, int, int], shared: int, stages: tuple[int, ...]
) -> list[Config]:
    """The valid configurations of one tile size, none if it is wider than the output is."""
    block_m, block_n, warps = tile
    if block_n > max(16, _power_of_two(problem.c_out)):
        return []
    # 128 bytes of a row of x: one line of the cache, one row of swizzled shared memory.
    block_k = min(128 // ELEMENT_BYTES, max(16, _power_of_two(problem.c_in)))
    configs = [Config(block_m, block_n, block_k, warps, count) for count in stages]
    return [config for config in configs if not config.why_not(problem.kernel_size, shared)]


def _power_of_two(number: int) -> int:
    """The next one."""
    return 1 << (number - 1).bit_length()


def cache_folder() -> Path:
    """Where the user's own tables are: ``$BLOCKDROP_CACHE``, else the platform's cache folder."""
    chosen = os.environ.get("BLOCKDROP_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockdrop_fast"


def table_name(gpu: str) -> str:
    """The name of a GPU model's table: "NVIDIA H200" -> "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def read_tables(gpu: str, folder: Path) -> dict[Problem, Config]:
    """The measured choices for a GPU model: the package's, overruled by those in a folder.

    Raises:
        ValueError: a table is not one.
    """
    found = {}
    for path in (PACKAGED / table_name(gpu), folder / table_name(gpu)):
        if path.exists():
            found.update(read_table(path))
    return found


def read_table(path: Path) -> dict[Problem, Config]:
    """Read one table.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a table.
    """
    try:
        entries = json.loads(path.read_text())["entries"]
        return {Problem(**entry["problem"]): Config(**entry["config"]) for entry in entries}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a table of configurations ({error!r}); delete it") from error
