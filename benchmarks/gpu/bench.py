"""How a GPU's figures are measured: the workloads and what is done with them, for ``cells``.

A cell's contenders are attempted one by one: one that raises is dropped, with its reason, and the
others are timed. One that takes the GPU's context with it ends the process; its name is in a file
then, so that the parent can try again without it.
"""

from __future__ import annotations

import gc
import json
import os
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from blockdrop_fast.engine import compile
from blockdrop_fast.executors import crossover
from blockdrop_fast.executors.gather_graph import GraphGatherExecutor
from blockdrop_fast.executors.recording import tuned_convolutions
from blockdrop_fast.files import write_json
from blockdrop_fast.measure import baselines, calibration
from blockdrop_fast.measure.baselines import UnavailableError
from blockdrop_fast.measure.contenders import build, measure
from blockdrop_fast.measure.workload import Workload, fit_policy, make_workload, random_workload
from blockdrop_fast.networks.architectures import resnet_cifar
from blockdrop_fast.networks.folding import fold_network
from blockdrop_fast.networks.resnet import ResNet, ResNetConfig

RESULTS = Path(__file__).parents[1] / "results"
ROUNDS = 30
BUSY_SECONDS = 0.2


class LostDeviceError(RuntimeError):
    """A contender failed so that nothing can be computed in this process any more."""


