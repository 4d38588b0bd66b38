"""The BlockDrop model: a backbone and the policy that decides on its blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from blockdrop_fast.networks.fixed import FixedPolicy
from blockdrop_fast.networks.gated import GatedPolicy, Output
from blockdrop_fast.networks.look import LookPolicy
from blockdrop_fast.networks.policy import PolicyNetwork, decisions_of
from blockdrop_fast.networks.resnet import ResNet

AnyPolicy = PolicyNetwork | LookPolicy | FixedPolicy | GatedPolicy


class BlockDrop(nn.Module):
    """Backbone and policy together (BlockDrop figure 2); ``compile`` makes it fast.

    Args:
        backbone: whose blocks are kept or dropped.
        policy: a network of its own, which looks at the image, or a head that looks at what the
            backbone's first blocks see; one that does not look at all; or gates on the way
            (``SequentialPolicy``, ``HaltingPolicy``, ``Exits``).

    Raises:
        TypeError: something else than a backbone and a policy.
        ValueError: the policy is one for another backbone.
    """

    def __init__(self, backbone: ResNet, policy: AnyPolicy):
        super().__init__()
        if not isinstance(backbone, ResNet):
            raise TypeError(f"backbone: expected a ResNet, got {type(backbone).__name__}")
        if not isinstance(policy, AnyPolicy):
            raise TypeError(f"policy: expected one of this package, got {type(policy).__name__}")
        if policy.num_blocks != backbone.num_blocks:
            raise ValueError(
                f"policy: decides on {policy.num_blocks} blocks, "
                f"but the backbone has {backbone.num_blocks}"
            )
        if isinstance(policy, LookPolicy):
            first, channels = backbone.config.layers[0], backbone.config.channels[0]
            if policy.channels != channels or policy.after > first:
                raise ValueError(
                    f"policy: looks at {policy.channels} channels after block {policy.after}, but "
                    f"the backbone's first segment has {channels} channels and {first} blocks"
                )
        if isinstance(policy, GatedPolicy):
            policy.check_backbone(backbone.config)
        self.backbone = backbone
        self.policy = policy

    def forward(self, images: Tensor, budget: float | None = None) -> Output:
        """(B, 3, H, W) normalised images -> logits at the policy's decisions.

        Args:
            budget: mean kept blocks, of a policy with a menu; see ``PolicyNetwork.decide``.

        Returns:
            ``Output``; of a ``HaltingPolicy`` that is not hard, ``WeightedOutput``.
        """
        if isinstance(self.policy, GatedPolicy):
            if budget is not None:
                raise ValueError(f"budget: expected none, gates decide at one usage, got {budget}")
            return self.policy.run(self.backbone, images)
        logits, decisions, _ = self.forward_with(
            images, lambda logits: self._decisions_of(logits, budget), active_only=False
        )
        return Output(logits, decisions)

    def forward_with(
        self,
        images: Tensor,
        choose: Callable[[Tensor], Tensor],
        active_only: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One differentiable forward at decisions that are chosen from the policy's logits.

        Gates have a ``run_with`` of their own.

        Args:
            images: (B, 3, H, W) normalised.
            choose: the policy's logits, (B, K), or (B, M) of its menu's sets -> (B, K) bool
                decisions. Blocks after which a ``LookPolicy`` looks have to be kept.
            active_only: see ``ResNet.forward``.

        Returns:
            (B, num_classes) logits, the decisions, the policy's logits. Gradients of the last of
            these reach the blocks before a ``LookPolicy``, too.
        """
        if isinstance(self.policy, LookPolicy):
            after = self.policy.after
            features = self.backbone.features(images, after)
            policy_logits = self.policy.logits_from(features)
            decisions = choose(policy_logits)
            logits = self.backbone.forward_from(features, after, decisions, active_only=active_only)
        else:
            policy_logits = self.policy.logits(images)
            decisions = choose(policy_logits)
            logits = self.backbone(images, decisions, active_only=active_only)
        return logits, decisions, policy_logits

    def policy_logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images -> (B, K), or (B, M) with a menu: the policy's logits."""
        if isinstance(self.policy, GatedPolicy):
            raise TypeError("policy: gates on the way have no logits before the backbone has run")
        if isinstance(self.policy, LookPolicy):
            return self.policy.logits_from(self.backbone.features(images, self.policy.after))
        return self.policy.logits(images)

    def decide(self, images: Tensor, budget: float | None = None) -> Tensor:
        """(B, 3, H, W) normalised images -> (B, K) bool decisions; ``budget`` as of ``forward``."""
        if isinstance(self.policy, GatedPolicy):
            return self(images, budget).decisions
        return self._decisions_of(self.policy_logits(images), budget)

    def _decisions_of(self, logits: Tensor, budget: float | None) -> Tensor:
        return decisions_of(logits, self.policy.menu, budget, self.policy.after)
