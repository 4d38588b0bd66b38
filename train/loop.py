"""What all stages share: a run's folder, resuming, logging, and stopping on NaN."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import blockdrop_fast as bdf
from blockdrop_fast.data.batches import Batches, batches_of, load_dataset
from blockdrop_fast.data.image_sets import (
    NO_NORMALIZATION,
    Dataset,
    ImageFolder,
    ImageSet,
    Normalization,
)
from blockdrop_fast.files import check_new_folder, remove_leftovers, write_json
from blockdrop_fast.measure.evaluation import Evaluation, evaluate
from blockdrop_fast.measure.static_line import (
    cached_accuracies,
    cached_static_line,
    default_images,
)
from blockdrop_fast.networks.checkpoint_files import read_torch, write_torch
from train import distributed
from train.config import Common

STATE_FILE = "state.pt"
MODEL_FILE = "model.safetensors"
METRICS_FILE = "metrics.json"
EVALUATION_BATCH = 250

# A run may be resumed with other values of these: they do not change what it computes.
RESUMABLE = {
    "data",
    "out",
    "resume",
    "device",
    "threads",
    "workers",
    "timeout",
    "checkpoint_every",
    "evaluate_every",
    "routing_images",
    "static_images",
}


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the last checkpoint is as it was."""


def check_out(config: Common) -> None:
    """Raise before any work is done unless a run can be written to its folder.

    Raises:
        FileExistsError: it holds another run, which is not to be resumed.
        OSError: it cannot be made or written.
    """
    check_new_folder(config.out)
    if (config.out / STATE_FILE).exists() and not config.resume:
        raise FileExistsError(
            f"out: {config.out} holds a run already; continue it with --resume, or name "
            "another folder"
        )


def options_text(config: Common) -> str:
    """A run's options, as its state on disk keeps them: JSON."""
    return json.dumps(asdict(config), default=str)


def read_state(path: Path, *more: str) -> dict:
    """The state of a run, ``STATE_FILE``.

    Args:
        path: of the file.
        more: what is needed beside "config" and "epoch", which are all that rules leave behind.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is something else, or damaged.
    """
    state = read_torch(path)
    if not {"config", "epoch", *more} <= state.keys():
        raise ValueError(f"{path} is not the checkpoint of a run")
    return state


def changed_options(started_with: str, config: Common) -> list[str]:
    """Options that a run was started with and that have other values now, but for ``RESUMABLE``.

    Args:
        started_with: ``options_text`` of then.
        config: the options now.

    Returns:
        "name then -> now" of each.
    """
    now, defaults = (json.loads(options_text(one)) for one in (config, type(config)()))
    # An option that there was not yet has its default.
    then = defaults | json.loads(started_with)
    return [
        f"{name} {then[name]} -> {now[name]}"
        for name in now
        if name not in RESUMABLE and then[name] != now[name]
    ]


def check_options(started_with: str, config: Common) -> None:
    """Raise ValueError where a run would go on with other options; see ``changed_options``."""
    if changed := changed_options(started_with, config):
        raise ValueError("resume: the run was started with other options: " + ", ".join(changed))