@dataclass(frozen=True)
class Scale:
    """What a rehearsal does smaller.

    Attributes:
        device, dtype: of all contenders.
        images: of "cifar" and "imagenet" workloads.
        divide: batch sizes are divided by this.
        rounds: timed calls of each contender.
    """

    device: torch.device
    dtype: torch.dtype
    images: Mapping[str, int]
    divide: int
    rounds: int

    @property
    def rehearsal(self) -> bool:
        return self.device.type != "cuda"

    def batch(self, size: int) -> int:
        return max(1, size // self.divide)


def scale_here(environ: Mapping[str, str] = os.environ) -> Scale:
    """The GPU's, or a rehearsal's, which takes seconds on a CPU."""
    if environ.get("BLOCKDROP_GPU_BENCH_DEVICE") == "cpu":
        images = {"cifar": 64, "imagenet": 16}
        return Scale(torch.device("cpu"), torch.float32, images, 16, 2)
    images = {"cifar": 1024, "imagenet": 256}
    return Scale(torch.device("cuda"), torch.bfloat16, images, 1, ROUNDS)


def folder_of(scale: Scale, environ: Mapping[str, str] = os.environ) -> Path:
    """Where the results go; made if it is not there."""
    name = "rehearsal" if scale.rehearsal else torch.cuda.get_device_name(scale.device)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder = Path(environ.get("BLOCKDROP_GPU_BENCH_OUT") or RESULTS / slug)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass
class Bench:
    """What a cell needs.

    Attributes:
        scale: of all.
        folder: of the results.
        without: contenders that are left out, as they took an earlier process with them.
        progress: a file that says which contender is attempted; None: nobody wants to know.
        result: a file for what there is of a cell's result before all of it is.
        dropped: contenders that raised, and why.
    """

    scale: Scale
    folder: Path
    without: frozenset[str] = frozenset()
    progress: Path | None = None
    result: Path | None = None
    dropped: dict[str, str] = field(default_factory=dict)
    _everything: dict[str, Workload] = field(default_factory=dict)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What raises in here is noted, and over; but for a device that is lost with it.

        An engine that goes on by plain PyTorch warns of it: its figures would not be gather's.
        """
        self._say(name)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="strategy 'gather'")
                yield
        except Exception as error:
            self.dropped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            traceback.print_exc()
            self._say(f"{name}\n{self.dropped[name]}")
            if self._is_lost():
                raise LostDeviceError(name) from error
        self._say("")

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.write_text(text)

    def _is_lost(self) -> bool:
        if self.scale.rehearsal:
            return False
        try:
            torch.cuda.synchronize()
        except Exception:
            return True
        return False

    def all_images(self, family: str) -> Workload:
        """With a policy network that decides about as published."""
        if family not in self._everything:
            make = _tiny if self.scale.rehearsal else _published
            self._everything[family] = fit_policy(make(family, self.scale))
        return self._everything[family]

    def workload(self, family: str, batch: int, decisions: str = "published") -> Workload:
        """So many images that several batches differ, and the tolerance means something."""
        workload = self.all_images(family)
        if decisions == "random":
            generator = torch.Generator().manual_seed(0)
            workload = workload.at(torch.rand(workload.decisions.shape, generator=generator) < 0.5)
        total = self.scale.images[family]
        count = min(max(64, 4 * batch), total)
        return workload.first(count // batch * batch)

    # ------------------------------------------------------------------ what cells run

    def times(
        self, family: str, sizes: Sequence[int], decisions: str, contenders: Sequence[str]
    ) -> dict:
        """A round-robin of contenders at each of some batch sizes."""
        rows, unavailable, engines = [], {}, {}
        batches = tuple(dict.fromkeys(self.scale.batch(size) for size in sizes))
        for i, batch in enumerate(batches):
            workload = self.workload(family, batch, decisions)
            names = [one for one in contenders if one not in {*self.without, *self.dropped}]
            rounds, host = self.scale.rounds, batch == 1
            if any(name.startswith("gather") for name in names):
                self._compile_gather(workload, batch)
            measured = measure(
                workload, batch, names, rounds=rounds, host=host, attempt=self.attempt
            )
            rows += map(asdict, measured.rows)
            unavailable |= measured.unavailable
            # An engine may run otherwise than it was asked to, and says so.
            engines |= workload.engine_reasons()
            usage = workload.decisions.sum(1).double()
            result = {
                "batches": batches,
                "given_usage": [float(usage.mean()), float(usage.std(correction=0))],
                "rows": rows,
                "unavailable": unavailable,
                "engines": engines,
            }
            if left := batches[i + 1 :]:
                self._save(result | {"incomplete": f"batch {', '.join(map(str, left))} left"})
        return result

    def _compile_gather(self, workload: Workload, batch: int) -> None:
        """The kernels of gather's engines, at the same time; they are in Triton's cache then."""
        if self.scale.rehearsal:
            return
        from blockdrop_fast.triton_kernels.gathered_conv import compiling_together

        with self.attempt("gather's kernels compiled together"), compiling_together():
            folded = fold_network(workload.model.backbone, workload.dtype)
            executor = GraphGatherExecutor(folded, launch="universal")
            executor.run(workload.images[:batch], workload.decisions[:batch])

    def _save(self, result: dict) -> None:
        if self.result is not None:
            write_json(self.result, result)

    def memory(self, family: str, size: int) -> dict:
        """Peak memory of the gather engine and of complete networks, weights included.

        cuDNN tries its algorithms for all of them, and keeps what its tries took: workspaces are
        under one rule.
        """
        if self.scale.rehearsal:
            raise UnavailableError("peak memory is a GPU's")
        batch = self.scale.batch(size)
        workload = self.workload(family, batch)
        images = workload.images[:batch]

        def engine(strategy: str) -> Callable[[], object]:
            made = compile(workload.model, dtype=workload.dtype, strategy=strategy)
            return lambda: made(images)

        def network(baseline: Callable) -> Callable[[], object]:
            call = baseline(fold_network(workload.model.backbone, workload.dtype))
            return lambda: call(images, None)

        makers = {
            "complete, eager": lambda: network(baselines.torch_eager),
            "complete, cudnn-graph": lambda: network(
                lambda folded: baselines.cudnn_graph(folded, images)
            ),
            "dense": lambda: engine("dense"),
            "gather": lambda: engine("gather"),
        }
        result = {"batch": batch}
        for name, make in makers.items():
            if name not in self.without:
                with self.attempt(name):
                    result[name] = _peak(make)
        return result

    def waits(self, family: str, size: int, contenders: Sequence[str]) -> dict:
        """Whether a call returns while the device is busy with what came before.

        And how often it waits in a way that torch knows of: an event, as gather's counts are
        waited for, is none.
        """
        if self.scale.rehearsal:
            raise UnavailableError("a CPU computes before it returns")
        batch = self.scale.batch(size)
        workload = self.workload(family, batch)
        images, result = workload.images[:batch], {"batch": batch}
        for name in contenders:
            if name in self.without:
                continue
            with self.attempt(name):
                call = build(name, workload, images)
                for _ in range(8):
                    call(images, None)
                torch.cuda.synchronize()
                torch.cuda._sleep(int(BUSY_SECONDS * 2e9))
                started = time.perf_counter()
                call(images, None)
                waited = time.perf_counter() - started > BUSY_SECONDS / 2
                torch.cuda.synchronize()
                result[name] = {"waits": waited, "hidden": _hidden_waits(call, images)}
        return result

    def crossover(self, family: str, sizes: Sequence[int]) -> dict:
        """The crossover map; on a GPU engines go by it from then on."""
        batches = tuple(dict.fromkeys(self.scale.batch(size) for size in sizes))
        # Decisions are drawn here: a policy's are of no use.
        workload = self.workload(family, max(batches))
        for batch in batches:
            self._compile_gather(workload, batch)
        cells = calibration.calibrate(
            calibration.subject_of(workload), batches, rounds=max(2, self.scale.rounds // 2)
        )
        print(calibration.verdict(cells))
        config, device = workload.model.backbone.config, workload.images.device
        files = [self.folder / crossover.FILE_NAME]
        if not self.scale.rehearsal:
            files.append(crossover.user_file())
        for path in files:
            crossover.save(config, workload.dtype, device, cells, path)
        return {"cells": [asdict(cell) for cell in cells]}

    def tune(self, family: str, size: int, seconds: float, after: str = "") -> dict:
        """The configurations of gather's convolutions, those with the most arithmetic first.

        Args:
            after: a cell that has tuned some of them.
        """
        if self.scale.rehearsal:
            raise UnavailableError("Triton's kernels are timed on a GPU")
        from blockdrop_fast.measure import tune  # needs triton

        started, entries = time.monotonic(), []
        workload = self.all_images(family)
        shapes = _shapes(workload.model.backbone, workload.images[:1])
        if after:
            cells = json.loads((self.folder / "gpu.json").read_text())["cells"]
            shapes = shapes[cells.get(after, {}).get("shapes", 0) :]
        for shape in shapes:
            if time.monotonic() - started > seconds:
                break
            entries += tune.tune([shape], workload.dtype, size)
            gpu = torch.cuda.get_device_name(self.scale.device)
            tune.write_table(self.folder / tune.table_name(gpu), entries, gpu)
        return {
            "shapes": len(entries),  # one entry each
            "left": len(shapes) - len(entries),
            "entries": [asdict(entry) for entry in entries],
        }

    def profile(self) -> dict:
        """The walk's launches at batch 1024 and 1, for a profiler around this process."""
        workload = self.all_images("cifar")
        engine = workload.engine("walk")
        for batch in (self.scale.batch(1024), 1):
            engine(workload.images[:batch])
        return {"launches": 2}


def _published(family: str, scale: Scale) -> Workload:
    network = {"cifar": "resnet110", "imagenet": "resnet101"}[family]
    return make_workload(network, scale.images[family], device=scale.device, dtype=scale.dtype)


def _tiny(family: str, scale: Scale) -> Workload:
    torch.manual_seed(0)
    backbone = resnet_cifar(8)
    if family == "imagenet":
        layers, widths = (1, 2, 1, 1), (8, 16, 16, 16)
        config = ResNetConfig("bottleneck", layers, widths, "imagenet", "projection", 10)
        backbone = ResNet(config)
    decisions = torch.rand(scale.images[family], backbone.num_blocks) < 0.6
    size = {"cifar": 32, "imagenet": 96}[family]
    return random_workload("tiny", backbone, decisions, size, scale.device, scale.dtype)


def _peak(make: Callable[[], Callable[[], object]]) -> dict[str, int]:
    """Bytes that making something and calling it takes at most."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode(), tuned_convolutions():
        call = make()
        for _ in range(8):
            call()
    torch.cuda.synchronize()
    # A captured graph's memory is reserved for it; that it is allocated shows while it is captured.
    return {
        "allocated": torch.cuda.max_memory_allocated() - before[0],
        "reserved": torch.cuda.max_memory_reserved() - before[1],
    }


def _hidden_waits(call: Callable, images: torch.Tensor) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(images, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


def _shapes(backbone: ResNet, image: torch.Tensor) -> list:
    """The different convolutions within a network's blocks, the most arithmetic first."""
    from blockdrop_fast.measure.tune import Shape

    work = Counter()

    def note(conv: nn.Conv2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        (x,) = inputs
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        shape = Shape(kernel, stride, conv.in_channels, conv.out_channels, *x.shape[2:])
        work[shape] += conv.weight.numel() * output.shape[2] * output.shape[3]

    convs = [
        module
        for block, _ in backbone.blocks()
        for module in block.modules()
        if isinstance(module, nn.Conv2d)
    ]
    hooks = [conv.register_forward_hook(note) for conv in convs]
    try:
        with torch.no_grad():
            backbone(image.to(backbone.fc.weight.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return [shape for shape, _ in work.most_common()]
