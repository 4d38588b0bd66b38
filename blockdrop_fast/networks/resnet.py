"""ResNet backbones whose residual blocks can be kept or dropped per image: the reference.

``backbone(images, decisions)`` here *defines* what every faster execution has to compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, islice
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockdrop_fast.decisions import check_decisions, check_features, check_images

BlockKind = Literal["basic", "bottleneck"]
StemKind = Literal["cifar", "imagenet"]
ShortcutKind = Literal["average_pool", "subsample", "projection"]

BOTTLENECK_EXPANSION = 4


@dataclass(frozen=True)
class ResNetConfig:
    """Architecture of a ResNet; everything that shapes its weights and its arithmetic.

    Attributes:
        block: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3, 1x1).
        layers: residual blocks of each segment.
        widths: channels of each segment's 3x3 convolutions.
        stem: "cifar" (3x3, stride 1) or "imagenet" (7x7, stride 2, then 3x3 max pooling).
        shortcut: what the first block of a segment that changes shape adds to:
            "average_pool" (pool, zero channels behind the data; the BlockDrop authors'),
            "subsample" (every second pixel, zero channels on both sides),
            "projection" (1x1 convolution and batch norm; ImageNet).
        num_classes: outputs of the final linear layer.
        block_widths: K channels inside each block, where they are not its segment's: those that its
            convolutions but the last give. None, also for K that are the segments': none differs.
        groups: of the 3x3 convolutions of bottleneck blocks; a block's width per group is its
            channels inside over this.
    """

    block: BlockKind
    layers: tuple[int, ...]
    widths: tuple[int, ...]
    stem: StemKind
    shortcut: ShortcutKind
    num_classes: int
    block_widths: tuple[int, ...] | None = None
    groups: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "widths", tuple(self.widths))
        if self.block not in ("basic", "bottleneck"):
            raise ValueError(f"block: expected 'basic' or 'bottleneck', got {self.block!r}")
        if self.stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem: expected 'cifar' or 'imagenet', got {self.stem!r}")
        if self.shortcut not in ("average_pool", "subsample", "projection"):
            raise ValueError(
                "shortcut: expected 'average_pool', 'subsample' or 'projection', "
                f"got {self.shortcut!r}"
            )
        if not self.layers or len(self.layers) != len(self.widths):
            raise ValueError(
                f"layers and widths: expected one entry a segment each, got {self.layers} "
                f"and {self.widths}"
            )
        if min(self.layers) < 1 or min(self.widths) < 1 or self.num_classes < 1:
            raise ValueError(f"layers, widths and num_classes must be positive, got {self}")
        if self.block_widths is not None:
            self._check_block_widths(tuple(self.block_widths))
        self._check_groups()

    def _check_block_widths(self, block_widths: tuple[int, ...]) -> None:
        if len(block_widths) != self.num_blocks or min(block_widths) < 1:
            raise ValueError(
                f"block_widths: expected a width of 1 or more for each of {self.num_blocks} "
                f"blocks, got {block_widths}"
            )
        same = block_widths == self._segment_widths
        object.__setattr__(self, "block_widths", None if same else block_widths)

    def _check_groups(self) -> None:
        if self.groups == 1:
            return
        if self.block != "bottleneck":
            raise ValueError(f"groups: expected 1 of {self.block} blocks, got {self.groups}")
        if self.groups < 1 or any(width % self.groups for width in self.inner_widths):
            raise ValueError(
                f"groups: expected a divisor of the channels inside blocks, "
                f"{sorted(set(self.inner_widths))}, got {self.groups}"
            )

    @property
    def num_blocks(self) -> int:
        """K, the number of residual blocks."""
        return sum(self.layers)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each segment's outputs."""
        expansion = BOTTLENECK_EXPANSION if self.block == "bottleneck" else 1
        return tuple(width * expansion for width in self.widths)

    @property
    def block_channels(self) -> tuple[tuple[int, int], ...]:
        """(channels in, channels out) of each of the K blocks, in order."""
        channels = 64 if self.stem == "imagenet" else self.widths[0]
        pairs = []
        for layers, out_channels in zip(self.layers, self.channels, strict=True):
            for _ in range(layers):
                pairs.append((channels, out_channels))
                channels = out_channels
        return tuple(pairs)

    @property
    def inner_widths(self) -> tuple[int, ...]:
        """Channels inside each of the K blocks, in order; see ``block_widths``."""
        return self._segment_widths if self.block_widths is None else self.block_widths

    @property
    def _segment_widths(self) -> tuple[int, ...]:
        pairs = zip(self.widths, self.layers, strict=True)
        return tuple(width for width, layers in pairs for _ in range(layers))

    @property
    def size_multiple(self) -> int:
        """Image height and width must be multiples of this.

        The average-pooling shortcut agrees with the strided convolutions on even sizes only, and
        CIFAR networks take no others. ImageNet networks with projections take any size.
        """
        segments = 2 ** (len(self.layers) - 1)
        if self.stem == "cifar":
            return segments
        return 4 * segments if self.shortcut == "average_pool" else 1

    def size_multiple_from(self, after: int) -> int:
        """Height and width of what block ``after`` gives must be multiples of this."""
        if self.shortcut == "projection":
            return 1
        starts = list(accumulate(self.layers))[:-1]  # of the segments but the first
        return 2 ** sum(start >= after for start in starts)

    def to_dict(self) -> dict:
        """The fields as plain JSON-ready values, without later ones that say nothing new.

        So what was written before there were such fields, and what is written now, are the same.
        """
        fields = asdict(self)
        if self.block_widths is None:
            del fields["block_widths"]
        if self.groups == 1:
            del fields["groups"]
        return fields


class BasicBlock(nn.Module):
    """F_k of CIFAR ResNets and of ResNet-10/18: 3x3 convolution, batch norm, ReLU, twice."""

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """F_k(x), without shortcut and without the final ReLU."""
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Bottleneck(nn.Module):
    """F_k of ImageNet ResNets: 1x1, 3x3 (carrying the stride, maybe grouped), 1x1 convolutions."""

    def __init__(
        self, in_channels: int, width: int, out_channels: int, stride: int, groups: int = 1
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """F_k(x), without shortcut and without the final ReLU."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class AveragePoolShortcut(nn.Module):
    """Average pooling by the stride, then zero channels behind the data."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.extra = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        return F.pad(x, (0, 0, 0, 0, 0, self.extra))


class SubsampleShortcut(nn.Module):
    """Every stride-th pixel, then zero channels on both sides of the data."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class ProjectionShortcut(nn.Module):
    """1x1 convolution carrying the stride, and batch norm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


_SHORTCUTS = {
    "average_pool": AveragePoolShortcut,
    "subsample": SubsampleShortcut,
    "projection": ProjectionShortcut,
}


def check_config(name: str, config: ResNetConfig) -> None:
    """Raise TypeError unless an argument is an architecture."""
    if not isinstance(config, ResNetConfig):
        raise TypeError(f"{name}: expected a ResNetConfig, got {type(config).__name__}")


class ResNet(nn.Module):
    """A ResNet that runs, for each image, the residual blocks that its decisions keep.

    Children: ``conv1, bn1``, ``segments[s][b]`` (the F_k), ``shortcuts[s]`` (of the segment's
    first block), ``fc``.

    Attributes:
        config: the architecture.
        normalization: what images were normalised with (``blockdrop_fast.data.Normalization``)
            or None where unknown. Metadata: applied by data loaders, never here.
    """

    def __init__(self, config: ResNetConfig):
        super().__init__()
        check_config("config", config)
        self.config = config
        self.normalization = None
        imagenet = config.stem == "imagenet"
        channels = 64 if imagenet else config.widths[0]
        self.conv1 = (
            nn.Conv2d(3, channels, 7, 2, 3, bias=False)
            if imagenet
            else nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(channels)
        block_class = (
            partial(Bottleneck, groups=config.groups)
            if config.block == "bottleneck"
            else BasicBlock
        )
        self.segments = nn.ModuleList()
        self.shortcuts = nn.ModuleList()
        inner_widths = iter(config.inner_widths)
        for segment, (layers, out_channels) in enumerate(
            zip(config.layers, config.channels, strict=True)
        ):
            stride = 1 if segment == 0 else 2
            same_shape = stride == 1 and channels == out_channels
            if config.shortcut != "projection" and out_channels < channels:
                raise ValueError(
                    f"widths: without projections a segment cannot have fewer channels "
                    f"({out_channels}) than its input ({channels})"
                )
            self.shortcuts.append(
                nn.Identity()
                if same_shape
                else _SHORTCUTS[config.shortcut](channels, out_channels, stride)
            )
            blocks = nn.ModuleList()
            for index in range(layers):
                width = next(inner_widths)
                blocks.append(
                    block_class(channels, width, out_channels, stride if index == 0 else 1)
                )
                channels = out_channels
            self.segments.append(blocks)
        self.fc = nn.Linear(channels, config.num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def num_blocks(self) -> int:
        """K, the number of residual blocks."""
        return self.config.num_blocks

    def blocks(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """The K pairs (F_k, its shortcut) in order of execution."""
        identity = nn.Identity()
        for segment, shortcut in zip(self.segments, self.shortcuts, strict=True):
            for index, block in enumerate(segment):
                yield block, (shortcut if index == 0 else identity)

    def stem(self, images: Tensor) -> Tensor:
        """What the first block is given; images and errors as of ``forward``."""
        self._check_images(images)
        return self._stem(images)

    def _stem(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> the input of block 1."""
        x = F.relu(self.bn1(self.conv1(images)))
        return F.max_pool2d(x, 3, 2, 1) if self.config.stem == "imagenet" else x

    def classifier(self, x: Tensor) -> Tensor:
        """The output of block K -> (B, num_classes) logits."""
        return self.fc(x.mean((2, 3)))

    def forward(
        self, images: Tensor, decisions: Tensor | None = None, *, active_only: bool = False
    ) -> Tensor:
        """Logits of a batch, each image running the blocks that its decisions keep.

        A kept block gives ``relu(shortcut(x) + F_k(x))``, a dropped one ``shortcut(x)`` with no
        ReLU of its own. A block that no image keeps is not computed, so that in train mode its
        batch-norm statistics stay as they are. (BlockDrop section 3.1, and the authors' code.)

        Args:
            images: (B, 3, H, W) normalised, of the weights' dtype and device.
            decisions: (B, K) bool or 0/1, 1 = keep; None keeps all blocks.
            active_only: compute F_k on the block's active images only, instead of on all images
                followed by a mask. The same values in eval mode; in train mode batch-norm
                statistics then cover active images only. Differentiable either way.

        Returns:
            (B, num_classes) logits.

        Raises:
            TypeError, ValueError: see ``check_images`` and ``check_decisions``.
        """
        self._check_images(images)
        decisions = self._check_decisions(images, decisions)
        if images.shape[0] == 0:
            return images.new_zeros(0, self.config.num_classes)
        x = self._run(self._stem(images), range(self.num_blocks), decisions, active_only)
        return self.classifier(x)

    def features(self, images: Tensor, after: int) -> Tensor:
        """What block ``after`` gives for images that keep it and all blocks before.

        Args:
            images: as of ``forward``.
            after: 1 to K; 0: what the stem gives.

        Returns:
            (B, C, H, W), for ``forward_from``.

        Raises:
            TypeError, ValueError: as of ``forward``, or there is no such block.
        """
        self._check_after(after)
        return self._run(self.stem(images), range(after), None, False)

    def forward_from(
        self,
        features: Tensor,
        after: int,
        decisions: Tensor | None = None,
        *,
        active_only: bool = False,
    ) -> Tensor:
        """``forward`` of images whose ``features`` after block ``after`` are there already.

        Args:
            features: (B, C, H, W), see ``features``.
            decisions, active_only: as of ``forward``; blocks 1 to ``after`` are kept.

        Raises:
            TypeError, ValueError: no such features or block, see ``check_decisions``, or decisions
                that drop one of those.
        """
        self._check_after(after)
        check_features(
            features,
            self.config.block_channels[after][0]
            if after < self.num_blocks
            else self.fc.in_features,
            self.fc.weight,
            self.config.size_multiple_from(after),
        )
        decisions = self._check_decisions(features, decisions)
        if decisions is not None and not decisions[:, :after].all():
            raise ValueError(f"decisions: expected blocks 1 to {after} kept, they have run")
        if features.shape[0] == 0:
            return features.new_zeros(0, self.config.num_classes)
        rest = range(after, self.num_blocks)
        return self.classifier(self._run(features, rest, decisions, active_only))

    def _run(self, x: Tensor, some: range, decisions: Tensor | None, active_only: bool) -> Tensor:
        """Those of the K blocks, given the input of the first of them."""
        run = active_block if active_only else masked_block
        for k, (block, shortcut) in islice(enumerate(self.blocks()), some.start, some.stop):
            if decisions is None:
                x = F.relu(shortcut(x) + block(x))
            else:
                x = run(block, shortcut, x, decisions[:, k])
        return x

    def _check_after(self, after: int) -> None:
        if not 0 <= after <= self.num_blocks:
            raise ValueError(f"after: expected from 0 to {self.num_blocks}, got {after}")

    def _check_images(self, images: Tensor) -> None:
        check_images(
            images,
            channels=self.conv1.in_channels,
            size_multiple=self.config.size_multiple,
            dtype=self.conv1.weight.dtype,
        )
        if images.device != self.conv1.weight.device:
            raise ValueError(
                f"images: expected on {self.conv1.weight.device} as the network's weights, "
                f"got on {images.device}"
            )

    def _check_decisions(self, images: Tensor, decisions: Tensor | None) -> Tensor | None:
        if decisions is None:
            return None
        return check_decisions(
            decisions,
            batch=images.shape[0],
            num_blocks=self.num_blocks,
            device=images.device,
        )


def masked_block(
    block: nn.Module, shortcut: nn.Module, x: Tensor, keep: Tensor, used: Tensor | None = None
) -> Tensor:
    """One block for all images, dropped ones masked afterwards: readable, and saves nothing.

    Args:
        block, shortcut: of ``ResNet.blocks``.
        x: (B, C, H, W), the block's input.
        keep: (B,) bool.
        used: scalar bool, whether the block is computed; default: if an image keeps it.
    """
    residual = shortcut(x)
    if not (keep.any() if used is None else used):
        return residual
    return torch.where(keep[:, None, None, None], F.relu(residual + block(x)), residual)


def active_block(block: nn.Module, shortcut: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
    """``masked_block`` for its active images only, gathered before and put back after."""
    residual = shortcut(x)
    active = keep.nonzero().squeeze(1)
    if active.numel() == 0:
        return residual
    if active.numel() == keep.numel():
        return F.relu(residual + block(x))
    stream, taken = _Take.apply(residual, active)
    inputs = taken if residual is x else take_images(x, active)
    return _PutBack.apply(stream, F.relu(taken + block(inputs)), active)


# Autograd's own derivatives of indexing go over all images of the batch six times a block. A pair
# that knows the other writes, in each direction, one copy of the batch with active images replaced.
class _Take(torch.autograd.Function):
    """(B, ...) images, active (N,) -> the same images for ``_PutBack``, and the active ones."""

    @staticmethod
    def forward(ctx, x: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(active)
        return x.view_as(x), take_images(x, active)

    @staticmethod
    def backward(ctx, stream_gradient: Tensor, taken_gradient: Tensor) -> tuple[Tensor, None]:
        (active,) = ctx.saved_tensors
        return put_images(stream_gradient, active, taken_gradient), None


class _PutBack(torch.autograd.Function):
    """(B, ...) images, (N, ...) new active ones, active (N,) -> (B, ...) with those in place."""

    @staticmethod
    def forward(ctx, stream: Tensor, kept: Tensor, active: Tensor) -> Tensor:
        ctx.save_for_backward(active)
        return put_images(stream, active, kept)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (active,) = ctx.saved_tensors
        # The active images' rows of the first are none of their gradient: ``_Take`` replaces them.
        return gradient, take_images(gradient, active), None


def put_images(x: Tensor, index: Tensor, images: Tensor) -> Tensor:
    """A copy of x (B, C, H, W) whose images ``index`` (N,) are ``images`` (N, C, H, W)."""
    if x.is_contiguous(memory_format=torch.channels_last):
        x, images = x.permute(0, 2, 3, 1), images.permute(0, 2, 3, 1)
        return x.index_copy(0, index, images.contiguous()).permute(0, 3, 1, 2)
    return x.index_copy(0, index, images)


def take_images(x: Tensor, index: Tensor) -> Tensor:
    """Images ``index`` (N,) of x (B, C, H, W), channels-last if x is.

    ``index_select`` alone would return a channels-last tensor's images as channels-first.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return x.index_select(0, index)
