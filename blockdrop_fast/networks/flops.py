"""FLOPs of an image in the paper's convention, counted from the architecture.

2 x multiply-accumulates of convolutions and linear layers. Shortcuts count, also those of
dropped blocks, which run all the same; so does the policy. Batch norm, ReLU, pooling, softmax and
the parameter-free shortcuts do not. Check values are BlockDrop table 1 and section 4.

Gates count where they are evaluated: all of a sequential policy, halting's where their block ran,
exits that were reached. What lies behind the exit where an image left does not count.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blockdrop_fast.decisions import check_decisions
from blockdrop_fast.networks.blockdrop import BlockDrop
from blockdrop_fast.networks.cascade import Cascade
from blockdrop_fast.networks.exits import Exits
from blockdrop_fast.networks.fixed import FixedPolicy
from blockdrop_fast.networks.gated import PixelGates
from blockdrop_fast.networks.halting import HaltingPolicy
from blockdrop_fast.networks.look import LookPolicy, pooled_size
from blockdrop_fast.networks.resnet import ProjectionShortcut, ResNet
from blockdrop_fast.networks.sequential import SequentialPolicy

ImageSize = int | tuple[int, int]
DEFAULT_IMAGE_SIZE = {"cifar": 32, "imagenet": 224}


def flops(
    model: BlockDrop | ResNet | Cascade,
    decisions: Tensor | None = None,
    *,
    image_size: ImageSize | None = None,
) -> Tensor:
    """FLOPs of each image at the given decisions.

    Args:
        model: a BlockDrop model, a bare backbone (no policy FLOPs then), or a cascade.
        decisions: (B, K), bool or 0/1, on any device; of a cascade (B, N), which networks ran.
            None: one image that keeps all blocks, or runs all networks.
        image_size: H = W or (H, W) of the images; default 32 for CIFAR, 224 for ImageNet stems.

    Returns:
        (B,) float64, or (1,) without decisions, on the decisions' device.

    Raises:
        TypeError, ValueError: another kind of model, an impossible image size, or as of
            ``check_decisions``.
    """
    if isinstance(model, Cascade):
        whole = [_whole(one, image_size) for one in model.networks]
        fixed, parts = 0.0, torch.tensor(whole, dtype=torch.float64)
    else:
        fixed, parts = _costs(model, image_size)
    if decisions is None:
        return (fixed + parts.sum()).reshape(1)
    batched = isinstance(decisions, Tensor) and decisions.ndim == 2
    keep = check_decisions(
        decisions,
        batch=decisions.shape[0] if batched else 1,
        num_blocks=len(parts),
        device=decisions.device if batched else torch.device("cpu"),
    )
    return fixed + keep.double() @ parts.to(keep.device)


def _whole(network: ResNet | BlockDrop, image_size: ImageSize | None) -> float:
    """Of a cascade's network, or one set of blocks."""
    keep = network.policy.keep[None] if isinstance(network, BlockDrop) else None
    return float(flops(network, keep, image_size=image_size))


def block_flops(model: BlockDrop | ResNet, image_size: ImageSize | None = None) -> Tensor:
    """(K,) float64: the FLOPs that an image saves by dropping each block, with what it leads to."""
    return _costs(model, image_size)[1]


def fixed_flops(model: BlockDrop | ResNet, image_size: ImageSize | None = None) -> float:
    """FLOPs of an image that drops all blocks: stem, shortcuts, classifier, policy."""
    return _costs(model, image_size)[0]


def _costs(model: BlockDrop | ResNet, image_size: ImageSize | None) -> tuple[float, Tensor]:
    """(FLOPs whatever the decisions are, (K,) those that go with each block that is kept)."""
    backbone = _backbone(model)
    stem, shortcuts, blocks, classifier = _count(backbone, image_size)
    fixed, per_block = stem, torch.tensor(blocks, dtype=torch.float64)
    policy = model.policy if isinstance(model, BlockDrop) else None
    if isinstance(policy, Exits):
        # An image keeps the blocks before its exit: what it reaches comes with the block before.
        per_block += torch.tensor(shortcuts)
        for block, head in zip(policy.exits, policy.heads, strict=True):
            per_block[block - 1] += 2 * head.weight.numel()
        per_block[-1] += classifier
        return float(fixed), per_block
    fixed += sum(shortcuts) + classifier
    if isinstance(policy, SequentialPolicy):
        fixed += sum(2 * gate.weight.numel() for gate in policy.gates)
    elif isinstance(policy, HaltingPolicy):
        heads = [
            0 if isinstance(one, nn.Identity) else one[1].weight.numel() for one in policy.heads
        ]
        per_block += 2 * torch.tensor(heads)
    elif isinstance(policy, PixelGates):
        raise TypeError(
            f"model: decisions do not say what {type(policy).__name__} computes; its output counts"
        )
    elif policy is not None:
        fixed += _policy_flops(model, image_size)
    return float(fixed), per_block


def _policy_flops(model: BlockDrop, image_size: ImageSize | None) -> int:
    policy, size = model.policy, _size(model.backbone, image_size)
    if isinstance(policy, FixedPolicy):
        return 0
    if isinstance(policy, LookPolicy):
        # The first segment has the size that the stem gives.
        size, cost = pooled_size(_stem(model.backbone, size)[1]), 0
        for conv in policy.convs:
            conv_flops, size = _conv(conv, size)
            cost += conv_flops
        return cost + 2 * policy.fc.weight.numel()
    height, width = size
    return int(
        flops(policy.network, image_size=(height // policy.input_pool, width // policy.input_pool))
    )


def _backbone(model: BlockDrop | ResNet) -> ResNet:
    if isinstance(model, BlockDrop):
        return model.backbone
    if isinstance(model, ResNet):
        return model
    raise TypeError(f"model: expected a BlockDrop, ResNet or Cascade, got {type(model).__name__}")


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


def _count(network: ResNet, image_size: ImageSize | None) -> tuple[int, list[int], list[int], int]:
    """FLOPs of the stem, of each block's shortcut, of each F_k, of the classifier."""
    stem, size = _stem(network, _size(network, image_size))
    shortcuts, per_block = [], []
    for block, shortcut in network.blocks():
        projects = isinstance(shortcut, ProjectionShortcut)
        shortcuts.append(_conv(shortcut.conv, size)[0] if projects else 0)
        cost = 0
        for conv in (module for module in block.children() if isinstance(module, nn.Conv2d)):
            conv_flops, size = _conv(conv, size)
            cost += conv_flops
        per_block.append(cost)
    return stem, shortcuts, per_block, 2 * network.fc.weight.numel()


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