class Run:
    """One training run: its folder, its state on disk, its logs.

    Args:
        config: of the stage.
        model: what the run trains and saves (BlockDrop or a backbone).
        optimizers: whose state a checkpoint holds.
        schedulers: likewise, and whatever else has such a state.
        skips_blocks: training passes run active images only, which ``--sync-bn`` cannot follow.

    Raises:
        FileExistsError: the folder holds a run and ``--resume`` was not given.
        ValueError: ``--resume`` with other options than the run was started with, or from a file
            that is damaged; options that do not go with several processes.
        OSError: the folder cannot be written, or has no room for checkpoints.
    """

    def __init__(
        self,
        config: Common,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        schedulers: list[torch.optim.lr_scheduler.LRScheduler],
        skips_blocks: bool = False,
    ):
        if config.batch_size % distributed.count():
            raise ValueError(
                f"batch_size: expected a multiple of the {distributed.count()} processes, "
                f"got {config.batch_size}"
            )
        if config.sync_bn:
            distributed.synchronize_batch_norm(config, model, skips_blocks)
        self.config = config
        self.model = model
        self.optimizers = optimizers
        self.schedulers = schedulers
        self.history: list[dict] = []
        self.first_epoch = 1
        self.step = 0
        check_out(config)
        for name in (STATE_FILE, MODEL_FILE, METRICS_FILE):
            remove_leftovers(config.out / name)
        check_new_folder(config.out, self._room())
        config.out.mkdir(parents=True, exist_ok=True)
        if (config.out / STATE_FILE).exists():
            self._restore(config.out / STATE_FILE)
        if len(set(distributed.gathered(self.first_epoch))) > 1:
            raise ValueError(
                f"out: processes find different checkpoints in {config.out}; expected a folder "
                "that all machines share"
            )
        self._parallel = distributed.parallel(model, optimizers)
        if distributed.is_first():
            self._writer = SummaryWriter(str(config.out), purge_step=self.first_epoch)

    def epochs(self) -> range:
        """The epochs still to do, 1-based."""
        return range(self.first_epoch, self.config.epochs + 1)

    def batches(
        self,
        image_set: ImageSet | ImageFolder,
        epoch: int,
        batch_size: int,
        numbered: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, augmented training batches under a progress bar; a function of the epoch.

        Of several processes, each has its own images of each batch; see ``train.distributed``.
        """
        batches = training_batches(self.model, image_set, self.config, epoch, batch_size, numbered)
        self._bar = tqdm(
            batches,
            desc=f"epoch {epoch}/{self.config.epochs}",
            unit="step",
            mininterval=5,
            disable=not distributed.is_first(),
        )
        started, self._images = time.monotonic(), 0
        for images, labels in self._bar:
            self.step += 1
            yield images, labels
            self._images += distributed.whole(len(images))
        distributed.average_statistics(self.model)
        self.images_per_second = self._images / (time.monotonic() - started)

    def compute(self, step: Callable[..., Any], *arguments: Any) -> Any:
        """``step(*arguments)``, which is all that a batch's loss takes; gradients are shared."""
        distributed.average_statistics(self.model)
        return self._parallel(step, *arguments)

    def show(self, **values: float) -> None:
        """Put running values on the progress bar."""
        self._bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})

    def check_finite(self, loss: Tensor, **seen: object) -> None:
        """Stop on NaN or infinity.

        Raises:
            NonFiniteLossError: naming the step and what was seen.
        """
        if not torch.isfinite(loss):
            details = ", ".join(f"{name}={value}" for name, value in seen.items())
            raise NonFiniteLossError(
                f"loss is {loss.item()} at step {self.step} ({details}); the last checkpoint in "
                f"{self.config.out} is intact. A lower --lr may help."
            )

    def descend(
        self,
        image_set: ImageSet | ImageFolder,
        epoch: int,
        step: Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]],
        numbered: bool = False,
    ) -> Means:
        """One epoch of gradient descent, in which optimizers and schedulers make a step a batch.

        Args:
            image_set: to train on.
            step: (images, labels) -> the loss, and scalars to log beside it.
            numbered: instead of labels, images' numbers in the split.

        Returns:
            The means of all of them.
        """
        means = Means()
        # The others are there for their state.
        kind = torch.optim.lr_scheduler.LRScheduler
        schedulers = [each for each in self.schedulers if isinstance(each, kind)]
        for images, labels in self.batches(image_set, epoch, self.config.batch_size, numbered):
            loss, seen = self.compute(step, images, labels)
            self.check_finite(loss, epoch=epoch, lr=schedulers[0].get_last_lr()[0])
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for each in (*self.optimizers, *schedulers):
                each.step()
            means.add(len(images), loss=loss, **seen)
            if self.step % 20 == 0:
                self.show(**means.items())
        return means

    def finish_epoch(
        self, epoch: int, metrics: dict[str, float], report: dict | None = None
    ) -> None:
        """Log an epoch's metrics under their names, and write a checkpoint where one is due.

        Args:
            report: JSON-ready, for ``metrics.json`` alone.
        """
        metrics = {"epoch": epoch, "images_per_second": self.images_per_second} | metrics
        self.history.append(metrics | (report or {}))
        if distributed.is_first():
            for name, value in metrics.items():
                if name != "epoch":
                    self._writer.add_scalar(name, value, epoch)
            self._writer.flush()
        print(
            f"epoch {epoch}: "
            + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name != "epoch")
        )
        if self.due(epoch, self.config.checkpoint_every):
            if distributed.is_first():
                self._save(epoch)
            distributed.wait()

    def due(self, epoch: int, every: int) -> bool:
        """Whether something that happens every so many epochs, and after the last, is due."""
        return epoch == self.config.epochs or epoch % every == 0

    def _save(self, epoch: int) -> None:
        state = {
            "epoch": epoch,
            "step": self.step,
            "config": options_text(self.config),
            "history": json.dumps(self.history),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
        }
        bdf.save(self.model, self.config.out / MODEL_FILE)
        write_json(self.config.out / METRICS_FILE, self.history)
        # Last: what a resumed run starts from is never older than the files beside it.
        write_torch(state, self.config.out / STATE_FILE)

    def _room(self) -> int:
        """Bytes that checkpoints need: model and state, and the next state until it replaces this.

        A state is the model again, beside the optimizers' moments.
        """
        model = [tensor.nbytes for tensor in self.model.state_dict().values()]
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        moments = [
            one.nbytes
            for group in groups
            for one in group["params"]
            for _ in range(2 if "betas" in group else 1)
        ]
        files = [self.config.out / name for name in (MODEL_FILE, STATE_FILE)]
        there = sum(file.stat().st_size for file in files if file.exists())
        tensors = 3 * model + 2 * moments
        return sum(tensors) + 512 * len(tensors) - there  # headers of an archive's members

    def _restore(self, path: Path) -> None:
        state = read_state(path, "step", "history", "model", "optimizers", "schedulers")
        check_options(state["config"], self.config)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        self.history = json.loads(state["history"])
        self.first_epoch = state["epoch"] + 1
        self.step = state["step"]


