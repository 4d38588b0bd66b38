"""Statistics of batch norm, counted anew over training images."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import update_bn

from blockdrop_fast.data.image_sets import ImageFolder, ImageSet
from train.config import Policy
from train.images import EVALUATION_BATCH, plain_batches


def count_statistics(
    model: nn.Module, network: nn.Module, image_set: ImageSet | ImageFolder, config: Policy
) -> None:
    """Replace a network's running statistics by those of training images at its present weights.

    Running ones cover the last ten steps or so, in which weights may have become others. They are
    for evaluations and files: what trains is normalised by its batch, so training goes on as it
    would, and a network in eval mode, which does not train, keeps what it has. All processes count
    the same images.

    Args:
        model: that the run trains.
        network: of it; images (B, 3, H, W) are all that its forward takes.
        image_set: that the run trains on; ``statistics_images`` of them are counted, as they are,
            in batches of one size, so that all weigh the same.
    """
    images = min(config.statistics_images, len(image_set))
    if images < 1 or not network.training:
        return
    batches = -(-images // EVALUATION_BATCH)
    size = images // batches
    some = image_set.subset(batches * size, config.seed)
    update_bn(plain_batches(model, some, size, config.workers), network)
