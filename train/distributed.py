"""Several processes train as one: those that ``torchrun`` starts, on one machine or several.

Every process runs the whole program on its share of each batch: of P processes, process r has
images r, r + P, r + 2P … (``own``), which is what a ``DistributedSampler`` deals out. Gradients are
averaged by ``DistributedDataParallel``. What is drawn at random for a batch is drawn for the whole
of it by every process, and each takes its own; what runs without gradients, evaluation above all,
is divided in the same way and put together again (``share``). So a run of several processes does
what one process would do, but for batch statistics (docs/distributed.md).

Without ``torchrun`` all of this does nothing.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

import blockdrop_fast as bdf
from train.config import Common


class LostProcessError(RuntimeError):
    """Another process has ended, or has not answered for the timeout."""


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes files."""
    return rank() == 0


@contextmanager
def processes(config: Common) -> Iterator[None]:
    """Join the others that ``torchrun`` has started; the first one alone prints.

    Raises:
        ValueError: options that do not go with several processes.
        LostProcessError: in a process that is left, within ``--timeout`` seconds.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    device = device_for(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Else a lost process ends this one by a signal, without a word.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    # It would say so of every network that happens to use all of its weights.
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    # By torch 2.13, whose other name for it older ones do not know.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    try:
        _meet("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", config.timeout)
        with (
            open(os.devnull, "w") as nowhere,
            redirect_stdout(sys.stdout if is_first() else nowhere),
        ):
            yield
    except RuntimeError as error:
        if _is_of_communication(error):
            raise LostProcessError(
                f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} has lost another one "
                f"({str(error).strip().splitlines()[0]}); the last checkpoint in {config.out} is "
                "intact, --resume goes on from it, with any number of processes"
            ) from error
        raise
    # What trained is garbage with cycles, and holds the group, whose threads would outlive Python.
    gc.collect()
    # Not after an error: it would wait for the others.
    dist.destroy_process_group()


def _meet(backend: str, timeout: float) -> None:
    """Find the other processes of this start.

    When ``torchrun`` starts them again, its store still has the addresses of dead ones. On one
    machine all know which start it is, so each has keys of its own; on several they need not, and
    torchrun has to be told (docs/distributed.md).
    """
    limit = timedelta(seconds=timeout)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, timeout=limit, world_size=world_size, rank=rank, store=store)


def _is_of_communication(error: RuntimeError) -> bool:
    words = (
        *("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out"),
        "Application timeout",  # torch 2.9
    )
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def device_for(config: Common) -> torch.device:
    """Where this process trains; of several processes on a machine each has a GPU of its own.

    Raises:
        ValueError: there are not as many GPUs, or several processes are to share one.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected cpu, cuda, … or auto, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.device_count():
        raise ValueError(f"device: {name!r}, but torch finds no GPU here that it can use")
    if "LOCAL_RANK" not in os.environ or device.type != "cuda":
        return device
    if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise ValueError(f"device: expected 'cuda', a GPU for each process, got {name!r}")
    index, there_are = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device.index is None and index >= there_are:
        raise ValueError(
            f"device: there are {there_are} GPUs for {index + 1} or more processes; expected at "
            "most as many processes, or --device cpu"
        )
    return torch.device("cuda", index if device.index is None else device.index)


def parallel(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], all_used: bool = False
) -> Callable[..., Any]:
    """(step, *arguments) -> ``step(*arguments)``; gradients of its tensors become the mean of all.

    A step is the whole computation of a batch's loss, however many forwards it has, as the forward
    of one module: ``DistributedDataParallel`` wants that. Parameters that no process has used, of
    blocks that all have dropped, keep no gradient, as in one process.

    Args:
        model: starts as that of the first process; for its statistics see ``average_statistics``.
        optimizers: of what is trained, some of which need not be in the model.
        all_used: each step uses all parameters, so that none has to be looked for.
    """
    if not dist.is_initialized():
        return lambda step, *arguments: step(*arguments)
    return DistributedDataParallel(
        _Step(model, optimizers), find_unused_parameters=not all_used, broadcast_buffers=False
    )


class _Step(nn.Module):
    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]):
        super().__init__()
        self.model = model
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.trained = nn.ParameterList(weight for group in groups for weight in group["params"])

    def forward(self, step: Callable[..., Any], *arguments: Any) -> Any:
        return step(*arguments)


