"""Reading and writing checkpoints: our own format, and the foreign ones that people have.

A foreign file takes three steps: translate its keys into ours (the tables below), infer the
architecture from keys and shapes, load strictly. Nothing in a file is ever executed.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from blockdrop_fast.data.image_sets import (
    IMAGENET_NORMALIZATION,
    NO_NORMALIZATION,
    R32_C10_NORMALIZATION,
    Normalization,
)
from blockdrop_fast.files import atomic_write
from blockdrop_fast.networks.blockdrop import AnyPolicy, BlockDrop
from blockdrop_fast.networks.cascade import Cascade, Member, backbone_of
from blockdrop_fast.networks.exits import Exits
from blockdrop_fast.networks.fixed import FixedPolicy
from blockdrop_fast.networks.gated import GatedPolicy
from blockdrop_fast.networks.halting import HaltingPolicy
from blockdrop_fast.networks.look import LookPolicy
from blockdrop_fast.networks.low_cost import LowCostMasks
from blockdrop_fast.networks.menu import Menu
from blockdrop_fast.networks.policy import PolicyNetwork
from blockdrop_fast.networks.resnet import (
    BOTTLENECK_EXPANSION,
    ResNet,
    ResNetConfig,
    ShortcutKind,
)
from blockdrop_fast.networks.sequential import SequentialPolicy
from blockdrop_fast.networks.spatial_halting import SpatialHaltingPolicy

FORMAT_VERSION = 1
_METADATA_KEY = "blockdrop_fast"
_CHECKSUM_KEY = "crc32"  # of our metadata and all tensors; files of before 0.2 have none

PRETRAINED = Path(__file__).parents[1] / "pretrained"

Tensors = dict[str, Tensor]


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded; the message names the file and what is wrong with it."""


# ------------------------------------------------------------------ keys of foreign files

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

# Gates by the name of their kind in our own files, and the arguments that are kept beside it.
_GATES = {
    "sequential": SequentialPolicy,
    "halting": HaltingPolicy,
    "exits": Exits,
    "low_cost": LowCostMasks,
    "spatial_halting": SpatialHaltingPolicy,
}
_GATE_OPTIONS = {
    "sequential": (),
    "halting": ("hard", "epsilon"),
    "exits": ("exits",),
    "low_cost": (),
    "spatial_halting": ("epsilon",),
}

# Where a torch file keeps the state dict of the wanted network; {} itself otherwise.
_BACKBONE_ENTRIES = ("resnet", "state_dict", "model")
_POLICY_ENTRIES = ("agent", "net")


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


# ------------------------------------------------------------------ inferring, loading


def _infer_config(tensors: Tensors, has_linear: bool, where: str) -> ResNetConfig:
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
            f"{where}: not a ResNet of a known layout; no tensor that would be {_some(missing)}, "
            f"the keys are {_some(tensors)}"
        )
    wrong = [key for key in needed if tensors[key].ndim != (2 if key == "fc.weight" else 4)]
    if wrong:
        raise CheckpointError(
            f"{where}: expected a convolution or linear weight, got shapes "
            + _some(f"{key} {tuple(tensors[key].shape)}" for key in wrong)
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


def _override(inferred: ResNetConfig, overrides: Mapping[str, Any], where: str) -> ResNetConfig:
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


def _build_network(config: ResNetConfig, tensors: Tensors, where: str) -> ResNet:
    """A ResNet with exactly these weights, in the file's dtype; strict."""
    try:
        with torch.device("meta"):  # no memory, no random numbers for weights to be replaced
            network = ResNet(config)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    _load_strictly(network, tensors, str(network.config), where)
    return network


def _load_strictly(network: nn.Module, tensors: Tensors, architecture: str, where: str) -> None:
    expected = network.state_dict()
    tensors = dict(tensors)
    for key in expected:
        if key.endswith(".num_batches_tracked"):  # absent from files of before PyTorch 0.4.1
            tensors.setdefault(key, torch.zeros((), dtype=torch.long))
    problems = []
    missing = [key for key in expected if key not in tensors]
    surplus = [key for key in tensors if key not in expected]
    if missing:
        problems.append(f"{len(missing)} missing keys: {_some(missing)}")
    if surplus:
        problems.append(f"{len(surplus)} surplus keys: {_some(surplus)}")
    common = [key for key in expected if key in tensors]
    shapes = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in common
        if tensors[key].shape != expected[key].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} tensors of another shape: {_some(shapes)}")
    dtypes = [
        f"{key} {tensors[key].dtype}"
        for key in common
        if tensors[key].is_floating_point() != expected[key].is_floating_point()
    ]
    if dtypes:
        problems.append(f"{len(dtypes)} tensors of an unexpected dtype: {_some(dtypes)}")
    if problems:
        raise CheckpointError(
            f"{where}: does not fit the architecture {architecture}: {'; '.join(problems)} "
            "(keys as blockdrop_fast names them)"
        )
    copies = {
        key: tensors[key].detach().clone(memory_format=torch.contiguous_format) for key in expected
    }
    network.load_state_dict(copies, strict=True, assign=True)


