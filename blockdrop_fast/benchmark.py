"""The command ``blockdrop benchmark``, and what it shares with ``benchmarks/``: networks,
contenders, and how a measurement is read.

To add a contender, add a line to ``CONTENDERS``.
"""

from __future__ import annotations

import json as json_module
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from blockdrop_fast import baselines, data, timing
from blockdrop_fast._extension import extension_status
from blockdrop_fast.baselines import Call, UnavailableError
from blockdrop_fast.blockdrop import BlockDrop
from blockdrop_fast.checkpoints import load
from blockdrop_fast.engine import Engine, compile
from blockdrop_fast.files import atomic_write
from blockdrop_fast.flops import flops
from blockdrop_fast.folding import FoldedNetwork, fold_network
from blockdrop_fast.models import ResNet, resnet32, resnet101, resnet110
from blockdrop_fast.policy import policy_resnet8, policy_resnet10
from blockdrop_fast.published import published_decisions

NETWORKS = {"resnet32": resnet32, "resnet110": resnet110, "resnet101": resnet101}
BATCHES = (1, 8, 64, 256)
CHECKED_IMAGES = 64
# ResNet-101 takes two cores seconds a batch: its largest batches are left out, and the quick form
# checks fewer images (which still are 16,000 logits).
LARGEST_BATCH = {"resnet101": 64}
QUICK_LARGEST_BATCH = {"resnet32": 64, "resnet110": 64, "resnet101": 8}
QUICK_IMAGENET_IMAGES = 16


@dataclass
class Workload:
    """A network, and the images and decisions that contenders run it on.

    Attributes:
        name: of the network, for tables.
        model: backbone and policy network, in eval mode.
        images: (N, 3, H, W) normalised, contiguous.
        decisions: (N, K) bool.
    """

    name: str
    model: BlockDrop
    images: Tensor
    decisions: Tensor
    _engines: dict[str, Engine] = field(default_factory=dict, repr=False)

    @cached_property
    def folded(self) -> FoldedNetwork:
        """The backbone with folded batch norm, which all baselines share."""
        return fold_network(self.model.backbone, self.images.dtype)

    @cached_property
    def all_kept(self) -> timing.Reference:
        """What a complete network has to compute."""
        return timing.make_reference(self.model.backbone, self.images, None, self.images.dtype)

    @cached_property
    def at_decisions(self) -> timing.Reference:
        """What the backbone has to compute at the decisions."""
        return timing.make_reference(
            self.model.backbone, self.images, self.decisions, self.images.dtype
        )

    def engine(self, strategy: str) -> Engine:
        """The compiled model, once a strategy.

        Raises:
            UnavailableError: the strategy does not serve this network or this installation.
        """
        extension = extension_status()
        if strategy == "walk" and not extension.loaded:
            raise UnavailableError(f"the walk needs the compiled extension: {extension.reason}")
        if strategy not in self._engines:
            try:
                self._engines[strategy] = compile(
                    self.model, dtype=self.images.dtype, strategy=strategy
                )
            except (TypeError, ValueError) as error:
                raise UnavailableError(str(error)) from None
        return self._engines[strategy]


def _at_decisions(workload: Workload, _: Tensor, *, strategy: str) -> Call:
    """A complete BlockDrop: the policy network runs, then the backbone at the given decisions.

    Random weights do not decide as a trained policy does, so what the policy network decides is
    thrown away, after it was paid for.
    """
    engine = workload.engine(strategy)

    def call(images: Tensor, decisions: Tensor) -> Tensor:
        engine.probabilities(images)
        return engine.run(images, decisions)

    return call


def _all_kept(workload: Workload, images: Tensor, *, strategy: str) -> Call:
    """Our engine without a policy network, all blocks kept."""
    engine = workload.engine(strategy)
    keep = torch.ones(len(images), engine.config.num_blocks, dtype=torch.bool, device=images.device)
    return lambda images, _: engine.run(images, keep)