class Means:
    """Running means of an epoch's metrics, without a device synchronisation a step."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight = 0

    def add(self, weight: int, **values: Tensor) -> None:
        """Add scalars tensors, each a mean over ``weight`` images."""
        for name, value in values.items():
            term = value.detach().double() * weight
            self._sums[name] = self._sums[name] + term if name in self._sums else term
        self._weight += weight

    def add_policy(
        self,
        decisions: Tensor,
        correct: Tensor,
        rewards: Tensor,
        samples: slice,
        **values: Tensor,
    ) -> None:
        """Add how good a batch's decisions are, and other means over its images.

        Args: see ``train.reward.Step``; ``samples`` is where the samples are, behind thresholded
            decisions if there are any.
        """
        values |= {"accuracy": correct[samples].float().mean(), "reward": rewards[samples].mean()}
        if samples.start:
            values |= {
                "thresholded_accuracy": correct[0].float().mean(),
                "thresholded_reward": rewards[0].mean(),
                "thresholded_sparsity": decisions[0].sum(1).float().mean(),
            }
        self.add(correct.shape[1], **values)

    def items(self) -> dict[str, float]:
        """The means so far, over all processes' images."""
        means = distributed.mean(torch.stack([*self._sums.values()])) / self._weight
        return dict(zip(self._sums, means.tolist(), strict=True))


class PolicyStatistics:
    """The authors' numbers on an epoch's decisions: sparsity, variance, unique policies."""

    def __init__(self) -> None:
        self._policies: set[bytes] = set()
        self._usage: list[Tensor] = []

    def add(self, decisions: Tensor) -> None:
        """Add (…, K) decisions."""
        decisions = decisions.flatten(0, -2)
        self._usage.append(decisions.sum(-1).cpu())
        packed = decisions.unique(dim=0).cpu().numpy()
        self._policies.update(row.tobytes() for row in packed)

    def items(self, split: str) -> dict[str, float]:
        """Scalars under the authors' TensorBoard names ("variance" is a standard deviation)."""
        usage = torch.cat(distributed.gathered(torch.cat(self._usage))).double()
        policies = set().union(*distributed.gathered(self._policies))
        return {
            f"{split}_sparsity": float(usage.mean()),
            f"{split}_variance": float(usage.std(correction=0)),
            f"{split}_unique_policies": len(policies),
        }


