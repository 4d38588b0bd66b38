"""Networks from their weights: the architecture is read off keys and shapes, loading is strict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from blockdrop_fast.networks.checkpoint_files import CheckpointError, Tensors, some
from blockdrop_fast.networks.resnet import BOTTLENECK_EXPANSION, ResNet, ResNetConfig


def infer_config(tensors: Tensors, has_linear: bool, where: str) -> ResNetConfig:
    """Read the architecture off the shapes of a state dict with our keys.

    Without parameters in them, the two CIFAR shortcuts can only be told apart by convention:
    files whose classifier is called ``linear`` subsample, those with ``fc`` pool.
    """
    sizes: dict[int, int] = {}
    for key in tensors:
        match = re.match(r"^segments\.(\d+)\.(\d+)\.", key)
        if match:
            segment, block = map(int, match.groups())
            sizes[segment] = max(sizes.get(segment, 0), block + 1)
    block = "bottleneck" if "segments.0.0.conv3.weight" in tensors else "basic"
    last, expansion = ("conv3", BOTTLENECK_EXPANSION) if block == "bottleneck" else ("conv2", 1)
    convs = ("conv1", "conv2", "conv3") if block == "bottleneck" else ("conv1", "conv2")
    needed = ["conv1.weight", "fc.weight"]
    needed += [
        f"segments.{segment}.{index}.{conv}.weight"
        for segment in range(max(1, len(sizes)))
        for index in range(sizes.get(segment, 1))
        for conv in convs
    ]
    missing = [key for key in needed if key not in tensors]
    if missing:
        raise CheckpointError(
            f"{where}: not a ResNet of a known layout; no tensor that would be {some(missing)}, "
            f"the keys are {some(tensors)}"
        )
    wrong = [key for key in needed if tensors[key].ndim != (2 if key == "fc.weight" else 4)]
    if wrong:
        raise CheckpointError(
            f"{where}: expected a convolution or linear weight, got shapes "
            + some(f"{key} {tuple(tensors[key].shape)}" for key in wrong)
        )
    stems = {3: "cifar", 7: "imagenet"}
    kernel = tensors["conv1.weight"].shape[-1]
    if kernel not in stems:
        raise CheckpointError(
            f"{where}: expected a 3x3 (CIFAR) or 7x7 (ImageNet) first convolution, got shape "
            f"{tuple(tensors['conv1.weight'].shape)}"
        )
    if any(key.startswith("shortcuts.") for key in tensors):
        shortcut = "projection"
    else:
        shortcut = "subsample" if has_linear else "average_pool"
    try:
        return ResNetConfig(
            block=block,
            layers=tuple(sizes[segment] for segment in range(len(sizes))),
            widths=tuple(
                tensors[f"segments.{segment}.0.{last}.weight"].shape[0] // expansion
                for segment in range(len(sizes))
            ),
            stem=stems[kernel],
            shortcut=shortcut,
            num_classes=tensors["fc.weight"].shape[0],
            block_widths=tuple(
                tensors[f"segments.{segment}.{index}.conv1.weight"].shape[0]
                for segment in range(len(sizes))
                for index in range(sizes[segment])
            ),
            groups=_groups(tensors) if block == "bottleneck" else 1,
        )
    except ValueError as error:  # empty weights
        raise CheckpointError(f"{where}: {error}") from None


def _groups(tensors: Tensors) -> int:
    """Of 3x3 convolutions, whose weights have the channels of one group; 1 if it comes out odd."""
    width = tensors["segments.0.0.conv1.weight"].shape[0]
    of_group = tensors["segments.0.0.conv2.weight"].shape[1]
    return width // of_group if of_group and width % of_group == 0 else 1


def override(inferred: ResNetConfig, overrides: Mapping[str, Any], where: str) -> ResNetConfig:
    """Apply what the caller (or the metadata) says, where the weights leave it open."""
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        config = replace(inferred, **given)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    for name in given:
        asked, found = getattr(config, name), getattr(inferred, name)
        # Which of the two shortcuts without parameters is a choice, whether it has some is not.
        free = name == "shortcut" and "projection" not in (asked, found)
        # A network that never changes shape has no shortcuts to tell.
        free = free or (name == "shortcut" and len(inferred.layers) == 1)
        if asked != found and not free:
            raise CheckpointError(
                f"{where}: {name}={asked!r} contradicts the file's weights, which have "
                f"{name}={found!r}"
            )
    return config


def build_network(config: ResNetConfig, tensors: Tensors, where: str) -> ResNet:
    """A ResNet with exactly these weights, in the file's dtype; strict."""
    try:
        with torch.device("meta"):  # no memory, no random numbers for weights to be replaced
            network = ResNet(config)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    load_strictly(network, tensors, str(network.config), where)
    return network


def load_strictly(network: nn.Module, tensors: Tensors, architecture: str, where: str) -> None:
    """Give a module copies of exactly these tensors.

    Raises:
        CheckpointError: names, shapes or dtypes are others.
    """
    expected = network.state_dict()
    tensors = dict(tensors)
    for key in expected:
        if key.endswith(".num_batches_tracked"):  # absent from files of before PyTorch 0.4.1
            tensors.setdefault(key, torch.zeros((), dtype=torch.long))
    problems = []
    missing = [key for key in expected if key not in tensors]
    surplus = [key for key in tensors if key not in expected]
    if missing:
        problems.append(f"{len(missing)} missing keys: {some(missing)}")
    if surplus:
        problems.append(f"{len(surplus)} surplus keys: {some(surplus)}")
    common = [key for key in expected if key in tensors]
    shapes = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in common
        if tensors[key].shape != expected[key].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} tensors of another shape: {some(shapes)}")
    dtypes = [
        f"{key} {tensors[key].dtype}"
        for key in common
        if tensors[key].is_floating_point() != expected[key].is_floating_point()
    ]
    if dtypes:
        problems.append(f"{len(dtypes)} tensors of an unexpected dtype: {some(dtypes)}")
    if problems:
        raise CheckpointError(
            f"{where}: does not fit the architecture {architecture}: {'; '.join(problems)} "
            "(keys as blockdrop_fast names them)"
        )
    copies = {
        key: tensors[key].detach().clone(memory_format=torch.contiguous_format) for key in expected
    }
    network.load_state_dict(copies, strict=True, assign=True)
