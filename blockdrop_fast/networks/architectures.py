"""Named architectures: the ResNets that people publish weights and figures of."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from blockdrop_fast.networks.resnet import ResNet, ResNetConfig, ShortcutKind


def resnet_cifar(
    depth: int, num_classes: int = 10, shortcut: ShortcutKind = "average_pool"
) -> ResNet:
    """CIFAR ResNet of ``depth`` = 6n+2 layers (ResNet paper, section 4.2): 3n basic blocks.

    Raises:
        ValueError: depth is not of the form 6n+2 with n >= 1.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth: expected 6n+2 (8, 14, 20, 32, …, 110, …), got {depth}")
    n = (depth - 2) // 6
    return ResNet(ResNetConfig("basic", (n, n, n), (16, 32, 64), "cifar", shortcut, num_classes))


def resnet32(num_classes: int = 10, shortcut: ShortcutKind = "average_pool") -> ResNet:
    """CIFAR ResNet-32: 15 blocks."""
    return resnet_cifar(32, num_classes, shortcut)


def resnet110(num_classes: int = 10, shortcut: ShortcutKind = "average_pool") -> ResNet:
    """CIFAR ResNet-110: 54 blocks."""
    return resnet_cifar(110, num_classes, shortcut)


def resnet18(num_classes: int = 1000) -> ResNet:
    """ImageNet ResNet-18: 2+2+2+2 = 8 basic blocks."""
    return _basic_imagenet((2, 2, 2, 2), num_classes)


def resnet34(num_classes: int = 1000) -> ResNet:
    """ImageNet ResNet-34: 3+4+6+3 = 16 basic blocks."""
    return _basic_imagenet((3, 4, 6, 3), num_classes)


def _basic_imagenet(layers: tuple[int, ...], num_classes: int) -> ResNet:
    widths = (64, 128, 256, 512)
    return ResNet(ResNetConfig("basic", layers, widths, "imagenet", "projection", num_classes))


def resnet_imagenet(
    layers: tuple[int, ...],
    num_classes: int = 1000,
    *,
    groups: int = 1,
    width_per_group: int = 64,
) -> ResNet:
    """Bottleneck ResNet with the given blocks a segment.

    The paper's static baselines ResNet-72/75/84 are (3, 4, 14, 3), (3, 4, 15, 3), (3, 4, 18, 3).

    Args:
        layers: residual blocks of each segment.
        num_classes: outputs.
        groups: of the 3x3 convolutions.
        width_per_group: channels of a group in the first segment; each later segment has twice as
            many as the one before.

    Raises:
        ValueError: one of these is not positive.
    """
    widths = tuple(64 * 2**segment for segment in range(len(layers)))
    inner = (
        groups * width_per_group * 2**segment
        for segment, count in enumerate(layers)
        for _ in range(count)
    )
    kind = ("bottleneck", layers, widths, "imagenet", "projection", num_classes)
    return ResNet(ResNetConfig(*kind, block_widths=tuple(inner), groups=groups))


def resnet50(num_classes: int = 1000) -> ResNet:
    """ImageNet ResNet-50: 3+4+6+3 = 16 bottleneck blocks."""
    return resnet_imagenet((3, 4, 6, 3), num_classes)


def resnet101(num_classes: int = 1000) -> ResNet:
    """ImageNet ResNet-101: 3+4+23+3 = 33 bottleneck blocks."""
    return resnet_imagenet((3, 4, 23, 3), num_classes)


def resnet152(num_classes: int = 1000) -> ResNet:
    """ImageNet ResNet-152: 3+8+36+3 = 50 bottleneck blocks."""
    return resnet_imagenet((3, 8, 36, 3), num_classes)


def resnext50_32x4d(num_classes: int = 1000) -> ResNet:
    """ResNeXt-50 (arXiv:1611.05431): ResNet-50's blocks, 32 groups of 4 channels and more."""
    return resnet_imagenet((3, 4, 6, 3), num_classes, groups=32, width_per_group=4)


def resnext101_32x8d(num_classes: int = 1000) -> ResNet:
    """ResNeXt-101: ResNet-101's blocks, 32 groups of 8 channels and more."""
    return resnet_imagenet((3, 4, 23, 3), num_classes, groups=32, width_per_group=8)


def resnext101_64x4d(num_classes: int = 1000) -> ResNet:
    """ResNeXt-101: ResNet-101's blocks, 64 groups of 4 channels and more."""
    return resnet_imagenet((3, 4, 23, 3), num_classes, groups=64, width_per_group=4)


def wide_resnet50_2(num_classes: int = 1000) -> ResNet:
    """Wide ResNet-50-2 (arXiv:1605.07146): ResNet-50 with twice the channels inside blocks."""
    return resnet_imagenet((3, 4, 6, 3), num_classes, width_per_group=128)


def wide_resnet101_2(num_classes: int = 1000) -> ResNet:
    """Wide ResNet-101-2: ResNet-101 with twice the channels inside blocks."""
    return resnet_imagenet((3, 4, 23, 3), num_classes, width_per_group=128)


IMAGENET_ARCHITECTURES: dict[str, Callable[..., ResNet]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
    # Of the paper: what static networks reach with fewer blocks than ResNet-101.
    "resnet72": partial(resnet_imagenet, (3, 4, 14, 3)),
    "resnet75": partial(resnet_imagenet, (3, 4, 15, 3)),
    "resnet84": partial(resnet_imagenet, (3, 4, 18, 3)),
    "resnext50_32x4d": resnext50_32x4d,
    "resnext101_32x8d": resnext101_32x8d,
    "resnext101_64x4d": resnext101_64x4d,
    "wide_resnet50_2": wide_resnet50_2,
    "wide_resnet101_2": wide_resnet101_2,
}


def is_name(name: str) -> bool:
    """Whether ``by_name`` takes it, for some depth."""
    return name in IMAGENET_ARCHITECTURES or re.fullmatch(r"resnet\d+", name) is not None


def by_name(name: str) -> Callable[..., ResNet]:
    """The function that makes a named architecture, of any number of classes.

    Args:
        name: one of ``IMAGENET_ARCHITECTURES``, else "resnet<depth>" of a CIFAR ResNet.

    Raises:
        ValueError: there is no such architecture; or, from that function, no such depth.
    """
    if name in IMAGENET_ARCHITECTURES:
        return IMAGENET_ARCHITECTURES[name]
    if is_name(name):
        return partial(resnet_cifar, int(name.removeprefix("resnet")))
    raise ValueError(
        f"arch: expected {', '.join(IMAGENET_ARCHITECTURES)}, or resnet<depth> of a CIFAR ResNet, "
        f"got {name!r}"
    )
