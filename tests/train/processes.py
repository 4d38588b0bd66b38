"""Several processes on one machine, as ``torchrun`` would start them, and stages run in them."""

import os
import socket
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import register_optimizer_step_pre_hook

import blockdrop_fast as bdf
from blockdrop_fast.data.batches import Batches
from tests.train import sync_batch_norm
from train import distributed, images
from train.loop import Run


def environment(rank, count, port):
    """What ``torchrun`` sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(count, function, *arguments):
    """Call the function, of a module, in so many new processes."""
    torch.multiprocessing.spawn(_enter, (count, free_port(), function, arguments), nprocs=count)


def _enter(rank, count, port, function, arguments):
    os.environ.pop("BLOCKDROP_DATA", None)
    os.environ |= environment(rank, count, port)
    torch.set_num_threads(1)
    function(*arguments)
    # Without the interpreter's end: one in 200 is aborted there by a thread of torch's, all done.
    sys.stdout.flush()
    os._exit(0)


def run_stages(runs, **options):
    """``run_stage`` of each (stage, config) in a row, in one group of processes."""
    with distributed.processes(runs[0][1]):
        for stage, config in runs:
            run_stage(stage, config, **options)


@contextmanager
def in_float64():
    """Backbones that a stage loads, what it makes, and images are float64."""
    load_backbone, batches_of = bdf.load_backbone, images.batches_of

    def float64_batches(*arguments, **options):
        batches = batches_of(*arguments, **options)
        return Batches(((some.double(), labels) for some, labels in batches), len(batches))

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with (
        patch.object(bdf, "load_backbone", lambda path: load_backbone(path).double()),
        patch.object(images, "batches_of", float64_batches),
    ):
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def run_stage(stage, config, frozen=True, epochs=None, float64=False):
    """Run a stage; the first process leaves the gradients of its first step in ``gradients.pt``.

    Args:
        config: ``--sync-bn`` has kernels for this CPU then.
        frozen: batch norm has running statistics, which stay as they are.
        epochs: of them, do at most so many.
        float64: see ``in_float64``.
    """
    gradients = []

    def look(optimizer, *_):
        if not any(optimizer is seen for seen, _ in gradients):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            copies = [None if one.grad is None else one.grad.clone() for one in weights]
            gradients.append((optimizer, copies))

    def few_epochs(run):
        last = min(run.config.epochs, run.first_epoch + (epochs or run.config.epochs) - 1)
        return range(run.first_epoch, last + 1)

    def stay(module, mode=True):
        return nn.Module.train(module, False)

    hook = register_optimizer_step_pre_hook(look)
    with ExitStack() as patches:
        patches.callback(hook.remove)
        if float64:
            patches.enter_context(in_float64())
        if config.sync_bn:
            patches.enter_context(sync_batch_norm.on_cpu())
        patches.enter_context(patch.object(Run, "epochs", few_epochs))
        if frozen:
            patches.enter_context(patch.object(_BatchNorm, "train", stay))
            if hasattr(config, "statistics_images"):
                config = replace(config, statistics_images=0)
        stage(config)
    if distributed.is_first() and gradients:
        torch.save([copies for _, copies in gradients], config.out / "gradients.pt")