# Name -> kind (see timing.Contender) and builder: (workload, one batch of images) -> call.
CONTENDERS: dict[str, tuple[str, Callable[[Workload, Tensor], Call]]] = {
    "eager": ("baseline", lambda workload, _: baselines.torch_eager(workload.folded)),
    "compile": ("baseline", lambda workload, _: baselines.torch_compiled(workload.folded)),
    "onnxruntime": ("baseline", lambda workload, x: baselines.onnxruntime(workload.folded, x)),
    "openvino": ("baseline", lambda workload, x: baselines.openvino(workload.folded, x)),
    "authors": ("blockdrop", lambda workload, _: baselines.authors_way(workload.model)),
    "dense": ("blockdrop", partial(_at_decisions, strategy="dense")),
    "gather": ("blockdrop", partial(_at_decisions, strategy="gather")),
    "walk": ("blockdrop", partial(_at_decisions, strategy="walk")),
    "gather-all": ("all_kept", partial(_all_kept, strategy="gather")),
    "walk-all": ("all_kept", partial(_all_kept, strategy="walk")),
}
SLOW_TO_BUILD = {"compile"}
# The same engine with all blocks kept, for the share of its own bound.
OWN_COMPLETE = {"gather": "gather-all", "walk": "walk-all"}


@dataclass(frozen=True)
class Row:
    """What was measured of one contender at one batch size.

    Attributes:
        network, batch, contender: which; batch in images.
        kind: see ``timing.Contender``.
        seconds: median of a call.
        images_per_second: batch / seconds.
        flops: of an image, median over the timed batches; the policy network's included.
        speedup: over the fastest complete baseline.
        flop_bound: FLOPs of the complete network / ``flops``.
        share_of_bound: speedup / flop_bound.
        share_of_own_bound: the same, but with the speed-up over this engine with all blocks
            kept; None where that was not timed.
        samples: seconds of each call.
    """

    network: str
    batch: int
    contender: str
    kind: str
    seconds: float
    images_per_second: float
    flops: float
    speedup: float
    flop_bound: float
    share_of_bound: float
    share_of_own_bound: float | None
    samples: tuple[float, ...]


@dataclass(frozen=True)
class Measurement:
    """One network at one batch size: a row a contender, and who could not run and why."""

    rows: tuple[Row, ...]
    unavailable: dict[str, str]


