"""What logits are right: the float64 reference, and a tolerance derived from eager PyTorch's error.

With y64 the float64 reference and y_pt eager PyTorch with unfolded batch norm at the precision in
question: max|y - y64| <= 2 max|y_pt - y64| + 4 eps max|y64|.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockdrop_fast.networks.blockdrop import BlockDrop
from blockdrop_fast.networks.cascade import Cascade
from blockdrop_fast.networks.gated import GatedPolicy, Output
from blockdrop_fast.networks.policy import PolicyNetwork
from blockdrop_fast.networks.resnet import ResNet

# Images of one float64 pass: all layers of ResNet-101 take some gigabytes at this many.
REFERENCE_CHUNK = 64
# So many images at least, and the error of eager PyTorch on them means something.
CHECKED_IMAGES = 64


class WrongLogitsError(AssertionError):
    """A contender's logits are outside of the tolerance, so it is not timed."""


@dataclass(frozen=True)
class Reference:
    """The logits that a contender must give.

    Attributes:
        logits: (N, C) float64.
        tolerance: the largest absolute error allowed: twice that of eager PyTorch with unfolded
            batch norm at the contenders' precision, and four roundings of the largest logit.
    """

    logits: Tensor
    tolerance: float

    def check(self, name: str, logits: Tensor) -> None:
        """Raise unless ``logits`` (N, C) are right.

        Raises:
            WrongLogitsError: naming the contender, its error and the tolerance.
        """
        if logits.shape != self.logits.shape:
            raise WrongLogitsError(
                f"{name}: expected logits of shape {tuple(self.logits.shape)}, "
                f"got {tuple(logits.shape)}"
            )
        error = float((logits.double() - self.logits).abs().max())
        if not error <= self.tolerance:  # NaN is wrong, too
            raise WrongLogitsError(
                f"{name}: logits are off by {error:.3g}, the tolerance is {self.tolerance:.3g}; "
                "not timed"
            )

    def check_decisions(self, name: str, decisions: Tensor) -> None:
        """Raise unless ``decisions`` (N, K) are those of policy logits that are right.

        These are the policy network's reference logits: where one is closer to zero than the
        tolerance, either decision is right.

        Raises:
            WrongLogitsError: naming the contender and how many decisions are wrong.
        """
        if decisions.shape != self.logits.shape:
            raise WrongLogitsError(
                f"{name}: expected decisions of shape {tuple(self.logits.shape)}, "
                f"got {tuple(decisions.shape)}"
            )
        wrong = (decisions != (self.logits >= 0)) & (self.logits.abs() > self.tolerance)
        if wrong.any():
            raise WrongLogitsError(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} decisions are not the policy "
                "network's; not timed"
            )


def make_reference(
    backbone: ResNet, images: Tensor, decisions: Tensor | None, dtype: torch.dtype
) -> Reference:
    """The reference for images at given decisions (None: all blocks kept).

    Args:
        backbone: in eval mode; its forward defines what is right.
        images: (N, 3, H, W) of ``dtype``; the tolerance means something from 64 images on.
        decisions: (N, K) bool, or None.
        dtype: the contenders' precision.
    """
    given = () if decisions is None else (decisions,)
    return _reference(backbone, lambda one, *inputs: one(*inputs), images, given, dtype)


def make_policy_reference(policy: PolicyNetwork, images: Tensor, dtype: torch.dtype) -> Reference:
    """The reference of a policy network's logits (N, K), for ``Reference.check_decisions``.

    Args: as of ``make_reference``.
    """
    return _reference(policy, lambda one, inputs: one.logits(inputs), images, (), dtype)


def make_output_reference(
    model: BlockDrop | Cascade, images: Tensor, output: Output, dtype: torch.dtype
) -> Reference:
    """The reference for images at what a model decided for them, however it did.

    Args:
        model: in eval mode.
        images, dtype: as of ``make_reference``.
        output: of the images, from any execution; its logits are not read.
    """
    if isinstance(model, BlockDrop) and not isinstance(model.policy, GatedPolicy):
        return make_reference(model.backbone, images, output.decisions, dtype)

    def run(one: BlockDrop | Cascade, inputs: Tensor, *decided: Tensor) -> Tensor:
        own = type(output)(None, *decided)
        if isinstance(one, Cascade):
            return one.replay(inputs, own)
        return one.policy.replay(one.backbone, inputs, own)

    return _reference(model, run, images, output[1:], dtype)


@torch.no_grad()
def _reference(
    module: nn.Module,
    run: Callable[..., Tensor],
    images: Tensor,
    decided: tuple[Tensor, ...],
    dtype: torch.dtype,
) -> Reference:
    # float64 convolutions take half the time in channels-last.
    layout = torch.channels_last
    double = copy.deepcopy(module).to(dtype=torch.float64, memory_format=layout)
    rounded = copy.deepcopy(module).to(dtype)
    exact, eager = [], []
    for start in range(0, len(images), REFERENCE_CHUNK):
        rows = slice(start, start + REFERENCE_CHUNK)
        given = [one[rows] for one in decided]
        inputs = images[rows].to(dtype=torch.float64, memory_format=layout)
        exact.append(run(double, inputs, *given))
        eager.append(run(rounded, images[rows], *given))
    logits = torch.cat(exact)
    error = float((torch.cat(eager).double() - logits).abs().max())
    return Reference(logits, 2 * error + 4 * torch.finfo(dtype).eps * float(logits.abs().max()))
