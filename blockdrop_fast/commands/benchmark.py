"""The command ``blockdrop benchmark``, and what it shares with ``benchmarks/``: networks,
contenders, and how a measurement is read.

To add a contender, add a line to ``CONTENDERS``.
"""

from __future__ import annotations

import copy
import json as json_module
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from blockdrop_fast._extension import extension_status
from blockdrop_fast.data.batches import batches_of, load_dataset
from blockdrop_fast.data.image_sets import NO_NORMALIZATION
from blockdrop_fast.engine import Engine, compile
from blockdrop_fast.executors import crossover
from blockdrop_fast.executors.gather_graph import Launch
from blockdrop_fast.files import atomic_write
from blockdrop_fast.machine import machine_info
from blockdrop_fast.measure import baselines, calibration, timing, tolerance
from blockdrop_fast.measure.baselines import Call, UnavailableError
from blockdrop_fast.measure.published import published_decisions
from blockdrop_fast.networks.blockdrop import BlockDrop, Output
from blockdrop_fast.networks.checkpoints import load
from blockdrop_fast.networks.flops import DEFAULT_IMAGE_SIZE, flops
from blockdrop_fast.networks.folding import FoldedNetwork, fold_network
from blockdrop_fast.networks.policy import policy_resnet8, policy_resnet10
from blockdrop_fast.networks.resnet import ResNet, resnet32, resnet101, resnet110

NETWORKS = {"resnet32": resnet32, "resnet110": resnet110, "resnet101": resnet101}
BATCHES = (1, 8, 64, 256)
CHECKED_IMAGES = 64
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# ResNet-101 takes two cores seconds a batch: on a CPU its largest batches are left out, and the
# quick form checks fewer images (which still are 16,000 logits).
LARGEST_BATCH = {"resnet101": 64}
QUICK_LARGEST_BATCH = {"resnet32": 64, "resnet110": 64, "resnet101": 8}
QUICK_IMAGENET_IMAGES = 16