def evaluation_metrics(evaluation: Evaluation, penalty: float) -> dict[str, float]:
    """Test metrics, at thresholded decisions, under the authors' TensorBoard names.

    Behind them what the authors do not log: whether it pays that decisions depend on the image.
    """
    metrics = {
        "test_accuracy": evaluation.accuracy,
        "test_reward": evaluation.reward(penalty),
        "test_sparsity": evaluation.block_usage,
        "test_variance": evaluation.block_usage_std,
        "test_unique_policies": evaluation.unique_policies,
    }
    routing = {
        "effective_policies": evaluation.effective_policies,
        "routing_gain": evaluation.routing_gain,
        "routing_gain_std": evaluation.routing_gain_std,
        "margin_correlation": evaluation.margin_correlation,
        "static_accuracy": evaluation.static_accuracy,
        "envelope_accuracy": evaluation.envelope_accuracy,
    }
    return metrics | {f"test_{name}": x for name, x in routing.items() if x is not None}


def prepare(config: Common) -> tuple[torch.device, Dataset]:
    """Apply thread and device options, and load the data set."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = distributed.device_for(config)
    dataset = load_dataset(config.data)
    train = dataset.train if config.limit is None else dataset.train.subset(config.limit)
    test = dataset.test
    if isinstance(train, ImageSet):
        train, test = train.to(device), test.to(device)
    return device, Dataset(train, test, dataset.name, dataset.classes)


def check_held_out(held_out: int, images: int) -> None:
    """Raise ValueError unless so many of the training images can be held out."""
    if not 0 < held_out < images:
        raise ValueError(f"held_out: expected 1 to {images - 1}, got {held_out}")


def split(
    image_set: ImageSet | ImageFolder, held_out: int, seed: int
) -> tuple[ImageSet | ImageFolder, ImageSet | ImageFolder]:
    """Divide a training split at random: images that are held out, and images to train on.

    Raises:
        ValueError: nothing would be left of one of the two.
    """
    check_held_out(held_out, len(image_set))
    order = torch.randperm(len(image_set), generator=torch.Generator().manual_seed(seed))
    return tuple(
        image_set.take(part.sort().values) for part in (order[:held_out], order[held_out:])
    )


def sgd(config: Common, parameters: Iterable[nn.Parameter] | list[dict]) -> torch.optim.SGD:
    """SGD with Nesterov momentum, by a stage's options, at ``lr`` or what groups say."""
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=True,
    )


def one_cycle(
    config: Common, parameters: Iterable[nn.Parameter] | list[dict], images: int
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.OneCycleLR]:
    """SGD with Nesterov momentum, and a one-cycle schedule over all steps of a run.

    Args:
        config: of a stage that has their options.
        parameters: to train at ``lr``, or groups with a peak of their own.
        images: that an epoch trains on.
    """
    optimizer = sgd(config, parameters)
    peaks = [group["lr"] for group in optimizer.param_groups]
    steps = max(1, images // config.batch_size) * config.epochs
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peaks, total_steps=steps, cycle_momentum=False
    )
    return optimizer, scheduler


def autocast(config: Common, device: torch.device) -> AbstractContextManager:
    """Mixed precision of training passes where the device has it."""
    if _in_bfloat16(config, device):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def engine_dtype(config: Common, device: torch.device) -> torch.dtype:
    """Of engines, for rewards and evaluation: on a GPU that of the training passes.

    On a CPU always float32: its kernels are the faster ones there.
    """
    bfloat16 = device.type == "cuda" and _in_bfloat16(config, device)
    return torch.bfloat16 if bfloat16 else torch.float32


def _in_bfloat16(config: Common, device: torch.device) -> bool:
    if config.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return config.precision == "bfloat16"


