"""The arithmetic that block-major executors share: folded convolutions in torch.

Both vendors' libraries apply ReLU, or residual sum and ReLU, while a convolution's result is still
in registers: oneDNN on CPUs, where it also takes weights packed in its own order, and cuDNN on
GPUs. torch offers them to its compiler only; where they are missing, and on other devices and
precisions, plain ``conv2d`` computes the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockdrop_fast.networks.folding import FoldedBlock, FoldedConv, FoldedNetwork
from blockdrop_fast.networks.resnet import take_images

_pack = getattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", None)
_fused = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
_HAS_FUSED = (
    _pack is not None and hasattr(_fused, "binary") and torch.backends.mkldnn.is_available()
)

CUDNN_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Conv:
    """A folded convolution, with what follows it fused into it where torch can.

    oneDNN chooses the order of packed weights by the shape of the input, and one image and several
    can get different ones; weights in the other order are rearranged at every call, which takes up
    to 20 times as long as the convolution. So each of the two has its own packing, made when it
    is first needed.
    """

    def __init__(self, folded: FoldedConv):
        self._weight = folded.weight
        self._bias = folded.bias
        self._stride = [folded.stride, folded.stride]
        self._padding = [folded.padding, folded.padding]
        self._groups = folded.groups
        self._can_fuse = (
            _HAS_FUSED and folded.weight.dtype == torch.float32 and folded.weight.is_cpu
        )
        self._packed: dict[bool, Tensor] = {}  # whether for several images -> weights
        # With groups cuDNN's fused convolutions are untried; plain ones cost two passes more.
        self._on_cudnn = (
            folded.groups == 1
            and folded.weight.is_cuda
            and folded.weight.dtype in CUDNN_DTYPES
            and torch.backends.cudnn.is_available()
        )

    def __call__(self, x: Tensor) -> Tensor:
        """The convolution alone."""
        if not self._can_fuse:
            return F.conv2d(
                x, self._weight, self._bias, self._stride, self._padding, groups=self._groups
            )
        return self._call_fused(x, "none")

    def relu(self, x: Tensor) -> Tensor:
        """relu(conv(x))."""
        if self._on_cudnn:
            return torch.cudnn_convolution_relu(
                x, self._weight, self._bias, self._stride, self._padding, [1, 1], 1
            )
        if not self._can_fuse:
            return self(x).relu_()
        return self._call_fused(x, "relu")

    def add_relu(self, x: Tensor, other: Tensor) -> Tensor:
        """relu(conv(x) + other); ``other`` stays as it is."""
        if self._on_cudnn:
            return torch.cudnn_convolution_add_relu(
                x, self._weight, other, 1.0, self._bias, self._stride, self._padding, [1, 1], 1
            )
        # oneDNN, as torch 2.11 calls it, refuses to add images of a single pixel.
        if not self._can_fuse or other.shape[2] * other.shape[3] == 1:
            return self(x).add_(other).relu_()
        return _fused.binary(
            x, other, self._packed_for(x), self._bias, self._padding, self._stride, [1, 1],
            self._groups, "add", None, "relu", [], None,
        )  # fmt: skip

    def _call_fused(self, x: Tensor, activation: str) -> Tensor:
        return _fused(
            x, self._packed_for(x), self._bias, self._padding, self._stride, [1, 1], self._groups,
            activation, [], "",
        )  # fmt: skip

    def _packed_for(self, x: Tensor) -> Tensor:
        several = x.shape[0] > 1
        if several not in self._packed:
            self._packed[several] = _pack(
                self._weight.to_mkldnn(), self._padding, self._stride, [1, 1], self._groups,
                list(x.shape),
            )  # fmt: skip
        return self._packed[several]


class Block:
    """One residual block, ready to run."""

    def __init__(self, folded: FoldedBlock):
        self._convs = [Conv(conv) for conv in folded.convs]
        self._shortcut: Conv | nn.Module | None = folded.shortcut
        if isinstance(folded.shortcut, FoldedConv):
            self._shortcut = Conv(folded.shortcut)

    def shortcut(self, x: Tensor) -> Tensor:
        """What F_k(x) is added to; x itself where the shortcut is the identity."""
        if self._shortcut is None:
            return x
        if isinstance(self._shortcut, Conv):
            return self._shortcut(x)
        return self._shortcut(x).contiguous(memory_format=torch.channels_last)

    def kept(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """relu(shortcut + F_k(x)), freshly allocated."""
        *first, last = self._convs
        for conv in first:
            x = conv.relu(x)
        return last.add_relu(x, shortcut)

    def run(self, x: Tensor, keep: Tensor, active: Tensor, dense_from: float) -> Tensor:
        """Run the block for the images that keep it.

        Args:
            x: (R, C, H, W); belongs to the caller no more, as it is updated in place.
            keep: (R,) bool.
            active: (n,) of any integer dtype, the rows of x that do, ascending.
            dense_from: share of them from which all rows are computed, and masked; above 1: never.

        Returns:
            (R, C', H', W').
        """
        shortcut = self.shortcut(x)
        if len(active) == 0:
            return shortcut
        if len(active) == len(x):
            return self.kept(x, shortcut)
        if len(active) >= dense_from * len(x):
            return torch.where(keep[:, None, None, None], self.kept(x, shortcut), shortcut)
        taken = take_images(shortcut, active)
        kept = self.kept(taken if shortcut is x else take_images(x, active), taken)
        # The indices are unique, so a plain in-place store puts the rows back.
        shortcut.permute(0, 2, 3, 1).index_copy_(0, active.long(), kept.permute(0, 2, 3, 1))
        return shortcut


class Layers:
    """A folded network's parts, ready to run.

    Attributes:
        config: the architecture.
        blocks: the K residual blocks.
    """

    def __init__(self, network: FoldedNetwork):
        self.config = network.config
        self._network = network
        self._stem = Conv(network.stem)
        self.blocks = [Block(block) for block in network.blocks]

    def stem(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, C, H', W') channels-last input of block 1, fresh."""
        x = self._stem.relu(images.contiguous(memory_format=torch.channels_last))
        return F.max_pool2d(x, 3, 2, 1) if self.config.stem == "imagenet" else x

    def classifier(self, x: Tensor) -> Tensor:
        """(B, C, H, W) output of block K -> (B, num_classes) logits."""
        return F.linear(x.mean((2, 3)), self._network.fc_weight, self._network.fc_bias)