@dataclass
class Workload:
    """A network, and the images and decisions that contenders run it on.

    Attributes:
        name: of the network, for tables.
        model: backbone and policy network, in eval mode, in float32 or in the images' dtype.
        images: (N, 3, H, W) normalised, contiguous, of the contenders' dtype and device.
        decisions: (N, K) bool.
    """

    name: str
    model: BlockDrop
    images: Tensor
    decisions: Tensor
    _engines: dict[tuple, Engine] = field(default_factory=dict, repr=False)
    _slowly_built: dict[tuple[str, int], Call] = field(default_factory=dict, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """What contenders compute in."""
        return self.images.dtype

    @cached_property
    def folded(self) -> FoldedNetwork:
        """The backbone with folded batch norm, which all baselines share."""
        return fold_network(self.model.backbone, self.dtype)

    @cached_property
    def all_kept(self) -> tolerance.Reference:
        """What a complete network has to compute."""
        return tolerance.make_reference(self.model.backbone, self.images, None, self.dtype)

    @cached_property
    def at_decisions(self) -> tolerance.Reference:
        """What the backbone has to compute at the decisions."""
        return tolerance.make_reference(
            self.model.backbone, self.images, self.decisions, self.dtype
        )

    @cached_property
    def policy_logits(self) -> tolerance.Reference:
        """What the policy network has to compute."""
        return tolerance.make_policy_reference(self.model.policy, self.images, self.dtype)

    def check_own(self, name: str, output: Output) -> None:
        """Raise unless an engine decided as the policy network does, and is right at that.

        Raises:
            WrongLogitsError: naming the contender.
        """
        self.policy_logits.check_decisions(name, output.decisions)
        if torch.equal(output.decisions, self.decisions):
            reference = self.at_decisions
        else:
            reference = tolerance.make_reference(
                self.model.backbone, self.images, output.decisions, self.dtype
            )
        reference.check(name, output.logits)

    def engine(self, strategy: str, launch: Launch = "counts") -> Engine:
        """The compiled model, once a strategy; see ``compile``.

        Raises:
            UnavailableError: the strategy does not serve this network or this installation.
        """
        extension = extension_status()
        if strategy == "walk" and not extension.loaded:
            raise UnavailableError(f"the walk needs the compiled extension: {extension.reason}")
        if strategy == "walk" and self.images.is_cuda and not extension.build_info.get("cuda"):
            raise UnavailableError("the walk on a GPU needs CUDA kernels: see `blockdrop info`")
        key = (strategy, launch)
        if key not in self._engines:
            try:
                self._engines[key] = compile(
                    self.model, dtype=self.dtype, strategy=strategy, launch=launch
                )
            except (TypeError, ValueError) as error:
                raise UnavailableError(str(error)) from None
        return self._engines[key]

    def engine_reasons(self) -> dict[str, str]:
        """Of each engine made so far, by strategy and launch: why it runs as it does."""
        return {
            " ".join(key): f"{engine.strategy}, {engine.strategy_reason}"
            for key, engine in self._engines.items()
        }

    def build(self, name: str, images: Tensor) -> Call:
        """A contender's call for batches like ``images``; what is slow to build only once.

        Raises:
            UnavailableError: it cannot run here.
        """
        build = CONTENDERS[name][1]
        if name not in SLOW_TO_BUILD:
            return build(self, images)
        key = (name, len(images))
        if key not in self._slowly_built:
            self._slowly_built[key] = build(self, images)
        return self._slowly_built[key]

    def first(self, images: int) -> Workload:
        """The same on the first images only; engines are shared."""
        return replace(self, images=self.images[:images], decisions=self.decisions[:images])

    def at(self, decisions: Tensor) -> Workload:
        """The same at other decisions (N, K); engines are shared."""
        return replace(self, decisions=decisions.to(self.decisions.device))


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


def _decides(workload: Workload, _: Tensor, *, strategy: str, launch: Launch = "counts") -> Call:
    """A complete BlockDrop in one call, at the decisions of its own policy network."""
    engine = workload.engine(strategy, launch)
    return lambda images, _: engine(images)


def _all_kept(workload: Workload, images: Tensor, *, strategy: str) -> Call:
    """Our engine without a policy network, all blocks kept."""
    engine = workload.engine(strategy)
    keep = torch.ones(len(images), engine.config.num_blocks, dtype=torch.bool, device=images.device)
    return lambda images, _: engine.run(images, keep)


# Name -> kind (see timing.Contender) and builder: (workload, one batch of images) -> call.
CONTENDERS: dict[str, tuple[str, Callable[[Workload, Tensor], Call]]] = {
    "eager": ("baseline", lambda workload, _: baselines.torch_eager(workload.folded)),
    "compile": ("baseline", lambda workload, x: baselines.torch_compiled(workload.folded, x)),
    "cudnn-graph": ("baseline", lambda workload, x: baselines.cudnn_graph(workload.folded, x)),
    "onnxruntime": ("baseline", lambda workload, x: baselines.onnxruntime(workload.folded, x)),
    "openvino": ("baseline", lambda workload, x: baselines.openvino(workload.folded, x)),
    "authors": (
        "blockdrop",
        lambda workload, _: baselines.authors_way(workload.model, workload.dtype),
    ),
    "dense": ("blockdrop", partial(_at_decisions, strategy="dense")),
    "gather": ("blockdrop", partial(_at_decisions, strategy="gather")),
    "walk": ("blockdrop", partial(_at_decisions, strategy="walk")),
    "gather-decides": ("decides", partial(_decides, strategy="gather")),
    "gather-universal": ("decides", partial(_decides, strategy="gather", launch="universal")),
    "gather-conditional": ("decides", partial(_decides, strategy="gather", launch="conditional")),
    "walk-decides": ("decides", partial(_decides, strategy="walk")),
    "gather-all": ("all_kept", partial(_all_kept, strategy="gather")),
    "walk-all": ("all_kept", partial(_all_kept, strategy="walk")),
}
SLOW_TO_BUILD = {"compile"}
# On a GPU the policy network shares a launch, or a stream, with the backbone: what it costs shows
# only where an engine decides for itself.
CPU_ONLY = {"onnxruntime", "openvino"}
GPU_ONLY = {
    "cudnn-graph",
    "gather-decides",
    "gather-universal",
    "gather-conditional",
    "walk-decides",
}
# The same engine with all blocks kept, for the share of its own bound.
OWN_COMPLETE = {
    "gather": "gather-all",
    "walk": "walk-all",
    "gather-decides": "gather-all",
    "gather-universal": "gather-all",
    "gather-conditional": "gather-all",
    "walk-decides": "walk-all",
}


@dataclass(frozen=True)
class Row:
    """What was measured of one contender at one batch size.

    Attributes:
        network, batch, contender: which; batch in images.
        kind: see ``timing.Contender``.
        seconds: median of a call; on a GPU, of the device.
        host_seconds: on a GPU, median from call to synchronised result; None if not timed.
        images_per_second: batch / seconds.
        flops: of an image, median over the timed batches; the policy network's included.
        speedup: over the fastest complete baseline.
        flop_bound: FLOPs of the complete network / ``flops``.
        share_of_bound: speedup / flop_bound.
        share_of_own_bound: the same, but with the speed-up over this engine with all blocks
            kept; None where that was not timed.
        block_usage: mean and standard deviation over the images; None of a complete network.
        policies: how many different decisions the images have; None of a complete network.
        samples, host_samples: seconds of each call.
    """

    network: str
    batch: int
    contender: str
    kind: str
    seconds: float
    host_seconds: float | None
    images_per_second: float
    flops: float
    speedup: float
    flop_bound: float
    share_of_bound: float
    share_of_own_bound: float | None
    block_usage: tuple[float, float] | None
    policies: int | None
    samples: tuple[float, ...]
    host_samples: tuple[float, ...]


@dataclass(frozen=True)
class Measurement:
    """One network at one batch size: a row a contender, and who could not run and why."""

    rows: tuple[Row, ...]
    unavailable: dict[str, str]


def make_workload(
    network: str,
    images: int,
    decisions: Tensor | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Workload:
    """A network of random weights at the decisions of the published usage.

    Args:
        network: "resnet32", "resnet110" or "resnet101".
        images: N.
        decisions: (at least N, K) bool, the first N are used; default: those of
            ``published_decisions``.
        device: of all tensors.
        dtype: of the images, and what contenders compute in.

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
        size = DEFAULT_IMAGE_SIZE[backbone.config.stem]
        return random_workload(network, backbone, decisions[:images], size, device, dtype)


def random_workload(
    name: str,
    backbone: ResNet,
    decisions: Tensor,
    size: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Workload:
    """A network with batch norms as of a trained one, a policy network for it, and images.

    Args:
        name: for tables.
        backbone: with fresh weights.
        decisions: (N, K) bool.
        size: height and width of the images.
        device, dtype: see ``make_workload``.
    """
    _settle(backbone)
    imagenet = backbone.config.stem == "imagenet"
    policy = (policy_resnet10 if imagenet else policy_resnet8)(backbone.num_blocks)
    inputs = torch.randn(len(decisions), 3, size, size)
    model = BlockDrop(backbone, policy).eval().requires_grad_(False).to(device)
    return Workload(name, model, inputs.to(device, dtype), decisions.to(device))


def fit_policy(workload: Workload) -> Workload:
    """The same with a policy network that decides about as the workload's decisions.

    Images are tinted, each policy of the decisions with a colour of its own. The policy network's
    head is the least-squares map from its features to the decisions as -1 and 1; then each
    block's threshold is set so that as many images keep it. Ten policies are met exactly; of
    hundreds, the blocks' keep rates are, and which images keep which blocks is what the features
    tell. Time does not depend on what images or weights hold but for the decisions.
    """
    decisions = workload.decisions
    policies, index = decisions.cpu().unique(dim=0, return_inverse=True)
    generator = torch.Generator().manual_seed(0)
    colours = torch.randn(len(policies), 3, generator=generator).to(workload.images)
    images = workload.images + colours[index.to(colours.device)][:, :, None, None]
    model = copy.deepcopy(workload.model)
    head = model.policy.network.fc
    trunk = copy.deepcopy(model.policy)
    trunk.network.fc = nn.Identity()
    with torch.no_grad():
        rows = images.to(head.weight.dtype).split(tolerance.REFERENCE_CHUNK)
        features = torch.cat([trunk.logits(part) for part in rows]).double().cpu()
        mean = features.mean(0)
        centred, target = features - mean, 2 * decisions.double().cpu() - 1
        gram = centred.T @ centred
        # A little ridge: directions in which features hardly vary would be noise at 16 bits.
        gram += 1e-5 * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
        weight = torch.linalg.solve(gram, centred.T @ (target - target.mean(0)))
        weight /= (centred @ weight).std() + 1e-12
        logits = centred @ weight
        ranked = logits.sort(0, descending=True).values
        # Between the last image that keeps the block and the first that drops it.
        ranked = torch.cat([ranked[:1] + 2, ranked, ranked[-1:] - 2])
        kept = decisions.sum(0, keepdim=True).cpu()
        threshold = (ranked.gather(0, kept) + ranked.gather(0, kept + 1))[0] / 2
        head.weight.copy_(weight.T)
        head.bias.copy_(-(mean @ weight) - threshold)
    return Workload(workload.name, model, images, decisions)


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


def load_workload(
    checkpoint: Path,
    images: int,
    data_folder: Path | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Workload:
    """A trained BlockDrop at its own decisions on test images drawn from its data set.

    Args:
        checkpoint: a file, or a name of ``checkpoints.load``.
        images: N.
        data_folder: of the data set; None: see ``data.load_dataset``.
        device, dtype: see ``make_workload``.

    Raises:
        ValueError: a data set of fewer images.
        CheckpointError, OSError: see ``load`` (a bare backbone, for one) and
            ``data.load_dataset``.
    """
    model = load(checkpoint).eval().requires_grad_(False).to(device)
    normalization = model.backbone.normalization or NO_NORMALIZATION
    test = load_dataset(data_folder).test
    if len(test) < images:
        raise ValueError(f"data: expected at least {images} test images, got {len(test)}")
    # Test splits come sorted by class: draw the images.
    drawn = test.subset(images)
    inputs, _ = next(iter(batches_of(drawn, images, normalization=normalization)))
    inputs = inputs.contiguous().to(device, dtype)
    decisions = compile(model, dtype=dtype, strategy="dense")(inputs).decisions.clone()
    return Workload(checkpoint.stem, model, inputs, decisions)


def measure(
    workload: Workload,
    batch: int,
    contenders: Sequence[str],
    *,
    rounds: int,
    min_seconds: float = 0.0,
    host: bool = False,
) -> Measurement:
    """Check and time contenders at one batch size, in one round-robin.

    Args:
        workload: N images, N a multiple of the batch size.
        batch: images a call.
        contenders: names out of ``CONTENDERS``, at least one of them an available baseline.
        rounds, min_seconds: see ``timing.interleave``.
        host: on a GPU, also time from call to synchronised result.

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
        try:
            with torch.no_grad():  # compilers would rather have no inference tensors as weights
                call = workload.build(name, batches[0][0])
            built.append(timing.Contender(name, call, CONTENDERS[name][0]))
        except UnavailableError as error:
            unavailable[name] = str(error)
    if not any(contender.kind == "baseline" for contender in built):
        raise ValueError("contenders: expected at least one complete baseline that can run here")
    timed = timing.time_contenders(
        built,
        batches,
        workload.all_kept,
        workload.at_decisions,
        workload.check_own,
        rounds=rounds,
        min_seconds=min_seconds,
        host=host and workload.images.is_cuda,
    )
    return Measurement(tuple(_rows(workload, batch, built, timed)), unavailable)


def _rows(
    workload: Workload, batch: int, contenders: Sequence[timing.Contender], timed: timing.Timed
) -> list[Row]:
    samples = timed.samples
    seconds = {name: timing.median(values) for name, values in samples.items()}
    fastest = min(seconds[one.name] for one in contenders if one.kind == "baseline")
    size = tuple(workload.images.shape[2:])
    complete = float(flops(workload.model.backbone, image_size=size))
    rows = []
    for one in contenders:
        cost, usage, policies = complete, None, None
        executed = timed.decisions[one.name]
        if executed is not None:
            executed = executed.cpu()
            means = flops(workload.model, executed, image_size=size).view(-1, batch).mean(1)
            # Medians of the same rounds on both sides: round i ran batch i modulo their number.
            count = len(samples[one.name])
            cost = timing.median([float(means[i % len(means)]) for i in range(count)])
            kept = executed.sum(1).double()
            usage = (float(kept.mean()), float(kept.std(correction=0)))
            policies = len(executed.unique(dim=0))
        host_samples = tuple(timed.host_samples.get(one.name, ()))
        bound, own = complete / cost, seconds.get(OWN_COMPLETE.get(one.name, ""))
        speedup = fastest / seconds[one.name]
        rows.append(
            Row(
                network=workload.name,
                batch=batch,
                contender=one.name,
                kind=one.kind,
                seconds=seconds[one.name],
                host_seconds=timing.median(host_samples) if host_samples else None,
                images_per_second=batch / seconds[one.name],
                flops=cost,
                speedup=speedup,
                flop_bound=bound,
                share_of_bound=speedup / bound,
                share_of_own_bound=own / seconds[one.name] / bound if own else None,
                block_usage=usage,
                policies=policies,
                samples=tuple(samples[one.name]),
                host_samples=host_samples,
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


def plan_runs(
    networks: Sequence[str], batches: Sequence[int], quick: bool, on_gpu: bool = False
) -> list[Run]:
    """How to measure networks, in the full or in the quick form.

    Args:
        networks: names in ``NETWORKS``, or checkpoints' paths.
        batches: batch sizes; none: those of the form.
        quick: the quick form.
        on_gpu: all batch sizes and images, also in the quick form.
    """
    runs = []
    for network in networks:
        limits = {} if on_gpu else QUICK_LARGEST_BATCH if quick else LARGEST_BATCH
        largest = limits.get(network, max(BATCHES))
        sizes = tuple(batches) or tuple(size for size in BATCHES if size <= largest)
        few = quick and network == "resnet101" and not on_gpu
        images = QUICK_IMAGENET_IMAGES if few else CHECKED_IMAGES
        step = math.lcm(*sizes)
        rounds, min_seconds = (5, 1.0) if quick else (15, 10.0)
        runs.append(Run(network, sizes, -(-images // step) * step, rounds, min_seconds))
    return runs


def contender_names(quick: bool, on_gpu: bool = False) -> list[str]:
    """The contenders of a full or a quick run."""
    left_out = (SLOW_TO_BUILD if quick else set()) | (CPU_ONLY if on_gpu else GPU_ONLY)
    return [name for name in CONTENDERS if name not in left_out]


def format_rows(rows: Sequence[Row]) -> str:
    """One table, to print; with a column of host times if there are any."""
    host = any(row.host_seconds for row in rows)
    head = (
        f"{'network':<10} {'batch':>5}  {'contender':<15} {'ms/batch':>9} "
        f"{'host ms ' if host else '':>{8 if host else 0}}{'images/s':>9} "
        f"{'speed-up':>8} {'bound':>6} {'of bound':>8} {'of own':>7}"
    )
    lines, group = [head, "-" * len(head)], None
    for row in rows:
        if group not in (None, (row.network, row.batch)):
            lines.append("")
        group = (row.network, row.batch)
        own = "" if row.share_of_own_bound is None else f"{100 * row.share_of_own_bound:.0f} %"
        waited = f"{1e3 * row.host_seconds:.3f} " if row.host_seconds else ""
        # Batches of a GPU take microseconds.
        digits = 2 if row.seconds >= 1e-3 else 3
        lines.append(
            f"{row.network:<10} {row.batch:>5}  {row.contender:<15} "
            f"{1e3 * row.seconds:>9.{digits}f} {waited:>{8 if host else 0}}"
            f"{row.images_per_second:>9.1f} {row.speedup:>8.2f} {row.flop_bound:>6.2f} "
            f"{100 * row.share_of_bound:>6.0f} % {own:>7}"
        )
    return "\n".join(lines)


LEGEND = (
    "ms/batch: median of interleaved calls, policy network included. speed-up: over the fastest\n"
    "complete ResNet of another engine. bound: the speed-up if time were FLOPs. of own: the\n"
    "speed-up over the same engine with all blocks kept, as share of the bound."
)


def command(
    model: str = "all",
    batch: tuple[int, ...] = (),
    quick: bool = False,
    contenders: tuple[str, ...] = (),
    data: Path | None = None,
    json: Path | None = None,
    device: str = "cpu",
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    calibrate: bool = False,
) -> None:
    """Time BlockDrop against the complete ResNet, policy network included, logits checked first.

    Args:
        model: resnet32, resnet110 or resnet101 (random weights at the published block usage),
            all three, or a BlockDrop checkpoint, at its own decisions on its test images.
        batch: batch sizes; default: 1, 8, 64 and 256, of ResNet-101 on a CPU up to 64.
        quick: fewer repeats, no torch.compile; on a CPU batch sizes up to 64, of ResNet-101 up
            to 8.
        contenders: which ones; default: all. At least one complete baseline is needed.
        data: data set folder of a checkpoint; default: BLOCKDROP_DATA, else the digits.
        json: also write all samples and the machine to this file.
        device: cpu or cuda.
        dtype: default: float32 on a CPU, bfloat16 on a GPU.
        calibrate: measure from which share of kept blocks on dropping does not pay on this
            device, and remember it for ``compile(strategy="auto")``.
    """
    if batch and min(batch) < 1:
        raise ValueError(f"batch: expected positive batch sizes, got {batch}")
    if calibrate and contenders:
        raise ValueError("contenders: --calibrate has its own, expected none")
    place = _device(device)
    on_gpu = place.type == "cuda"
    precision = DTYPES[dtype or ("bfloat16" if on_gpu else "float32")]
    runs = plan_runs(list(NETWORKS) if model == "all" else [model], batch, quick, on_gpu)
    machine = machine_info(place)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    rows, unavailable = [], {}
    for run in runs:
        if run.network in NETWORKS:
            workload = make_workload(run.network, run.images, device=place, dtype=precision)
            source = "random weights at the published block usage"
        else:
            workload = load_workload(Path(run.network), run.images, data, place, precision)
            source = "trained, at its own decisions"
        if calibrate:
            _calibrate(workload, run, json)
            continue
        names = list(contenders) or contender_names(quick, on_gpu)
        kinds = {CONTENDERS[name][0] for name in names if name in CONTENDERS}
        if "decides" in kinds and run.network in NETWORKS:
            workload = fit_policy(workload)
        kept = workload.decisions.sum(1).double()
        print(
            f"{workload.name}: {source}; {run.images} images, {float(kept.mean()):.1f} ± "
            f"{float(kept.std(correction=0)):.1f} of {workload.decisions.shape[1]} blocks"
        )
        for size in run.batches:
            measurement = measure(
                workload,
                size,
                names,
                rounds=run.rounds,
                min_seconds=run.min_seconds,
                host=size == 1,
            )
            rows += measurement.rows
            unavailable |= measurement.unavailable
    if calibrate:
        return
    print(f"\n{format_rows(rows)}\n\n{LEGEND}")
    for name, reason in unavailable.items():
        print(f"not timed: {name} ({reason})")
    if json is not None:
        content = {"machine": machine, "unavailable": unavailable}
        content["rows"] = [asdict(row) for row in rows]
        with atomic_write(json) as path:
            path.write_text(json_module.dumps(content, indent=1))


def _device(name: str) -> torch.device:
    """A device that torch can use here.

    Raises:
        ValueError: it cannot, or this is no device's name.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: torch {torch.__version__} finds no GPU here, got {name!r}")
    return device


def _calibrate(workload: Workload, run: Run, copy_to: Path | None) -> None:
    """Measure, print and remember a network's crossover table."""
    config, device = workload.model.backbone.config, workload.images.device
    print(
        f"\n{workload.name}, {str(workload.dtype).removeprefix('torch.')}: random decisions of "
        f"each keep rate, no policy network; logits checked on {run.images} images"
    )
    cells = calibration.calibrate(
        calibration_subject(workload),
        run.batches,
        # Many short measurements: fewer rounds each than where one figure is to be reported.
        rounds=max(3, run.rounds // 3),
        min_seconds=max(1.0, run.min_seconds / 5),
    )
    print(calibration.verdict(cells))
    for path in {crossover.user_file(), copy_to} - {None}:
        print(f"written: {crossover.save(config, workload.dtype, device, cells, path)}")


def calibration_subject(workload: Workload) -> calibration.Subject:
    """What ``calibration.calibrate`` needs of a workload."""
    try:
        walk = workload.engine("walk").run
    except UnavailableError:
        walk = None
    return calibration.Subject(workload.model.backbone, workload.folded, workload.images, walk)