def make_workload(
    network: str, images: int, decisions: Tensor | None = None, device: str = "cpu"
) -> Workload:
    """A network of random weights at the decisions of the published usage.

    Args:
        network: "resnet32", "resnet110" or "resnet101".
        images: N.
        decisions: (at least N, K) bool, the first N are used; default: those of
            ``published_decisions``.
        device: of all tensors.

    Raises:
        ValueError: an unknown network, or fewer decisions than images.
    """
    if network not in NETWORKS:
        raise ValueError(f"network: expected one of {', '.join(NETWORKS)}, got {network!r}")
    decisions = published_decisions(network) if decisions is None else decisions
    if len(decisions) < images:
        raise ValueError(f"images: expected at most {len(decisions)}, got {images}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = NETWORKS[network]()
        _settle(backbone)
        imagenet = backbone.config.stem == "imagenet"
        policy = (policy_resnet10 if imagenet else policy_resnet8)(backbone.num_blocks)
        size = 224 if imagenet else 32
        inputs = torch.randn(images, 3, size, size)
    model = BlockDrop(backbone, policy).eval().requires_grad_(False).to(device)
    return Workload(network, model, inputs.to(device), decisions[:images].to(device))


def _settle(backbone: ResNet) -> None:
    """Give batch norms the statistics and scales of a trained network, roughly.

    Fresh residual blocks double the variance each: after 54 of them floats are no longer what
    trained networks compute with, and tolerances mean little.
    """
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    for block, _ in backbone.blocks():
        last = block.bn3 if backbone.config.block == "bottleneck" else block.bn2
        nn.init.uniform_(last.weight, 0.1, 0.3)


def load_workload(checkpoint: Path, images: int, data_folder: Path | None) -> Workload:
    """A trained BlockDrop at its own decisions on test images drawn from its data set.

    Raises:
        ValueError: a data set of fewer images.
        CheckpointError, OSError: see ``load`` (a bare backbone, for one) and
            ``data.load_dataset``.
    """
    model = load(checkpoint).eval().requires_grad_(False)
    normalization = model.backbone.normalization or data.NO_NORMALIZATION
    test = data.load_dataset(data_folder).test
    if len(test) < images:
        raise ValueError(f"data: expected at least {images} test images, got {len(test)}")
    # Test splits come sorted by class: draw the images.
    drawn = test.subset(images)
    inputs, _ = next(iter(data.batches(drawn, images, normalization=normalization)))
    inputs = inputs.contiguous()
    decisions = compile(model, strategy="dense")(inputs).decisions.clone()
    return Workload(checkpoint.stem, model, inputs, decisions)


def measure(
    workload: Workload,
    batch: int,
    contenders: Sequence[str],
    *,
    rounds: int,
    min_seconds: float = 0.0,
) -> Measurement:
    """Check and time contenders at one batch size, in one round-robin.

    Args:
        workload: N images, N a multiple of the batch size.
        batch: images a call.
        contenders: names out of ``CONTENDERS``, at least one of them an available baseline.
        rounds, min_seconds: see ``timing.interleave``.

    Raises:
        WrongLogitsError: a contender is wrong; then none is timed.
        ValueError: an unknown contender, no baseline, or a batch size that does not divide N.
    """
    batches = timing.chunks(batch, workload.images, workload.decisions)
    built, unavailable = [], {}
    for name in contenders:
        if name not in CONTENDERS:
            raise ValueError(
                f"contenders: expected names out of {', '.join(CONTENDERS)}, got {name!r}"
            )
        kind, build = CONTENDERS[name]
        try:
            with torch.inference_mode():
                built.append(timing.Contender(name, build(workload, batches[0][0]), kind))
        except UnavailableError as error:
            unavailable[name] = str(error)
    if not any(contender.kind == "baseline" for contender in built):
        raise ValueError("contenders: expected at least one complete baseline that can run here")
    samples = timing.time_contenders(
        built,
        batches,
        workload.all_kept,
        workload.at_decisions,
        rounds=rounds,
        min_seconds=min_seconds,
    )
    return Measurement(tuple(_rows(workload, batch, built, samples)), unavailable)


def _rows(
    workload: Workload,
    batch: int,
    contenders: Sequence[timing.Contender],
    samples: dict[str, list[float]],
) -> list[Row]:
    seconds = {name: timing.median(values) for name, values in samples.items()}
    fastest = min(seconds[one.name] for one in contenders if one.kind == "baseline")
    size = tuple(workload.images.shape[2:])
    complete = float(flops(workload.model.backbone, image_size=size))
    means = flops(workload.model, workload.decisions, image_size=size).view(-1, batch).mean(1)
    rows = []
    for one in contenders:
        count = len(samples[one.name])
        # Medians of the same rounds on both sides: round i ran batch i modulo their number.
        used = [float(means[index % len(means)]) for index in range(count)]
        cost = timing.median(used) if one.kind == "blockdrop" else complete
        bound, own = complete / cost, seconds.get(OWN_COMPLETE.get(one.name, ""))
        speedup = fastest / seconds[one.name]
        rows.append(
            Row(
                network=workload.name,
                batch=batch,
                contender=one.name,
                kind=one.kind,
                seconds=seconds[one.name],
                images_per_second=batch / seconds[one.name],
                flops=cost,
                speedup=speedup,
                flop_bound=bound,
                share_of_bound=speedup / bound,
                share_of_own_bound=own / seconds[one.name] / bound if own else None,
                samples=tuple(samples[one.name]),
            )
        )
    return rows


@dataclass(frozen=True)
class Run:
    """How one network is measured.

    Attributes:
        network: a name in ``NETWORKS``, or a checkpoint's path.
        batches: batch sizes.
        images: checked, and cycled through by the timed calls; all batch sizes divide it.
        rounds, min_seconds: see ``timing.interleave``.
    """

    network: str
    batches: tuple[int, ...]
    images: int
    rounds: int
    min_seconds: float


def plan_runs(networks: Sequence[str], batches: Sequence[int], quick: bool) -> list[Run]:
    """How to measure networks, in the full or in the quick form.

    Args:
        networks: names in ``NETWORKS``, or checkpoints' paths.
        batches: batch sizes; none: those of the form.
        quick: the quick form.
    """
    runs = []
    for network in networks:
        largest = (QUICK_LARGEST_BATCH if quick else LARGEST_BATCH).get(network, max(BATCHES))
        sizes = tuple(batches) or tuple(size for size in BATCHES if size <= largest)
        images = QUICK_IMAGENET_IMAGES if quick and network == "resnet101" else CHECKED_IMAGES
        step = math.lcm(*sizes)
        rounds, min_seconds = (5, 1.0) if quick else (15, 10.0)
        runs.append(Run(network, sizes, -(-images // step) * step, rounds, min_seconds))
    return runs


def contender_names(quick: bool) -> list[str]:
    """The contenders of a full or a quick run."""
    return [name for name in CONTENDERS if not (quick and name in SLOW_TO_BUILD)]


def format_rows(rows: Sequence[Row]) -> str:
    """One table, to print."""
    head = (
        f"{'network':<10} {'batch':>5}  {'contender':<12} {'ms/batch':>9} {'images/s':>9} "
        f"{'speed-up':>8} {'bound':>6} {'of bound':>8} {'of own':>7}"
    )
    lines, group = [head, "-" * len(head)], None
    for row in rows:
        if group not in (None, (row.network, row.batch)):
            lines.append("")
        group = (row.network, row.batch)
        own = "" if row.share_of_own_bound is None else f"{100 * row.share_of_own_bound:.0f} %"
        lines.append(
            f"{row.network:<10} {row.batch:>5}  {row.contender:<12} {1e3 * row.seconds:>9.2f} "
            f"{row.images_per_second:>9.1f} {row.speedup:>8.2f} {row.flop_bound:>6.2f} "
            f"{100 * row.share_of_bound:>6.0f} % {own:>7}"
        )
    return "\n".join(lines)


LEGEND = (
    "ms/batch: median of interleaved calls, policy network included. speed-up: over the fastest\n"
    "complete ResNet of eager, compile, onnxruntime, openvino. bound: the speed-up if time were\n"
    "FLOPs. of own: the speed-up over the same engine with all blocks kept, as share of the bound."
)


def command(
    model: str = "all",
    batch: tuple[int, ...] = (),
    quick: bool = False,
    contenders: tuple[str, ...] = (),
    data: Path | None = None,
    json: Path | None = None,
) -> None:
    """Time BlockDrop against the complete ResNet, policy network included, logits checked first.

    Args:
        model: resnet32, resnet110 or resnet101 (random weights at the published block usage),
            all three, or a BlockDrop checkpoint, at its own decisions on its test images.
        batch: batch sizes; default: 1, 8, 64 and 256, of ResNet-101 up to 64.
        quick: fewer repeats, no torch.compile, batch sizes up to 64, of ResNet-101 up to 8.
        contenders: which ones; default: all. At least one complete baseline is needed.
        data: data set folder of a checkpoint; default: BLOCKDROP_DATA, else the digits.
        json: also write all samples and the machine to this file.
    """
    if batch and min(batch) < 1:
        raise ValueError(f"batch: expected positive batch sizes, got {batch}")
    names = list(contenders) or contender_names(quick)
    runs = plan_runs(list(NETWORKS) if model == "all" else [model], batch, quick)
    machine = timing.machine_info()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    rows, unavailable = [], {}
    for run in runs:
        if run.network in NETWORKS:
            workload = make_workload(run.network, run.images)
            source = "random weights at the published block usage"
        else:
            workload = load_workload(Path(run.network), run.images, data)
            source = "trained, at its own decisions"
        kept = workload.decisions.sum(1).double()
        print(
            f"{workload.name}: {source}; {run.images} images, {float(kept.mean()):.1f} ± "
            f"{float(kept.std(correction=0)):.1f} of {workload.decisions.shape[1]} blocks"
        )
        for size in run.batches:
            measurement = measure(
                workload, size, names, rounds=run.rounds, min_seconds=run.min_seconds
            )
            rows += measurement.rows
            unavailable |= measurement.unavailable
    print(f"\n{format_rows(rows)}\n\n{LEGEND}")
    for name, reason in unavailable.items():
        print(f"not timed: {name} ({reason})")
    if json is not None:
        content = {"machine": machine, "unavailable": unavailable}
        content["rows"] = [asdict(row) for row in rows]
        with atomic_write(json) as path:
            path.write_text(json_module.dumps(content, indent=1))