def synchronize_batch_norm(config: Common, model: nn.Module, skips_blocks: bool) -> None:
    """Let training statistics cover the whole batch (``--sync-bn``).

    Args:
        model: changed in place; its parameters stay the same.
        skips_blocks: training passes run active images only, so that a process may skip batch
            norms for which the others would wait.

    Raises:
        ValueError: torch cannot do that here.
    """
    if skips_blocks:
        raise ValueError(
            "sync_bn: this training skips blocks that no image of a process keeps, while the "
            "others would wait there for its statistics; expected without"
        )
    if device_for(config).type != "cuda":
        raise ValueError("sync_bn: torch's SyncBatchNorm is for GPUs, this run is on a CPU")
    if count() > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def average_statistics(model: nn.Module) -> None:
    """Let the running statistics of batch norms in train mode be the means of all processes'.

    So they are about all images of the batches, where ``DistributedDataParallel`` would take those
    of the first process alone.
    """
    if count() == 1:
        return
    layers = [one for one in model.modules() if isinstance(one, _BatchNorm) and one.training]
    statistics = [each for one in layers for each in (one.running_mean, one.running_var)]
    if statistics:
        means = mean(torch.cat(statistics)).split([len(each) for each in statistics])
        for each, value in zip(statistics, means, strict=True):
            each.copy_(value)


def summed(loss: Tensor) -> Tensor:
    """A loss that sums over images, such that the mean of the processes' gradients is the sum's.

    One that is a mean over images needs nothing: all processes have equally many.
    """
    return loss * count()


def mean(value: Tensor) -> Tensor:
    """The mean of all processes' values, without gradient."""
    if count() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / count()


def gathered(value: Any) -> list[Any]:
    """What each process has, anything that can be pickled."""
    if count() == 1:
        return [value]
    values = [None] * count()
    dist.all_gather_object(values, value)
    return values


def wait() -> None:
    """Until all processes are here, and what the first one has written can be read."""
    if count() > 1:
        dist.barrier()


def whole(images: int) -> int:
    """The images of a training batch of which each process has so many."""
    return images * count()


def own(values: Tensor, dim: int = 0) -> Tensor:
    """This process's part of something that all processes have for each image of a batch."""
    if count() == 1:
        return values
    return values.movedim(dim, 0)[rank() :: count()].movedim(0, dim).clone()


def spread(values: Tensor, dim: int = 0) -> Tensor:
    """A training batch's values in their places among zeros for the other processes' images.

    Whatever is drawn from them, the first to the last, is the same for the own images as if all
    values were there: see ``own``.
    """
    if count() == 1:
        return values
    shape = [*values.shape]
    shape[dim] = whole(shape[dim])
    result = values.new_zeros(shape)
    result.movedim(dim, 0)[rank() :: count()] = values.movedim(dim, 0)
    return result


def share(run: Callable[..., Any], images: Tensor, *others: Tensor, dim: int = 0) -> Any:
    """``run(images, *others)``, without gradients, each process on its own images.

    Args:
        run: returns a tensor, or a named tuple of some, with a row for each image.
        images: (B, …), the same in all processes.
        others: (…, B, …), images in dimension ``dim``, as in what is returned.
    """
    if count() == 1 or len(images) < count():
        return run(images, *others)
    found = run(own(images), *(own(other, dim) for other in others))
    if isinstance(found, Tensor):
        return joined(found, len(images), dim)
    return type(found)(*(joined(each, len(images), dim) for each in found))


def joined(part: Tensor, images: int, dim: int = 0) -> Tensor:
    """All processes' parts, as of ``own``, of so many images in order; none of them empty."""
    rows = part.movedim(dim, 0).contiguous()
    if len(rows) * count() < images:  # gathers need as many rows of each process
        rows = torch.cat([rows, rows[:1]])
    parts = [torch.empty_like(rows) for _ in range(count())]
    dist.all_gather(parts, rows)
    return torch.stack(parts, 1).flatten(0, 1)[:images].movedim(0, dim)


def shared(engine: bdf.Engine) -> bdf.Engine:
    """An engine whose calls, the same in all processes, are divided among them."""
    return engine if count() == 1 else _SharedEngine(engine)


class _SharedEngine:
    def __init__(self, engine: bdf.Engine):
        self._engine = engine

    @property
    def __class__(self) -> type:  # to isinstance it is what it stands for
        return type(self._engine)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, images: Tensor, budget: float | None = None) -> Any:
        return share(lambda own_images: self._engine(own_images, budget), images)

    def run(self, images: Tensor, decisions: Tensor, *weights: Tensor) -> Tensor:
        return share(self._engine.run, images, decisions, *weights)

    def run_sets(self, images: Tensor, decisions: Tensor) -> Tensor:
        return share(self._engine.run_sets, images, decisions, dim=1)
