"""Network selection: a cascade of whole networks, of which an image runs as many as it needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from blockdrop_fast.decisions import check_decisions
from blockdrop_fast.networks.blockdrop import BlockDrop
from blockdrop_fast.networks.exits import NEVER, check_rules, leaves_by, threshold_rules
from blockdrop_fast.networks.fixed import FixedPolicy
from blockdrop_fast.networks.gated import Output
from blockdrop_fast.networks.resnet import ResNet

Member = ResNet | BlockDrop


class Cascade(nn.Module):
    """Networks from small to large; an image that one of them is sure of does not reach the next.

    Bolukbasi et al., "Adaptive Neural Networks for Efficient Inference", network selection. Costs
    add up: an image that reaches the last network has run all of them.

    Args:
        networks: two or more, of the same classes and the same normalisation of images: ResNets,
            or BlockDrop models of a ``FixedPolicy``, which run one set of blocks for all images.

    Attributes:
        networks: as above, N of them.
        rules: (N - 1, 6), a buffer: who stays at each network but the last; as of ``Exits``. New
            cascades send every image on to the end.

    Raises:
        ValueError: no such networks.
    """

    def __init__(self, networks: Sequence[Member]):
        super().__init__()
        if len(networks) < 2:
            raise ValueError(f"networks: expected two or more, got {len(networks)}")
        for one in networks:
            fixed = isinstance(one, BlockDrop) and isinstance(one.policy, FixedPolicy)
            if not isinstance(one, ResNet) and not fixed:
                what = type(getattr(one, "policy", one)).__name__
                raise ValueError(
                    f"networks: expected ResNets, or BlockDrop models of a FixedPolicy, got {what}"
                )
        backbones = [backbone_of(one) for one in networks]
        classes = [backbone.config.num_classes for backbone in backbones]
        if len(set(classes)) > 1:
            raise ValueError(f"networks: expected of the same classes, got {classes} of them")
        if any(one.normalization != backbones[0].normalization for one in backbones):
            raise ValueError("networks: expected the same normalisation of images for all")
        self.networks = nn.ModuleList(networks)
        self.register_buffer("rules", torch.tensor([NEVER] * (len(networks) - 1)))

    def set_rules(self, rules: Tensor) -> None:
        """Take rules (N - 1, 6) over.

        Raises:
            ValueError: of another shape, or not finite.
        """
        check_rules(rules, len(self.networks) - 1)
        self.rules.copy_(rules)

    def set_thresholds(self, thresholds: Sequence[float]) -> None:
        """Let an image stay where its largest probability is at least the network's threshold.

        Raises:
            ValueError: not one for each network but the last, or outside of 0…1.
        """
        self.set_rules(threshold_rules(thresholds, len(self.rules)))

    def forward(self, images: Tensor) -> Output:
        """(B, 3, H, W) images -> logits, and as decisions (B, N) bool: which networks ran."""
        logits = _logits(self.networks[0](images))
        decisions = torch.zeros(len(images), len(self.networks), dtype=torch.bool)
        decisions = decisions.to(images.device)
        decisions[:, 0] = True
        index = torch.arange(len(images), device=images.device)
        for n, (network, rule) in enumerate(zip(self.networks[1:], self.rules, strict=True), 1):
            index = index[~leaves_by(logits[index], rule)]
            decisions[index, n] = True
            logits = logits.index_copy(0, index, _logits(network(images[index])))
        return Output(logits, decisions)

    def replay(self, images: Tensor, output: Output) -> Tensor:
        """(B, 3, H, W) images -> (B, num_classes) of the last network of each image's decisions."""
        logits = torch.stack([_logits(network(images)) for network in self.networks])
        decisions = check_decisions(
            output.decisions,
            batch=len(images),
            num_blocks=len(self.networks),
            device=images.device,
        )
        return logits[decisions.sum(1) - 1, torch.arange(len(images))]


def backbone_of(network: Member) -> ResNet:
    """The ResNet of one of a cascade's networks."""
    return network.backbone if isinstance(network, BlockDrop) else network


def blocks_of(network: Member) -> int:
    """How many blocks one of a cascade's networks runs."""
    if isinstance(network, BlockDrop):
        return int(network.policy.keep.sum())
    return network.num_blocks


def _logits(found: Tensor | Output) -> Tensor:
    return found.logits if isinstance(found, Output) else found
