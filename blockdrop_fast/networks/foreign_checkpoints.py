"""Checkpoints of others: torchvision's, the common CIFAR files, the BlockDrop authors'.

Their keys are translated into ours (the tables below); keys and shapes tell the architecture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from blockdrop_fast.data.image_sets import (
    IMAGENET_NORMALIZATION,
    NO_NORMALIZATION,
    R32_C10_NORMALIZATION,
    Normalization,
)
from blockdrop_fast.networks.checkpoint_files import CheckpointError, Tensors, some
from blockdrop_fast.networks.policy import PolicyNetwork
from blockdrop_fast.networks.resnet import ResNet, ResNetConfig
from blockdrop_fast.networks.weights import build_network, infer_config, override

# (pattern, our name); the first match of a table is applied, other keys stay as they are.
# Segments count from 1 in torchvision's names and from 0 in the authors' and in ours.
_WRAPPER_PREFIX = re.compile(r"^(module\.|_orig_mod\.)+")  # DataParallel, torch.compile
_NETWORK_KEYS = [
    (r"^layer(\d+)\.0\.(?:downsample|shortcut)\.0\.", "shortcuts.{0}.conv.", 1),
    (r"^layer(\d+)\.0\.(?:downsample|shortcut)\.1\.", "shortcuts.{0}.bn.", 1),
    (r"^layer(\d+)\.(\d+)\.", "segments.{0}.{1}.", 1),
    (r"^ds\.(\d+)\.0\.", "shortcuts.{0}.conv.", 0),
    (r"^ds\.(\d+)\.1\.", "shortcuts.{0}.bn.", 0),
    (r"^blocks\.(\d+)\.(\d+)\.", "segments.{0}.{1}.", 0),
    (r"^linear\.", "fc.", 0),
]

# The authors' policy network: its ResNet is called features and its head logit. vnet is an
# unused value estimate, features.fc what was left of the ResNet's own classifier.
_POLICY_UNUSED = re.compile(r"^(vnet|features\.fc)\.")
_POLICY_KEYS = [(r"^features\.", ""), (r"^logit\.", "fc.")]

# Where a torch file keeps the state dict of the wanted network; {} itself otherwise.
_BACKBONE_ENTRIES = ("resnet", "state_dict", "model")
_POLICY_ENTRIES = ("agent", "net")


def has_policy(content: Mapping) -> bool:
    """Whether a file's content has a policy network, as the authors' files have."""
    return any(isinstance(content.get(entry), Mapping) for entry in _POLICY_ENTRIES)


def foreign_backbone(
    content: Mapping, overrides: Mapping, normalization: Normalization | None, path: Path
) -> ResNet:
    """The ResNet in a file's content; see ``checkpoints.load_backbone``."""
    if has_policy(content) and not any(entry in content for entry in _BACKBONE_ENTRIES):
        raise CheckpointError(f"{path}: holds a policy network but no backbone; use load_policy")
    raw = _state_dict(content, _BACKBONE_ENTRIES, str(path))
    tensors = _translate_network(raw)
    has_linear = "linear.weight" in raw
    inferred = infer_config(tensors, has_linear, str(path))
    network = build_network(override(inferred, overrides, str(path)), tensors, str(path))
    network.normalization = normalization or _foreign_normalization(raw, inferred)
    return network


def foreign_policy(content: Mapping, path: Path) -> PolicyNetwork:
    """The policy network in the content of an authors' file; see ``checkpoints.load_policy``."""
    if not has_policy(content):
        raise CheckpointError(
            f"{path}: holds no policy network: no entry "
            f"{' or '.join(map(repr, _POLICY_ENTRIES))}, the entries are {some(content)}"
        )
    where = f"{path} (policy network)"
    tensors = _translate_policy(_state_dict(content, _POLICY_ENTRIES, where))
    config = infer_config(tensors, False, where)
    # Not in the file; the two policy networks that the authors have.
    input_pool = 2 if config.stem == "imagenet" else 1
    return PolicyNetwork(build_network(config, tensors, where), input_pool)


def _state_dict(content: Mapping, entries: tuple[str, ...], where: str) -> Tensors:
    """Unwrap a foreign file's content to one state dict, without wrapper prefixes."""
    for entry in entries:
        if isinstance(content.get(entry), Mapping):
            return _state_dict(content[entry], entries, where)
    strange = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if strange or not content:
        raise CheckpointError(
            f"{where}: expected a state dict, or one under {' or '.join(map(repr, entries))}; "
            f"got {some(f'{key!r}: {type(content[key]).__name__}' for key in strange)}"
        )
    return {_WRAPPER_PREFIX.sub("", str(key)): value for key, value in content.items()}


def _translate_network(tensors: Tensors) -> Tensors:
    """Keys of a torchvision-, CIFAR- or authors'-style ResNet -> keys of ``ResNet``."""
    return {_translate_network_key(key): value for key, value in tensors.items()}


def _translate_network_key(key: str) -> str:
    for pattern, name, first in _NETWORK_KEYS:
        match = re.match(pattern, key)
        if match:
            numbers = [int(number) for number in match.groups()]
            if numbers:
                numbers[0] -= first
            return name.format(*numbers) + key[match.end() :]
    return key


def _translate_policy(tensors: Tensors) -> Tensors:
    """Keys of an authors' policy network -> keys of ``ResNet``."""
    translated = {}
    for key, value in tensors.items():
        if _POLICY_UNUSED.match(key):
            continue
        for pattern, name in _POLICY_KEYS:
            key = re.sub(pattern, name, key)
        translated[_translate_network_key(key)] = value
    return translated


def _foreign_normalization(raw: Tensors, config: ResNetConfig) -> Normalization | None:
    """What the publishers of such files normalised with."""
    if config.stem == "imagenet":
        return IMAGENET_NORMALIZATION
    if any(key.startswith("blocks.") for key in raw):  # the authors'
        if config.layers == (5, 5, 5) and config.num_classes == 10:
            return R32_C10_NORMALIZATION
        return NO_NORMALIZATION
    if "linear.weight" in raw and config.shortcut == "subsample":
        return IMAGENET_NORMALIZATION
    return None
