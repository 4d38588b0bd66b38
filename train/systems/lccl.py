"""Low-cost collaborative layers: cheap masks say for which pixels a convolution is computed.

    python -m train lccl --preset quick --data DIR --model backbone.safetensors --sparsity 1

Dong et al. 2017, from a trained backbone, see ``LowCostMasks``. The authors' loss is the cross
entropy alone, and sparsity is what comes of it; here the share of the complete network's FLOPs has
a weight, so that it can be chosen (straight-through: as if masks were shares of pixels).
"""

from __future__ import annotations

from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.networks.gated import PixelOutput
from train.systems.config import Lccl
from train.systems.pixels import load_model, train_pixels


def lccl(config: Lccl) -> None:
    """Train a backbone and its masks.

    Raises:
        ValueError: options or a checkpoint that do not fit.
    """
    if not config.sparsity >= 0:
        raise ValueError(f"sparsity: expected 0 or more, got {config.sparsity}")
    model = load_model(config, bdf.LowCostMasks)

    def costed(images: Tensor, complete: float) -> tuple[PixelOutput, Tensor]:
        output = model.policy.run_with(model.backbone, images)
        return output, (output.flops / complete).mean().float()

    train_pixels(config, model, config.sparsity, costed)
