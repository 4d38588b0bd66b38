"""A cascade's engine: one of each network, and rules that say which images the next one gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from blockdrop_fast.executors.exactly import exactly
from blockdrop_fast.networks.cascade import Cascade, Member, backbone_of
from blockdrop_fast.networks.exits import leaves_by
from blockdrop_fast.networks.gated import Output
from blockdrop_fast.networks.resnet import ResNet, ResNetConfig


class CascadeEngine:
    """A snapshot of a cascade; each network runs on the images that reach it. Made by ``compile``.

    Args:
        model: of the networks.
        make: network -> its engine.

    Attributes:
        model: what the engine was compiled from, and takes over at ``refresh``.
        engines: of the N networks.
        dtype, device: of weights and images.

    Raises:
        ValueError: networks on several devices.
    """

    def __init__(self, model: Cascade, make: Callable[[Member], Any]):
        self.model = model
        self.engines: Sequence[Any] = [make(network) for network in model.networks]
        self._take_over()

    def refresh(self) -> None:
        """Take over the networks' present weights and devices, and the rules."""
        for engine in self.engines:
            engine.refresh()
        self._take_over()

    def _take_over(self) -> None:
        devices = list(dict.fromkeys(engine.device for engine in self.engines))
        if len(devices) > 1:
            raise ValueError(
                f"model: expected on one device, got weights on {devices[0]} and {devices[1]}"
            )
        (self.device,), self.dtype = devices, self.engines[0].dtype
        self._rules = self.model.rules.to(self.device, torch.float32, copy=True)

    @property
    def strategy(self) -> str:
        """Of the engines; where they differ, one after the other."""
        return ", ".join(dict.fromkeys(engine.strategy for engine in self.engines))

    @property
    def strategy_reason(self) -> str:
        """As ``strategy``."""
        return "; ".join(dict.fromkeys(engine.strategy_reason for engine in self.engines))

    @property
    def backbone(self) -> ResNet:
        """The last network, whose classes and normalisation are those of all."""
        return backbone_of(self.model.networks[-1])

    @property
    def config(self) -> ResNetConfig:
        """Of the last network."""
        return self.engines[-1].config

    @exactly
    def __call__(self, images: Tensor, budget: float | None = None) -> Output:
        """Run each image through as many networks as it needs.

        Args:
            images: (B, 3, H, W) normalised, of the engine's dtype and device; B may be 0.
            budget: None; a cascade has none.

        Returns:
            ``Output(logits (B, num_classes), decisions (B, N) bool)``, which networks ran.

        Raises:
            TypeError, ValueError: see ``blockdrop_fast.decisions.check_images``; a budget.
        """
        if budget is not None:
            raise ValueError(f"budget: expected none, a cascade's rules say all, got {budget}")
        first, *others = self.engines
        logits = first(images).logits
        decisions = torch.zeros(
            len(images), len(self.engines), dtype=torch.bool, device=self.device
        )
        decisions[:, 0] = True
        reached, found = torch.arange(len(images), device=self.device), logits
        for n, (engine, rule) in enumerate(zip(others, self._rules, strict=True), 1):
            precise = found.to(torch.promote_types(found.dtype, torch.float32))
            reached = reached[~leaves_by(precise, rule)]  # waits for a GPU, as shapes depend on it
            if len(reached) == 0:
                break
            decisions[reached, n] = True
            found = engine(images[reached]).logits
            logits = logits.index_copy(0, reached, found.to(logits.dtype))
        return Output(logits, decisions)

    def decide(self, images: Tensor, budget: float | None = None) -> Tensor:
        """(B, 3, H, W) images -> (B, N) bool, which networks an image runs: a call's."""
        return self(images, budget).decisions