def _some(names: Iterable, limit: int = 4) -> str:
    names = list(names)
    listed = ", ".join(str(name) for name in names[:limit]) or "none"
    return listed + (f", … ({len(names)} in all)" if len(names) > limit else "")


# ------------------------------------------------------------------ files


def _read(path: Path) -> tuple[dict, dict | None]:
    """File -> (content, our own metadata or None for foreign files)."""
    with open(path, "rb") as file:
        start = file.read(16)
    if not start:
        raise CheckpointError(f"{path}: is empty")
    # A safetensors file is the length of its header in 8 bytes, and then the header in JSON.
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    return read_torch(path), None


def read_torch(path: Path) -> dict:
    """Read a dictionary that ``torch.save`` wrote, of tensors, on the CPU, and of plain values.

    Raises:
        OSError: the file cannot be opened.
        CheckpointError: it is no such file, unsafe or damaged.
    """
    with open(path, "rb") as file:
        start = file.read(2)
    # Zip archives (torch.save since 1.6) and pickles (before) begin like this.
    if not start.startswith((b"PK", b"\x80")):
        raise CheckpointError(f"{path}: is neither a safetensors nor a PyTorch file")
    try:
        if start == b"PK":
            _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The first line says it; PyTorch's others advise to load the file unsafely.
        raise CheckpointError(
            f"{path}: refused. It holds more than tensors and plain values, and loading such a "
            f"pickle could run code, or it is damaged ({_reason(error)}). Save its state_dict() "
            "instead"
        ) from None
    except Exception as error:  # a damaged archive fails in any way
        raise CheckpointError(
            f"{path}: cannot be read, it may be truncated ({type(error).__name__}: "
            f"{_reason(error)})"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors, got a {type(content).__name__}"
        )
    return content


def write_torch(content: dict, path: Path) -> None:
    """Write what ``read_torch`` reads, atomically.

    Raises:
        OSError: it cannot be written; an earlier file is then untouched.
    """
    # Not straight into the file: errors of a full disk would be RuntimeErrors that do not say so.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _check_archive(path: Path) -> None:
    """Raise ValueError unless the checksums of a zip archive are right: PyTorch does not look."""
    with zipfile.ZipFile(path) as archive:
        if not any(entry.CRC for entry in archive.infolist()):
            return  # torch.serialization.set_crc32_options(False)
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"wrong checksum of {damaged}")


def _reason(error: Exception) -> str:
    """The line of PyTorch's message that says what was found, without its advice around it."""
    lines = [line.split("WeightsUnpickler error:")[-1].strip() for line in str(error).split("\n")]
    telling = [line for line in lines if re.search(r"unsupported|global", line, re.IGNORECASE)]
    return (telling or lines)[0].split(". Please")[0][:200]


def _read_safetensors(path: Path) -> tuple[Tensors, dict | None]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors, it may be truncated ({error})"
        ) from None
    if _METADATA_KEY not in metadata:
        return tensors, None
    text, checksum = metadata[_METADATA_KEY], metadata.get(_CHECKSUM_KEY)
    if checksum not in (None, _checksum(tensors, text)):
        raise CheckpointError(f"{path}: damaged, its checksum is wrong")
    try:
        metadata = json.loads(text)
        version = metadata["format_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged metadata ({error!r})") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format version {version!r}, this blockdrop_fast reads {FORMAT_VERSION}"
        )
    return tensors, metadata


def _checksum(tensors: Tensors, text: str) -> str:
    checksum = zlib.crc32(text.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        about = f"{key} {tensor.dtype} {tuple(tensor.shape)}"
        checksum = zlib.crc32(about.encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), checksum)
    return f"{checksum:08x}"


