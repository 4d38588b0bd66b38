"""Early exits: classifiers on the way, and rules by which an image leaves at one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockdrop_fast.decisions import check_decisions, check_values
from blockdrop_fast.networks.gated import GatedPolicy, Output, pooled
from blockdrop_fast.networks.resnet import ResNet, ResNetConfig

NUM_FEATURES = 5
NEVER = (0.0, 0.0, 0.0, 0.0, 0.0, -1.0)


class Exits(GatedPolicy):
    """Classifiers after chosen blocks; an image that one of them is sure of goes no further.

    A rule is linear in how sure a classifier is (``confidence_features``), so that a threshold on
    the largest probability (BranchyNet, MSDNet) is one, and so are the learned policies of
    Bolukbasi et al., "Adaptive Neural Networks for Efficient Inference".

    Args:
        backbone: architecture of the backbone.
        exits: the blocks behind which there are exits, 1-based, ascending, below K.

    Attributes:
        exits: as above, E of them.
        heads: a linear layer an exit, on the features averaged over pixels.
        rules: (E, 6), a buffer: weights of the five features, and a bias; an image leaves where
            the sum is 0 or more. New exits let nobody leave.

    Raises:
        ValueError: no such blocks.
    """

    def __init__(self, backbone: ResNetConfig, exits: Sequence[int]):
        super().__init__(backbone)
        self.exits = tuple(exits)
        in_order = list(self.exits) == sorted(set(self.exits))
        if not self.exits or not in_order or not set(self.exits) <= set(range(1, self.num_blocks)):
            raise ValueError(
                f"exits: expected ascending blocks out of 1 to {self.num_blocks - 1}, got {exits}"
            )
        channels = [backbone.block_channels[block - 1][1] for block in self.exits]
        self.heads = nn.ModuleList(nn.Linear(one, backbone.num_classes) for one in channels)
        self.register_buffer("rules", torch.tensor([NEVER] * len(self.exits)))

    def check_backbone(self, config: ResNetConfig) -> None:
        """As of ``GatedPolicy``; exits tell as many classes as the network."""
        super().check_backbone(config)
        if config.num_classes != self.backbone.num_classes:
            raise ValueError(
                f"policy: its exits tell {self.backbone.num_classes} classes, the backbone "
                f"{config.num_classes}"
            )

    def set_rules(self, rules: Tensor) -> None:
        """Take rules (E, 6) over.

        Raises:
            ValueError: of another shape, or not finite.
        """
        check_rules(rules, len(self.exits))
        self.rules.copy_(rules)

    def set_thresholds(self, thresholds: Sequence[float]) -> None:
        """Let an image leave where its largest probability is at least the exit's threshold.

        Raises:
            ValueError: not one for each exit, or outside of 0…1.
        """
        self.set_rules(threshold_rules(thresholds, len(self.exits)))

    def logits_of(self, backbone: ResNet, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (E + 1, B, num_classes): of all exits, the network's own last.

        Differentiable; every image runs all blocks.
        """
        x, found = backbone.stem(images), []
        for k, (block, shortcut) in enumerate(backbone.blocks(), start=1):
            x = F.relu(shortcut(x) + block(x))
            if k in self.exits:
                found.append(self.heads[len(found)](pooled(x)))
        return torch.stack([*found, backbone.classifier(x)])

    def run(self, backbone: ResNet, images: Tensor) -> Output:
        """(B, 3, H, W) images -> the logits where each left, and decisions: blocks up to there."""
        logits = self.logits_of(backbone, images)
        leaves = [leaves_by(*pair) for pair in zip(logits[:-1], self.rules, strict=True)]
        # The first exit that lets an image go; argmax finds the first of equal ones.
        left = torch.stack([*leaves, torch.ones_like(leaves[0])]).int().argmax(0)
        return Output(logits[left, torch.arange(len(left))], self.decisions_at(left))

    def replay(self, backbone: ResNet, images: Tensor, output: Output) -> Tensor:
        """As of ``GatedPolicy``.

        Raises:
            ValueError: see ``exits_of``.
        """
        logits = self.logits_of(backbone, images)
        decisions = check_decisions(
            output.decisions,
            batch=len(images),
            num_blocks=self.num_blocks,
            device=images.device,
        )
        return logits[self.exits_of(decisions), torch.arange(len(images))]

    def decisions_at(self, left: Tensor) -> Tensor:
        """(B,) exits, counted from 0, E for the network's end -> (B, K) bool decisions."""
        return decisions_at(left, (*self.exits, self.num_blocks))

    def exits_of(self, decisions: Tensor) -> Tensor:
        """(B, K) bool decisions -> (B,) int64, the exit that each image left at; see above.

        Raises:
            ValueError: decisions that keep something else than the blocks before an exit, or all.
        """
        return exits_of(decisions, (*self.exits, self.num_blocks))


def decisions_at(left: Tensor, ends: Sequence[int]) -> Tensor:
    """(B,) places in ``ends``, where images leave -> (B, K) bool; ``ends``: blocks, K the last."""
    last = torch.tensor(ends, device=left.device)[left]
    return torch.arange(ends[-1], device=left.device) < last[:, None]


def exits_of(decisions: Tensor, ends: Sequence[int]) -> Tensor:
    """The reverse of ``decisions_at``; see ``Exits.exits_of``."""
    left = (decisions.sum(1)[:, None] > torch.tensor(ends, device=decisions.device)).sum(1)
    if not torch.equal(decisions_at(left, ends), decisions):
        raise ValueError(
            f"decisions: expected the first {', '.join(map(str, ends[:-1]))} or all {ends[-1]} "
            "blocks of each image, after which there is an exit"
        )
    return left


def confidence_features(logits: Tensor) -> Tensor:
    """(B, num_classes) -> (B, 5): 3 largest probabilities, lead of the first, entropy in nats.

    Probabilities that there are no classes for are 0.
    """
    probabilities = logits.softmax(1)
    top = probabilities.topk(min(3, probabilities.shape[1]), 1).values
    top = F.pad(top, (0, 3 - top.shape[1]))
    entropy = torch.special.entr(probabilities).sum(1)
    return torch.cat([top, (top[:, 0] - top[:, 1])[:, None], entropy[:, None]], 1)


def leaves_by(logits: Tensor, rule: Tensor) -> Tensor:
    """(B, num_classes) logits of an exit, its (6,) rule -> (B,) bool, who leaves there."""
    rule = rule.to(logits)
    return confidence_features(logits) @ rule[:NUM_FEATURES] + rule[NUM_FEATURES] >= 0


def check_rules(rules: Tensor, count: int) -> None:
    """Raise TypeError or ValueError unless these are ``count`` rules."""
    check_values("rules", rules)
    if rules.is_complex():
        raise TypeError(f"rules: expected a floating-point dtype, got {rules.dtype}")
    if rules.shape != (count, NUM_FEATURES + 1) or not rules.isfinite().all():
        raise ValueError(
            f"rules: expected finite values of shape {(count, NUM_FEATURES + 1)}, got "
            f"{tuple(rules.shape)}"
        )


def threshold_rules(thresholds: Sequence[float], count: int) -> Tensor:
    """Thresholds on the largest probability -> (count, 6) rules.

    Raises:
        ValueError: not ``count`` of them, or one outside of 0…1.
    """
    if len(thresholds) != count or not all(0 <= one <= 1 for one in thresholds):
        raise ValueError(f"thresholds: expected {count} from 0 to 1, got {list(thresholds)}")
    return torch.tensor([(1.0, 0.0, 0.0, 0.0, 0.0, -one) for one in thresholds])
