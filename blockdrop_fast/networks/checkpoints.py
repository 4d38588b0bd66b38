"""Models in files: loading our own and foreign checkpoints, saving our own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockdrop_fast.data.image_sets import Normalization
from blockdrop_fast.networks.blockdrop import AnyPolicy, BlockDrop
from blockdrop_fast.networks.cascade import Cascade, Member, backbone_of
from blockdrop_fast.networks.checkpoint_files import (
    CheckpointError,
    Tensors,
    read,
    some,
    write_safetensors,
)
from blockdrop_fast.networks.exits import Exits
from blockdrop_fast.networks.fixed import FixedPolicy
from blockdrop_fast.networks.foreign_checkpoints import (
    foreign_backbone,
    foreign_policy,
    has_policy,
)
from blockdrop_fast.networks.gated import GatedPolicy
from blockdrop_fast.networks.halting import HaltingPolicy
from blockdrop_fast.networks.look import LookPolicy
from blockdrop_fast.networks.low_cost import LowCostMasks
from blockdrop_fast.networks.menu import Menu
from blockdrop_fast.networks.policy import PolicyNetwork
from blockdrop_fast.networks.resnet import ResNet, ResNetConfig, ShortcutKind
from blockdrop_fast.networks.sequential import SequentialPolicy
from blockdrop_fast.networks.spatial_halting import SpatialHaltingPolicy
from blockdrop_fast.networks.weights import build_network, infer_config, load_strictly, override

PRETRAINED = Path(__file__).parents[1] / "pretrained"

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
    content, metadata = read(path)
    overrides = {"layers": layers, "shortcut": shortcut, "num_classes": num_classes}
    if metadata is not None:
        _check_no_cascade(metadata, path)
        return _own_backbone(content, metadata, overrides, normalization, path)
    return foreign_backbone(content, overrides, normalization, path)


def load_policy(path: str | os.PathLike) -> AnyPolicy:
    """Load the policy of one of our files or of the authors' ``.t7`` files.

    The authors' files of the curriculum stage hold nothing else; ``load`` takes those that
    hold both networks.

    Raises:
        OSError, CheckpointError: as of ``load_backbone``.
    """
    path = locate(path)
    content, metadata = read(path)
    if metadata is not None:
        _check_no_cascade(metadata, path)
        return _own_policy(content, metadata, path)
    return foreign_policy(content, path)


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
    content, metadata = read(path)
    if metadata is not None and "cascade" in metadata:
        return _own_cascade(content, metadata, path)
    if metadata is not None:
        policy = _own_policy(content, metadata, path)
        backbone = _own_backbone(content, metadata, {}, None, path)
    else:
        policy = foreign_policy(content, path)
        if not isinstance(content.get("resnet"), Mapping):
            raise CheckpointError(
                f"{path}: holds a policy network but no backbone; use load_policy, and "
                "load_backbone for the ResNet that it was trained with"
            )
        backbone = foreign_backbone(content, {}, None, path)
    try:
        return BlockDrop(backbone, policy)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_any(path: str | os.PathLike) -> BlockDrop | Cascade | ResNet:
    """Load what a file holds: a BlockDrop model or cascade, or a backbone where there is no policy.

    Raises:
        OSError, CheckpointError: as of ``load`` and ``load_backbone``.
    """
    content, metadata = read(locate(path))
    if metadata is None:
        whole = has_policy(content)
    else:
        whole = metadata.get("policy") is not None or "cascade" in metadata
    return load(path) if whole else load_backbone(path)


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
    normalization = backbone.normalization and backbone.normalization.to_dict()
    tensors = {
        key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, value in state.items()
    }
    write_safetensors(tensors, {**parts, "normalization": normalization}, path)


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
            f"{path}: cannot initialise the policy network: no {some(missing)} in a network of "
            f"layers={source.config.layers}"
        )
    target.load_state_dict(taken, strict=False)


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
    network = build_network(override(stored, overrides, str(path)), part, str(path))
    network.normalization = normalization
    return network


def _own_config(backbone: Tensors, metadata: Mapping, path: Path) -> ResNetConfig:
    """The architecture of the backbone with these weights."""
    try:
        stored = dict(metadata["backbone"])
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged metadata ({error!r})") from None
    return override(infer_config(backbone, False, str(path)), stored, str(path))


def _check_no_cascade(metadata: Mapping, path: Path) -> None:
    if "cascade" in metadata:
        raise CheckpointError(f"{path}: holds a cascade of networks; use load")


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
        config = override(infer_config(part, False, where), dict(stored["network"]), where)
        network = build_network(config, part, where)
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
    load_strictly(
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
        raise ValueError(f"expected gates out of {some(_GATES)}, got {kind!r}")
    with torch.device("meta"):
        policy = _GATES[kind](backbone, **options)
    of = f"gates {kind} {options} of {backbone}"
    load_strictly(policy, _own_part(tensors, "policy."), of, where)
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
            raise CheckpointError(f"{path}: {len(surplus)} surplus keys: {some(surplus)}")
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


def _own_part(tensors: Tensors, prefix: str) -> Tensors:
    return {key[len(prefix) :]: t for key, t in tensors.items() if key.startswith(prefix)}


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