def _state_dict(content: Mapping, entries: tuple[str, ...], where: str) -> Tensors:
    """Unwrap a foreign file's content to one state dict, without wrapper prefixes."""
    for entry in entries:
        if isinstance(content.get(entry), Mapping):
            return _state_dict(content[entry], entries, where)
    strange = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if strange or not content:
        raise CheckpointError(
            f"{where}: expected a state dict, or one under {' or '.join(map(repr, entries))}; "
            f"got {_some(f'{key!r}: {type(content[key]).__name__}' for key in strange)}"
        )
    return {_WRAPPER_PREFIX.sub("", str(key)): value for key, value in content.items()}


def _own_part(tensors: Tensors, prefix: str) -> Tensors:
    return {key[len(prefix) :]: t for key, t in tensors.items() if key.startswith(prefix)}


# ------------------------------------------------------------------ public


def locate(path: str | os.PathLike) -> Path:
    """The file of a path, or of the name of a model that comes with the package."""
    path = Path(path)
    shipped = PRETRAINED / f"{path}.safetensors"
    return shipped if not path.exists() and str(path) in pretrained() else path


def pretrained() -> tuple[str, ...]:
    """Names of the models that come with the package; ``load`` and ``load_backbone`` take them."""
    return tuple(sorted(path.stem for path in PRETRAINED.glob("*.safetensors")))


def load_backbone(
    path: str | os.PathLike,
    *,
    layers: tuple[int, ...] | None = None,
    shortcut: ShortcutKind | None = None,
    num_classes: int | None = None,
    normalization: Normalization | None = None,
) -> ResNet:
    """Load a ResNet, its architecture read off the file's keys and shapes.

    Reads our own files; torchvision's ImageNet ResNets, ResNeXts and Wide ResNets, also under
    timm, which names tensors alike; CIFAR ResNets with torchvision-like
    keys (``layer1.0.conv1.weight``), also inside ``state_dict`` and under ``module.``; and the
    ResNet in the BlockDrop authors' ``.t7`` files. Torch files are read with
    ``weights_only=True``.

    Args:
        path: the file, whose content, not its name, tells the format; or one of the names of
            ``pretrained()``.
        layers: expected blocks of each segment.
        shortcut: which of the two CIFAR shortcuts without parameters, which weights do not
            tell. Default: "subsample" if the classifier is called ``linear``, else
            "average_pool".
        num_classes: expected classes.
        normalization: what the network expects its images normalised with. Default: what our
            own files say; ImageNet's for ImageNet networks and CIFAR files with ``linear``;
            the authors' (own values for ResNet-32 on CIFAR-10, else none); else unknown (None).

    Returns:
        The network on the CPU, in train mode as PyTorch's modules are, in the file's dtype.

    Raises:
        OSError: the file cannot be opened.
        CheckpointError: it is no checkpoint, unsafe, damaged, of another architecture, or
            contradicts an argument.
    """
    path = locate(path)
    content, metadata = _read(path)
    overrides = {"layers": layers, "shortcut": shortcut, "num_classes": num_classes}
    if metadata is not None:
        _check_no_cascade(metadata, path)
        return _own_backbone(content, metadata, overrides, normalization, path)
    return _foreign_backbone(content, overrides, normalization, path)


def _foreign_backbone(
    content: Mapping, overrides: Mapping, normalization: Normalization | None, path: Path
) -> ResNet:
    if not any(entry in content for entry in _BACKBONE_ENTRIES) and any(
        isinstance(content.get(entry), Mapping) for entry in _POLICY_ENTRIES
    ):
        raise CheckpointError(f"{path}: holds a policy network but no backbone; use load_policy")
    raw = _state_dict(content, _BACKBONE_ENTRIES, str(path))
    tensors = _translate_network(raw)
    has_linear = "linear.weight" in raw
    inferred = _infer_config(tensors, has_linear, str(path))
    network = _build_network(_override(inferred, overrides, str(path)), tensors, str(path))
    network.normalization = normalization or _foreign_normalization(raw, inferred)
    return network


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


def _own_backbone(
    tensors: Tensors,
    metadata: Mapping,
    overrides: Mapping,
    normalization: Normalization | None,
    path: Path,
) -> ResNet:
    part = _own_part(tensors, "backbone.")
    stored = _own_config(part, metadata, path)
    try:
        saved = metadata["normalization"]
        normalization = normalization or (saved and Normalization.from_dict(saved))
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged metadata ({error!r})") from None
    network = _build_network(_override(stored, overrides, str(path)), part, str(path))
    network.normalization = normalization
    return network


