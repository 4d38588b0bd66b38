"""SACT: every position of an image leaves each segment when it has run long enough.

    python -m train sact --preset quick --data DIR --model backbone.safetensors --tau 0.1

Figurnov et al. 2017, section 3.2, from a trained backbone: the stage ``halting`` for each position,
see ``SpatialHaltingPolicy``. The loss is the cross entropy and tau times the mean position's ponder
cost.
"""

from __future__ import annotations

from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.networks.gated import PixelOutput
from train.systems.config import Sact
from train.systems.pixels import load_model, train_pixels


def sact(config: Sact) -> None:
    """Train a backbone and its halting scores.

    Raises:
        ValueError: options or a checkpoint that do not fit.
    """
    if not config.tau >= 0:
        raise ValueError(f"tau: expected 0 or more, got {config.tau}")
    model = load_model(config, bdf.SpatialHaltingPolicy, epsilon=config.epsilon, bias=config.bias)

    def costed(images: Tensor, complete: float) -> tuple[PixelOutput, Tensor]:
        output, ponder = model.policy.run_with(model.backbone, images)
        return output, ponder.float().mean()

    train_pixels(config, model, config.tau, costed)
