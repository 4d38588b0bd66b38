"""The training loop that all stages share: resuming, logging, checkpoints, stopping on NaN."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import blockdrop_fast as bdf
from blockdrop_fast.data.image_sets import ImageFolder, ImageSet
from blockdrop_fast.files import check_new_folder, remove_leftovers, write_json
from blockdrop_fast.networks.checkpoint_files import write_torch
from train import distributed
from train.config import Common
from train.events import Events
from train.images import training_batches
from train.metrics import Means
from train.run_files import (
    METRICS_FILE,
    MODEL_FILE,
    STATE_FILE,
    check_options,
    check_out,
    options_text,
    read_state,
)


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the last checkpoint is as it was."""


class Run:
    """One training run: its folder, its state on disk, its logs.

    Args:
        config: of the stage.
        model: what the run trains and saves (BlockDrop or a backbone).
        optimizers: whose state a checkpoint holds.
        schedulers: likewise, and whatever else has such a state.
        skips_blocks: training passes run active images only, which ``--sync-bn`` cannot follow.
        all_used: whatever is decided, each training step uses all weights that are trained.

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
        all_used: bool = False,
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
        self._options = options_text(config)
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
        self._parallel = distributed.parallel(model, optimizers, all_used)
        self._events = Events(config.out, self.first_epoch)

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
        metrics = {"images_per_second": self.images_per_second} | metrics
        self.history.append({"epoch": epoch} | metrics | (report or {}))
        if distributed.is_first():
            self._events.add(metrics, epoch)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print(f"epoch {epoch}: {shown}")
        if self.due(epoch, self.config.checkpoint_every):
            if distributed.is_first():
                self._save(epoch)
            distributed.wait()

    def due(self, epoch: int, every: int) -> bool:
        """Whether something that happens every so many epochs, and after the last, is due."""
        return epoch == self.config.epochs or epoch % every == 0

    def _save(self, epoch: int) -> None:
        state = {
            # First what is looked at alone, see read_progress.
            "epoch": epoch,
            "config": self._options,
            "step": self.step,
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
        state = read_state(path)
        check_options(state["config"], self.config)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        self.history = json.loads(state["history"])
        self.first_epoch = state["epoch"] + 1
        self.step = state["step"]


def sampling_generator(seed: int, epoch: int, device: torch.device) -> torch.Generator:
    """The generator of an epoch's random decisions: the same after a resume."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + epoch) * 2 + 1)
