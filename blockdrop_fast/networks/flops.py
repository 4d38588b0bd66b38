"""FLOPs of an image in the paper's convention, counted from the architecture.

2 x multiply-accumulates of convolutions and linear layers. Shortcuts count, also those of
dropped blocks, which run all the same; so does the policy. Batch norm, ReLU, pooling and
the parameter-free shortcuts do not. Check values are BlockDrop table 1 and section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blockdrop_fast.decisions import check_decisions
from blockdrop_fast.networks.blockdrop import BlockDrop
from blockdrop_fast.networks.fixed import FixedPolicy
from blockdrop_fast.networks.look import LookPolicy, pooled_size
from blockdrop_fast.networks.resnet import ProjectionShortcut, ResNet

ImageSize = int | tuple[int, int]
DEFAULT_IMAGE_SIZE = {"cifar": 32, "imagenet": 224}


def flops(
    model: BlockDrop | ResNet,
    decisions: Tensor | None = None,
    *,
    image_size: ImageSize | None = None,
) -> Tensor:
    """FLOPs of each image at the given decisions.

    Args:
        model: a BlockDrop model, or a bare backbone (no policy FLOPs then).
        decisions: (B, K), bool or 0/1, on any device; None: one image that keeps all blocks.
        image_size: H = W or (H, W) of the images; default 32 for CIFAR, 224 for ImageNet stems.

    Returns:
        (B,) float64, or (1,) without decisions, on the decisions' device.

    Raises:
        TypeError, ValueError: another kind of model, an impossible image size, or as of
            ``check_decisions``.
    """
    backbone = _backbone(model)
    per_block = block_flops(backbone, image_size)
    fixed = fixed_flops(model, image_size)
    if decisions is None:
        return (fixed + per_block.sum()).reshape(1)
    batched = isinstance(decisions, Tensor) and decisions.ndim == 2
    keep = check_decisions(
        decisions,
        batch=decisions.shape[0] if batched else 1,
        num_blocks=backbone.num_blocks,
        device=decisions.device if batched else torch.device("cpu"),
    )
    return fixed + keep.double() @ per_block.to(keep.device)


def block_flops(backbone: ResNet, image_size: ImageSize | None = None) -> Tensor:
    """(K,) float64: the FLOPs that an image saves by dropping each block (those of F_k)."""
    return torch.tensor(_count(backbone, image_size)[1], dtype=torch.float64)


def fixed_flops(model: BlockDrop | ResNet, image_size: ImageSize | None = None) -> float:
    """FLOPs of an image that drops all blocks: stem, shortcuts, classifier, policy."""
    backbone = _backbone(model)
    fixed, _ = _count(backbone, image_size)
    if isinstance(model, BlockDrop):
        fixed += _policy_flops(model, image_size)
    return float(fixed)


def _policy_flops(model: BlockDrop, image_size: ImageSize | None) -> int:
    policy, size = model.policy, _size(model.backbone, image_size)
    if isinstance(policy, FixedPolicy):
        return 0
    if isinstance(policy, LookPolicy):
        # The first segment has the size that the stem gives.
        size, flops = pooled_size(_stem(model.backbone, size)[1]), 0
        for conv in policy.convs:
            conv_flops, size = _conv(conv, size)
            flops += conv_flops
        return flops + 2 * policy.fc.weight.numel()
    height, width = size
    fixed, per_block = _count(
        policy.network, (height // policy.input_pool, width // policy.input_pool)
    )
    return fixed + sum(per_block)


def _backbone(model: BlockDrop | ResNet) -> ResNet:
    if isinstance(model, BlockDrop):
        return model.backbone
    if isinstance(model, ResNet):
        return model
    raise TypeError(f"model: expected a BlockDrop or ResNet, got {type(model).__name__}")


def _size(network: ResNet, image_size: ImageSize | None) -> tuple[int, int]:
    if image_size is None:
        image_size = DEFAULT_IMAGE_SIZE[network.config.stem]
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    multiple = network.config.size_multiple
    if height < 1 or width < 1 or height % multiple or width % multiple:
        raise ValueError(
            f"image_size: height and width must be positive multiples of {multiple}, "
            f"got {height}x{width}"
        )
    return height, width


def _count(network: ResNet, image_size: ImageSize | None) -> tuple[int, list[int]]:
    """(FLOPs outside of the F_k, FLOPs of each F_k)."""
    fixed, size = _stem(network, _size(network, image_size))
    per_block = []
    for block, shortcut in network.blocks():
        if isinstance(shortcut, ProjectionShortcut):
            fixed += _conv(shortcut.conv, size)[0]
        cost = 0
        for conv in (module for module in block.children() if isinstance(module, nn.Conv2d)):
            conv_flops, size = _conv(conv, size)
            cost += conv_flops
        per_block.append(cost)
    return fixed + 2 * network.fc.in_features * network.fc.out_features, per_block


def _stem(network: ResNet, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """(FLOPs, height and width of the output)."""
    flops, size = _conv(network.conv1, size)
    if network.config.stem == "imagenet":
        size = (_pixels(size[0], 3, 2, 1), _pixels(size[1], 3, 2, 1))
    return flops, size


def _conv(conv: nn.Conv2d, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """(FLOPs, height and width of the output)."""
    height, width = (
        _pixels(pixels, kernel, stride, padding)
        for pixels, kernel, stride, padding in zip(
            size, conv.kernel_size, conv.stride, conv.padding, strict=True
        )
    )
    return 2 * conv.weight.numel() * height * width, (height, width)


def _pixels(pixels: int, kernel: int, stride: int, padding: int) -> int:
    return (pixels + 2 * padding - kernel) // stride + 1
