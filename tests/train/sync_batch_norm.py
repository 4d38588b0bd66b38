"""``--sync-bn`` on CPUs: kernels of torch's SyncBatchNorm, which has some for GPUs only."""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train import distributed


def _rows(images: Tensor) -> Tensor:
    """(N, C): what is normalised, a column a channel."""
    return images.movedim(1, -1).reshape(-1, images.shape[1])


def _by_channel(values: Tensor, images: Tensor) -> Tensor:
    return values.view(-1, *[1] * (images.dim() - 2))


def batch_norm_stats(images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation of a process's images."""
    rows = _rows(images)
    return rows.mean(0), (rows.var(0, correction=0) + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    images: Tensor,
    means: Tensor,
    invstds: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Those of all processes' images; (P, C) and (P,) are what each has."""
    share = (counts / counts.sum())[:, None]
    mean = (share * means).sum(0)
    variance = (share * (invstds**-2 - eps + (means - mean) ** 2)).sum(0)
    if running_mean is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * counts.sum() / (counts.sum() - 1), momentum)
    return mean, (variance + eps).rsqrt()


def batch_norm_elemt(
    images: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    """What the layer gives."""
    centred = images - _by_channel(mean, images)
    return centred * _by_channel(weight * invstd, images) + _by_channel(bias, images)


def batch_norm_backward_reduce(
    gradient: Tensor,
    images: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    *wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A process's sums, and its gradients of weight and bias."""
    rows = _rows(gradient)
    total, product = rows.sum(0), (rows * (_rows(images) - mean)).sum(0)
    return total, product, product * invstd, total.clone()


def batch_norm_backward_elemt(
    gradient: Tensor,
    images: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    total: Tensor,
    product: Tensor,
    counts: Tensor,
) -> Tensor:
    """The gradient of a process's images; the sums are those of all."""
    of_mean = _by_channel(total / counts.sum(), images)
    of_variance = _by_channel(invstd**2 * product / counts.sum(), images)
    rest = gradient - of_mean - (images - _by_channel(mean, images)) * of_variance
    return rest * _by_channel(invstd * weight, images)


@contextmanager
def on_cpu():
    """``--sync-bn`` serves CPUs."""
    synchronize, forward = distributed.synchronize_batch_norm, nn.SyncBatchNorm.forward

    def as_on_gpu(*arguments):
        with patch.object(distributed, "device_for", lambda _: torch.device("cuda")):
            synchronize(*arguments)

    def as_another_device(layer, images):
        with patch.object(torch._C, "_get_privateuse1_backend_name", lambda: "cpu"):
            return forward(layer, images)

    kernels = [
        batch_norm_stats,
        batch_norm_gather_stats_with_counts,
        batch_norm_elemt,
        batch_norm_backward_reduce,
        batch_norm_backward_elemt,
    ]
    library = torch.library.Library("aten", "IMPL", "CPU")
    for kernel in kernels:
        library.impl(kernel.__name__, kernel)
    with (
        patch.object(distributed, "synchronize_batch_norm", as_on_gpu),
        patch.object(nn.SyncBatchNorm, "forward", as_another_device),
        patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle"),
    ):
        yield
    library._destroy()