def _own_config(backbone: Tensors, metadata: Mapping, path: Path) -> ResNetConfig:
    """The architecture of the backbone with these weights."""
    try:
        stored = dict(metadata["backbone"])
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged metadata ({error!r})") from None
    return _override(_infer_config(backbone, False, str(path)), stored, str(path))


def load_policy(path: str | os.PathLike) -> AnyPolicy:
    """Load the policy of one of our files or of the authors' ``.t7`` files.

    The authors' files of the curriculum stage hold nothing else; ``load`` takes those that
    hold both networks.

    Raises:
        OSError, CheckpointError: as of ``load_backbone``.
    """
    path = locate(path)
    content, metadata = _read(path)
    if metadata is not None:
        _check_no_cascade(metadata, path)
        return _own_policy(content, metadata, path)
    return _foreign_policy(content, path)


def _check_no_cascade(metadata: Mapping, path: Path) -> None:
    if "cascade" in metadata:
        raise CheckpointError(f"{path}: holds a cascade of networks; use load")


def _foreign_policy(content: Mapping, path: Path) -> PolicyNetwork:
    if not any(isinstance(content.get(entry), Mapping) for entry in _POLICY_ENTRIES):
        raise CheckpointError(
            f"{path}: holds no policy network: no entry "
            f"{' or '.join(map(repr, _POLICY_ENTRIES))}, the entries are {_some(content)}"
        )
    where = f"{path} (policy network)"
    tensors = _translate_policy(_state_dict(content, _POLICY_ENTRIES, where))
    config = _infer_config(tensors, False, where)
    # Not in the file; the two policy networks that the authors have.
    input_pool = 2 if config.stem == "imagenet" else 1
    return PolicyNetwork(_build_network(config, tensors, where), input_pool)


def _own_policy(tensors: Tensors, metadata: Mapping, path: Path) -> AnyPolicy:
    if metadata.get("policy") is None:
        raise CheckpointError(f"{path}: holds no policy network; use load_backbone")
    where = f"{path} (policy network)"
    try:
        stored, menu = metadata["policy"], None
        if stored.get("menu") is not None:
            menu = _own_menu(tensors, stored["menu"])
        if "look" in stored:
            config = _own_config(_own_part(tensors, "backbone."), metadata, path)
            return _own_look(tensors, config, stored["look"], menu, where)
        if "fixed" in stored:
            return FixedPolicy(tensors["policy.keep"])
        if "gates" in stored:
            config = _own_config(_own_part(tensors, "backbone."), metadata, path)
            return _own_gates(tensors, config, stored["gates"], where)
        part = _own_part(tensors, "policy.network.")
        config = _override(_infer_config(part, False, where), dict(stored["network"]), where)
        network = _build_network(config, part, where)
        return PolicyNetwork(network, int(stored["input_pool"]), menu)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: damaged metadata ({error!r})") from None


def _own_look(
    tensors: Tensors, backbone: ResNetConfig, stored: Mapping, menu: Menu | None, where: str
) -> LookPolicy:
    """A head for the file's backbone.

    Raises:
        CheckpointError: its weights are not of such a head.
        KeyError, TypeError, ValueError: it is not what ``save`` writes.
    """
    with torch.device("meta"):
        policy = LookPolicy(backbone, int(stored["after"]), menu, tuple(stored["widths"]))
    _load_strictly(
        policy,
        _own_part(tensors, "policy."),
        f"a head after block {policy.after}, of {len(policy.fc.weight)} outputs, on {backbone}",
        where,
    )
    return policy


def _own_gates(
    tensors: Tensors, backbone: ResNetConfig, stored: Mapping, where: str
) -> GatedPolicy:
    """Gates in the file's backbone; raises as ``_own_look``."""
    kind, options = stored["kind"], dict(stored["options"])
    if kind not in _GATES:
        raise ValueError(f"expected gates out of {_some(_GATES)}, got {kind!r}")
    with torch.device("meta"):
        policy = _GATES[kind](backbone, **options)
    of = f"gates {kind} {options} of {backbone}"
    _load_strictly(policy, _own_part(tensors, "policy."), of, where)
    if isinstance(policy, Exits):
        policy.set_rules(policy.rules)
    return policy


