"""Making a backbone bear dropping: each image of a batch trains on its own random blocks."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.measure.static_line import static_line


class Chain:
    """The nested sets to draw from: the static line of the backbone as it is, ever again.

    Its state belongs into checkpoints: between two looks the backbone changes.

    Args:
        batches: of training images, not augmented, to choose the sets on.
        every: epochs between looks.
        lowest: blocks of the smallest set.
        num_blocks: K.

    Attributes:
        sets: (K - lowest, K) bool on the CPU, of ``lowest`` to K - 1 blocks.

    Raises:
        ValueError: ``lowest`` or ``every`` is out of range.
    """

    def __init__(
        self, batches: Sequence[tuple[Tensor, Tensor]], every: int, lowest: int, num_blocks: int
    ):
        if not 0 <= lowest < num_blocks:
            raise ValueError(f"chain_lowest: expected 0 to {num_blocks - 1}, got {lowest}")
        if every < 1:
            raise ValueError(f"chain_every: expected at least 1, got {every}")
        self._batches, self._every, self._lowest = batches, every, lowest
        self.sets = torch.empty(0, num_blocks, dtype=torch.bool)

    def look(self, engine: bdf.Engine, epoch: int) -> None:
        """Choose the sets anew where that is due before this epoch (1-based)."""
        if (epoch - 1) % self._every:
            return
        started = time.monotonic()
        engine.refresh()
        line = static_line(engine, self._batches)
        self.sets = line.sets[self._lowest : -1]
        order = " ".join(str(block + 1) for block in line.order)
        print(f"blocks drop in the order {order} ({time.monotonic() - started:.0f} s)")

    def state_dict(self) -> dict[str, Tensor]:
        """What ``load_state_dict`` takes."""
        return {"sets": self.sets}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the sets of a checkpoint."""
        self.sets = state["sets"].cpu()


def random_subnetworks(
    batch: int,
    chain: Tensor,
    full_share: float,
    random_share: float,
    keep_lowest: float,
    generator: torch.Generator,
) -> Tensor:
    """Random decisions of three kinds, in this order: all blocks, random sets, sets of a chain.

    Args:
        batch: B.
        chain: (M, K) bool; an image draws one row, each as likely as the others.
        full_share: share of the images that keep all blocks.
        random_share: share whose blocks are each kept with the image's own probability, uniform
            in ``keep_lowest``…1.
        generator: on the device of the result.

    Returns:
        (B, K) bool.
    """
    device = generator.device
    full, drawn = round(full_share * batch), round((full_share + random_share) * batch)
    rates = keep_lowest + (1 - keep_lowest) * torch.rand(
        batch, 1, generator=generator, device=device
    )
    decisions = torch.rand(batch, chain.shape[1], generator=generator, device=device) < rates
    decisions[:full] = True
    rows = torch.randint(len(chain), (batch - drawn,), generator=generator, device=device)
    decisions[drawn:] = chain.to(device)[rows]
    return decisions