def evaluate_test(
    engine: bdf.Engine,
    dataset: Dataset,
    workers: int,
    decide=None,
    routing_images: int = 0,
    static_accuracies: Tensor | None = None,
) -> Evaluation:
    """Evaluate on the test split; see ``evaluate``. Processes share the work."""
    return evaluate(
        distributed.shared(engine),
        plain_batches(engine.model, dataset.test, EVALUATION_BATCH, workers),
        decide,
        routing_images=routing_images,
        static_accuracies=static_accuracies,
    )


def static_accuracies_of(
    checkpoint: Path, engine: bdf.Engine, dataset: Dataset, images: int | None, workers: int
) -> Tensor | None:
    """(K+1,) accuracies of the backbone's static line on the test split; None for 0 images.

    Args:
        checkpoint: beside which they are kept.
        engine: with the backbone's present weights.
        images: training images to find the line on; None: by the depth, and none of a data set of
            larger images, where it would take hours.
    """
    if images is None:
        in_memory = isinstance(dataset.train, ImageSet)
        images = default_images(engine.config.num_blocks) if in_memory else 0
    if images == 0:
        return None
    some = dataset.train.subset(min(images, len(dataset.train)))
    engine = distributed.shared(engine)

    def batches(split: ImageSet | ImageFolder) -> Batches:
        return plain_batches(engine.backbone, split, EVALUATION_BATCH, workers)

    keep = distributed.is_first()
    line = cached_static_line(checkpoint, engine, list(batches(some)), keep=keep)
    return cached_accuracies(checkpoint, engine, line, lambda: batches(dataset.test), keep=keep)


def training_batches(
    model: nn.Module,
    image_set: ImageSet | ImageFolder,
    config: Common,
    epoch: int,
    batch_size: int,
    numbered: bool = False,
) -> Batches:
    """A split shuffled and augmented, a function of seed and epoch, as the model takes it.

    Without a last, smaller batch. Of several processes, each has its own images of each batch, as
    many as the others.

    Raises:
        ValueError: there are fewer images than processes.
    """
    processes = distributed.count()
    if len(image_set) < processes:
        raise ValueError(
            f"limit: {len(image_set)} images cannot be shared by {processes} processes"
        )
    return batches_of(
        image_set,
        min(batch_size, len(image_set) // processes * processes),
        shuffle=True,
        augment=True,
        normalization=normalization_of(model),
        seed=config.seed,
        epoch=epoch,
        device=device_of(model),
        drop_last=True,
        memory_format=torch.channels_last,
        workers=config.workers,
        numbered=numbered,
        shard=(distributed.rank(), processes),
    )


def plain_batches(
    model: nn.Module, image_set: ImageSet | ImageFolder, batch_size: int, workers: int
) -> Batches:
    """A split in order and not augmented, as the model takes it; the same in all processes.

    Image files are shared: each process reads some, and gives them to the others.
    """
    processes, images = distributed.count(), len(image_set)
    sizes = [min(batch_size, images - start) for start in range(0, images, batch_size)]
    shares = isinstance(image_set, ImageFolder) and 1 < processes <= min(sizes, default=0)
    batches = batches_of(
        image_set,
        batch_size,
        normalization=normalization_of(model),
        device=device_of(model),
        memory_format=torch.channels_last,
        workers=workers,
        shard=(distributed.rank(), processes) if shares else (0, 1),
    )
    return Batches(_joined(batches, sizes), len(batches)) if shares else batches


def _joined(batches: Batches, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    for (images, labels), size in zip(batches, sizes, strict=True):
        whole = distributed.joined(images, size).contiguous(memory_format=torch.channels_last)
        yield whole, distributed.joined(labels, size)


def normalization_of(model: nn.Module) -> Normalization:
    """What the model's images are normalised with."""
    one = model.networks[0] if isinstance(model, bdf.Cascade) else model
    backbone = one.backbone if isinstance(one, bdf.BlockDrop) else one
    return backbone.normalization or NO_NORMALIZATION


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


def sampling_generator(seed: int, epoch: int, device: torch.device) -> torch.Generator:
    """The generator of an epoch's random decisions: the same after a resume."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + epoch) * 2 + 1)