def _own_menu(tensors: Tensors, stored: Mapping) -> Menu:
    """A policy network's menu.

    Raises:
        KeyError, TypeError, ValueError: it is not what ``save`` writes.
    """
    menu = Menu(tensors["policy.menu.sets"])
    prices, usages = (tuple(map(float, stored[name])) for name in ("prices", "usages"))
    table = list(zip(prices, usages, strict=True))
    if any(not (p < q and u > v) for (p, u), (q, v) in pairwise(table)):
        raise ValueError("menu: expected ascending prices and descending usages")
    menu.prices, menu.usages = prices, usages
    if stored["budget"] is not None:
        menu.price(float(stored["budget"]))
        menu.budget = float(stored["budget"])
    return menu


def _own_cascade(tensors: Tensors, metadata: Mapping, path: Path) -> Cascade:
    try:
        stored, rules = list(metadata["cascade"]), tensors["rules"]
        networks = [_own_member(tensors, metadata, n, path) for n in range(len(stored))]
        cascade = Cascade(networks)
        cascade.set_rules(rules)
        surplus = [key for key in tensors if key not in cascade.state_dict()]
        if surplus:
            raise CheckpointError(f"{path}: {len(surplus)} surplus keys: {_some(surplus)}")
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged metadata ({error!r})") from None
    return cascade


def _own_member(tensors: Tensors, metadata: Mapping, n: int, path: Path) -> Member:
    """Network n of a cascade; its policy, if it has one, is a set of blocks."""
    stored, own = metadata["cascade"][n], _own_part(tensors, f"networks.{n}.")
    if isinstance(stored, str):
        if own or stored not in pretrained():
            raise ValueError(f"cascade: expected one of {', '.join(pretrained())}, got {stored!r}")
        return load_any(PRETRAINED / f"{stored}.safetensors")
    fixed = "backbone" in stored
    config = stored["backbone"] if fixed else stored
    backbone = _own_backbone(
        own if fixed else {f"backbone.{key}": one for key, one in own.items()},
        {"backbone": config, "normalization": metadata["normalization"]},
        {},
        None,
        path,
    )
    return BlockDrop(backbone, FixedPolicy(own["policy.keep"])) if fixed else backbone


def load(path: str | os.PathLike) -> BlockDrop | Cascade:
    """Load backbone and policy network from one of our files or the authors' ``.t7`` files.

    Of a file that holds a cascade, that.

    Args:
        path: a file, or one of the names of ``pretrained()``.

    Raises:
        OSError, CheckpointError: as of ``load_backbone``; also if one of the networks is
            absent, or they are of different numbers of blocks.
    """
    path = locate(path)
    content, metadata = _read(path)
    if metadata is not None and "cascade" in metadata:
        return _own_cascade(content, metadata, path)
    if metadata is not None:
        policy = _own_policy(content, metadata, path)
        backbone = _own_backbone(content, metadata, {}, None, path)
    else:
        policy = _foreign_policy(content, path)
        if not isinstance(content.get("resnet"), Mapping):
            raise CheckpointError(
                f"{path}: holds a policy network but no backbone; use load_policy, and "
                "load_backbone for the ResNet that it was trained with"
            )
        backbone = _foreign_backbone(content, {}, None, path)
    try:
        return BlockDrop(backbone, policy)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_any(path: str | os.PathLike) -> BlockDrop | Cascade | ResNet:
    """Load what a file holds: a BlockDrop model or cascade, or a backbone where there is no policy.

    Raises:
        OSError, CheckpointError: as of ``load`` and ``load_backbone``.
    """
    content, metadata = _read(locate(path))
    if metadata is not None:
        has_policy = metadata.get("policy") is not None or "cascade" in metadata
    else:
        has_policy = any(isinstance(content.get(entry), Mapping) for entry in _POLICY_ENTRIES)
    return load(path) if has_policy else load_backbone(path)


def save(
    model: BlockDrop | ResNet | Cascade,
    path: str | os.PathLike,
    networks: Sequence[str] | None = None,
) -> None:
    """Write a BlockDrop model, a bare backbone or a cascade as safetensors, atomically.

    The architectures, what the policy looks at, its menu, and the normalisation of the images go
    into the file's metadata as JSON, so that ``load`` needs nothing else.

    Args:
        model: to write.
        path: of the file.
        networks: of a cascade whose networks come with the package: their names, which are written
            in their place.

    Raises:
        TypeError: ``model`` is none of these.
        ValueError: ``networks`` that are not the cascade's.
        OSError: the file cannot be written; an earlier file at ``path`` is then untouched.
    """
    if networks is not None:
        _check_names(model, networks)
    state = model.state_dict() if isinstance(model, nn.Module) else {}
    if isinstance(model, BlockDrop):
        backbone = model.backbone
        parts = {"backbone": backbone.config.to_dict(), "policy": _policy_metadata(model.policy)}
    elif isinstance(model, ResNet):
        backbone, parts = model, {"backbone": model.config.to_dict(), "policy": None}
        state = {f"backbone.{key}": value for key, value in state.items()}
    elif isinstance(model, Cascade):
        backbone = backbone_of(model.networks[0])
        parts = {"cascade": [_member_metadata(one) for one in model.networks]}
        if networks is not None:
            parts, state = {"cascade": list(networks)}, {"rules": model.rules}
    else:
        raise TypeError(
            f"model: expected a BlockDrop, ResNet or Cascade, got {type(model).__name__}"
        )
    metadata = {
        "format_version": FORMAT_VERSION,
        **parts,
        "normalization": backbone.normalization and backbone.normalization.to_dict(),
    }
    tensors = {
        key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, value in state.items()
    }
    text = json.dumps(metadata)
    about = {_METADATA_KEY: text, _CHECKSUM_KEY: _checksum(tensors, text)}
    with atomic_write(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, about))


def _check_names(model: nn.Module, networks: Sequence[str]) -> None:
    own = list(model.networks) if isinstance(model, Cascade) else []
    same = len(networks) == len(own) and set(networks) <= set(pretrained())
    for one, name in zip(own, networks, strict=True) if same else ():
        shipped = load_any(PRETRAINED / f"{name}.safetensors").state_dict()
        state = one.state_dict()
        same &= shipped.keys() == state.keys()
        same = same and all(torch.equal(shipped[key], state[key].cpu()) for key in shipped)
    if not same:
        raise ValueError(
            f"networks: expected names of the cascade's networks, out of "
            f"{', '.join(pretrained())}, got {list(networks)}"
        )


def _member_metadata(network: Member) -> dict[str, Any]:
    config = backbone_of(network).config.to_dict()
    return {"backbone": config} if isinstance(network, BlockDrop) else config


def _policy_metadata(policy: AnyPolicy) -> dict[str, Any]:
    if isinstance(policy, FixedPolicy):
        return {"fixed": True}
    if isinstance(policy, GatedPolicy):
        (kind,) = (name for name, one in _GATES.items() if isinstance(policy, one))
        options = {name: getattr(policy, name) for name in _GATE_OPTIONS[kind]}
        return {"gates": {"kind": kind, "options": options}}
    menu = policy.menu and {
        name: getattr(policy.menu, name) for name in ("prices", "usages", "budget")
    }
    if isinstance(policy, LookPolicy):
        widths = [conv.out_channels for conv in policy.convs]
        return {"look": {"after": policy.after, "widths": widths}, "menu": menu}
    network = policy.network.config.to_dict()
    return {"network": network, "input_pool": policy.input_pool, "menu": menu}


def init_policy_from_resnet18(policy: PolicyNetwork, path: str | os.PathLike) -> None:
    """Start the ImageNet policy network from a ResNet-18 checkpoint, in place.

    Its stem and blocks take the weights of the ResNet-18's stem and of the first block of each
    segment, as in the authors' code; its head stays as it is.

    Args:
        policy: ``policy_resnet10(...)``, of any device and dtype.
        path: anything that ``load_backbone`` reads: a network with basic blocks of the policy
            network's widths.

    Raises:
        OSError, CheckpointError: as of ``load_backbone``; also if the architectures differ.
    """
    path = Path(path)
    source = load_backbone(path)
    target = policy.network
    for name in ("block", "widths", "stem", "shortcut"):
        found, wanted = getattr(source.config, name), getattr(target.config, name)
        if found != wanted:
            raise CheckpointError(
                f"{path}: cannot initialise the policy network: it has {name}={wanted!r}, the "
                f"file has {name}={found!r}"
            )
    available = source.state_dict()
    taken = {key: available.get(key) for key in target.state_dict() if not key.startswith("fc.")}
    missing = [key for key, value in taken.items() if value is None]
    if missing:
        raise CheckpointError(
            f"{path}: cannot initialise the policy network: no {_some(missing)} in a network of "
            f"layers={source.config.layers}"
        )
    target.load_state_dict(taken, strict=False)
