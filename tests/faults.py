"""Files damaged at random, of every kind that is read, and what reading them gives.

    python -m tests.faults --cases 300 [--kind NAME] [--first N]

Allowed: the content as it was; ValueError or OSError, in one line that names the file; a warning,
where a file is optional. Formats without checksums may give other content, which is counted. A case
is a function of its kind and number, so ``--kind NAME --first N --cases 1`` is case N again.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import random
import resource
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image

import blockdrop_fast as bdf
from blockdrop_fast.data.batches import batches_of, load_dataset
from blockdrop_fast.executors import crossover, measured, proven
from blockdrop_fast.networks.checkpoint_files import read_torch, write_torch
from blockdrop_fast.networks.checkpoints import load_any, load_policy
from blockdrop_fast.networks.menu import Menu
from blockdrop_fast.triton_kernels.config import Config, Problem, read_table
from tests.data.cifar_archives import (
    write_as_python2,
    write_cifar10,
    write_cifar100,
    writer_with_protocol,
)
from tests.networks.state_dicts import authors_keys, authors_policy_keys, torchvision_keys
from train.frontier.evaluation import earlier_results
from train.frontier.systems import read_systems

TINY = bdf.ResNetConfig("basic", (2, 1, 1), (4, 8, 16), "cifar", "average_pool", 3)
MEMORY = 12 << 30  # bytes of address space: what a damaged number asks for fails at once


@dataclass(frozen=True)
class Kind:
    """Files of a kind.

    Attributes:
        write: into a folder; gives the files that are damaged, one in a case.
        read: the folder; gives what can be compared.
        noticed: every damage is noticed, as the format has checksums.
    """

    write: Callable[[Path], list[Path]]
    read: Callable[[Path], object]
    noticed: bool = False


# ------------------------------------------------------------------ what is written


def _policy_network(outputs: int, menu: Menu | None = None) -> bdf.PolicyNetwork:
    config = bdf.ResNetConfig("basic", (1, 1, 1), (4, 8, 16), "cifar", "average_pool", outputs)
    return bdf.PolicyNetwork(bdf.ResNet(config), menu=menu)


def _menu() -> Menu:
    sets = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    menu = Menu(sets)
    menu.prices, menu.usages, menu.budget = (0.1, 0.4), (3.0, 1.5), 2.0
    return menu


def _cascade() -> bdf.Cascade:
    cascade = bdf.Cascade([bdf.ResNet(TINY), bdf.ResNet(TINY)])
    cascade.set_thresholds([0.5])
    return cascade


def _with(policy: torch.nn.Module) -> bdf.BlockDrop:
    return bdf.BlockDrop(bdf.ResNet(TINY), policy)


MODELS = {
    "backbone": lambda: bdf.ResNet(TINY),
    "policy network": lambda: _with(_policy_network(4)),
    "menu": lambda: _with(_policy_network(3, _menu())),
    "look": lambda: _with(bdf.LookPolicy(TINY, 1, _menu())),
    "fixed": lambda: _with(bdf.FixedPolicy(torch.tensor([True, False, True, True]))),
    "sequential": lambda: _with(bdf.SequentialPolicy(TINY)),
    "halting": lambda: _with(bdf.HaltingPolicy(TINY)),
    "exits": lambda: _with(bdf.Exits(TINY, [1, 2])),
    "low cost": lambda: _with(bdf.LowCostMasks(TINY)),
    "spatial halting": lambda: _with(bdf.SpatialHaltingPolicy(TINY)),
    "cascade": _cascade,
}


def _own(make: Callable) -> Kind:
    def write(folder: Path) -> list[Path]:
        bdf.save(make(), folder / "model.safetensors")
        return [folder / "model.safetensors"]

    return Kind(write, lambda folder: load_any(folder / "model.safetensors"), noticed=True)


def _foreign(content: Callable[[], dict], zipped: bool, load: Callable = load_any) -> Kind:
    def write(folder: Path) -> list[Path]:
        path = folder / "net.pth"
        torch.save(content(), path, _use_new_zipfile_serialization=zipped)
        return [path]

    return Kind(write, lambda folder: load(folder / "net.pth"), noticed=zipped)


def _torchvision() -> dict:
    return {"state_dict": torchvision_keys(bdf.ResNet(TINY)), "epoch": 3}


def _authors() -> dict:
    policy = authors_policy_keys(_policy_network(4))
    return {"resnet": authors_keys(bdf.ResNet(TINY)), "agent": policy}


def _timm(folder: Path) -> list[Path]:
    path = folder / "net.safetensors"
    safetensors.torch.save_file(torchvision_keys(bdf.ResNet(TINY)), path, {"format": "pt"})
    return [path]


def _state(folder: Path) -> list[Path]:
    model = _policy_network(4)
    optimizer = torch.optim.Adam(model.parameters())
    state = {
        "epoch": 3,
        "history": json.dumps([{"epoch": 1, "loss": 0.5}]),
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict()],
    }
    write_torch(state, folder / "state.pt")
    return [folder / "state.pt"]


def _cifar(write: Callable, make_folder: Callable = write_cifar10) -> Kind:
    def make(folder: Path) -> list[Path]:
        shutil.rmtree(folder)
        make_folder(folder, write)
        return sorted(folder.iterdir())

    return Kind(make, load_dataset)


def _tree(suffix: str, size: int) -> Kind:
    def write(folder: Path) -> list[Path]:
        generator = np.random.default_rng(0)
        for split in ("train", "test"):
            for name in ("ant", "bee"):
                (folder / split / name).mkdir(parents=True, exist_ok=True)
                pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"0{suffix}")
        return sorted(folder.rglob(f"*{suffix}"))

    def read(folder: Path) -> object:
        dataset = load_dataset(folder)
        splits = (dataset.train, dataset.test)
        return dataset.classes, [list(batches_of(split, 2, workers=0)) for split in splits]

    return Kind(write, read)


def _crossover(folder: Path) -> list[Path]:
    cells = [crossover.Cell(1, keep, {"dense": 0.2, "gather": 0.1}) for keep in (0.2, 0.5)]
    return [crossover.save(TINY, torch.float32, "cpu", cells, folder / "crossover.json")]


def _proven(folder: Path) -> list[Path]:
    entry = {"gpu": "A", "kernels": "0f", "torch": "2.13", "strategies": ["walk"], "checked": "x"}
    measured.write(folder / "proven.json", proven.FORMAT, [], [entry])
    return [folder / "proven.json"]


def _systems(folder: Path) -> list[Path]:
    systems = [
        {"name": "a", "group": "g", "checkpoint": "a.pt", "budget": 3.5, "rival": "h"},
        {"name": "b", "group": "h", "checkpoint": "b.pt", "heuristic": "first_k", "k": 3},
    ]
    (folder / "systems.json").write_text(json.dumps(systems, indent=1))
    return [folder / "systems.json"]


def _frontier(folder: Path) -> list[Path]:
    content = {"evaluations": {"0f": {"accuracy": 0.5, "block_usage": 3.0}}, "systems": []}
    (folder / "frontier.json").write_text(json.dumps(content, indent=1))
    return [folder / "frontier.json"]


def _configurations(folder: Path) -> list[Path]:
    entry = {
        "problem": asdict(Problem(3, 1, 64, 64, 1024, "bfloat16", 8)),
        "config": asdict(Config(32, 64, 32, 4, 3)),
    }
    (folder / "table.json").write_text(json.dumps({"gpu": "A", "entries": [entry]}, indent=1))
    return [folder / "table.json"]


KINDS = {
    **{f"own {name}": _own(make) for name, make in MODELS.items()},
    "state.pt": Kind(_state, lambda folder: read_torch(folder / "state.pt"), noticed=True),
    "torchvision .pth": _foreign(_torchvision, zipped=True),
    "torchvision .th of before 1.6": _foreign(_torchvision, zipped=False),
    "authors' .t7": _foreign(_authors, zipped=False),
    "authors' policy": _foreign(_authors, zipped=True, load=load_policy),
    "timm's .safetensors": Kind(_timm, lambda folder: load_any(folder / "net.safetensors")),
    "CIFAR-10 of Python 2": _cifar(write_as_python2),
    "CIFAR-100 of Python 2": _cifar(write_as_python2, write_cifar100),
    "CIFAR-10, protocol 2": _cifar(writer_with_protocol(2)),
    "CIFAR-10, protocol 5": _cifar(writer_with_protocol(5)),
    "JPEG tree": _tree(".jpg", 32),
    "PNG tree": _tree(".png", 32),
    "tree of large JPEG": _tree(".jpg", 80),
    "crossover.json": Kind(_crossover, lambda folder: crossover._read(folder / "crossover.json")),
    "proven.json": Kind(
        _proven,
        lambda folder: measured.read(folder / "proven.json", proven.FORMAT, proven._check),
    ),
    "configurations": Kind(_configurations, lambda folder: read_table(folder / "table.json")),
    "systems.json": Kind(_systems, lambda folder: read_systems(folder / "systems.json")),
    "frontier.json": Kind(_frontier, lambda folder: earlier_results(folder / "frontier.json")),
}


# ------------------------------------------------------------------ damage and outcome


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The content of a file after a mishap."""
    content, size = bytearray(data), len(data)
    at, length = rng.randrange(size), min(rng.choice([1, 8, 64, 4096]), size)
    mishaps = ["bit", "bit", "bytes", "head", "cut", "none", "lost", "zeros", "more", "moved"]
    mishap = rng.choice(mishaps)
    if mishap == "bit":
        content[at] ^= 1 << rng.randrange(8)
    elif mishap in ("bytes", "head"):
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(min(size, 2000) if mishap == "head" else size)
            content[at] = rng.randrange(256)
    elif mishap in ("cut", "none"):
        del content[at if mishap == "cut" else 0 :]
    elif mishap == "lost":
        del content[at : at + length]
    elif mishap == "zeros":
        content[at : at + length] = bytes(len(content[at : at + length]))
    elif mishap == "more":
        content[at:at] = rng.randbytes(length)
    else:
        to = rng.randrange(size - length + 1)
        at = rng.randrange(size - length + 1)
        content[to : to + length] = content[at : at + length]
    return bytes(content)


def digest(value: object) -> bytes:
    """Of whatever readers give."""
    found = hashlib.sha256()
    _add(found, value)
    return found.digest()


def _add(found: hashlib._Hash, value: object) -> None:
    found.update(type(value).__name__.encode())
    if isinstance(value, torch.Tensor):
        found.update(f"{value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, torch.nn.Module):
        _add(found, [value.state_dict(), repr(value), getattr(value, "normalization", None)])
        menu = getattr(getattr(value, "policy", value), "menu", None)
        _add(found, menu and [menu.sets, menu.prices, menu.usages, menu.budget])
    elif is_dataclass(value):
        _add(found, [getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, dict):
        _add(found, list(value.items()))
    elif isinstance(value, (list, tuple)):
        for one in value:
            _add(found, one)
    else:
        found.update(repr(value).encode())


def outcome(kind: Kind, folder: Path, whole: bytes) -> str:
    """What reading a damaged folder gives: "named", "unharmed", "warned" or "unnoticed".

    Raises:
        AssertionError: what is not allowed.
    """
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            found = digest(kind.read(folder))
        except (ValueError, OSError) as error:
            message = str(error)
            assert "\n" not in message.strip(), f"several lines: {message!r}"
            assert str(folder) in message or message.startswith("systems: "), f"of what? {message}"
            return "named"
    if found == whole:
        return "unharmed"
    if warned:
        return "warned"
    assert not kind.noticed, "damage was not noticed"
    return "unnoticed"


def run(name: str, numbers: range) -> Counter[str]:
    """Damage files of a kind, and count what comes of it.

    Raises:
        AssertionError: something else than is allowed, naming the case.
    """
    kind, counts = KINDS[name], Counter()
    with tempfile.TemporaryDirectory() as parent, torch.random.fork_rng():
        folder = Path(parent) / "given"
        folder.mkdir()
        torch.manual_seed(0)
        files = kind.write(folder)
        whole = digest(kind.read(folder))
        for number in numbers:
            rng = random.Random(f"{name} {number}")
            path = rng.choice(files)
            data = path.read_bytes()
            path.write_bytes(damaged(data, rng))
            try:
                counts[outcome(kind, folder, whole)] += 1
            except Exception as error:
                raise AssertionError(f"{name}, case {number} ({path.name}): {error!r}") from error
            finally:
                path.write_bytes(data)
    return counts


def main() -> None:
    """Run the cases, and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=300, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--kind", choices=KINDS, help="default: all")
    given = parser.parse_args()
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    total, failures = Counter(), []
    for name in [given.kind] if given.kind else KINDS:
        counts, first = Counter(), given.first
        while first < given.first + given.cases:
            try:
                numbers = range(first, given.first + given.cases)
                counts += run(name, numbers)
                break
            except AssertionError as error:
                failures.append(str(error))
                first = int(str(error).split(", case ")[1].split(" ")[0]) + 1
        print(f"{name:32} {dict(counts)}", flush=True)
        total += counts
    print(f"{'all':32} {dict(total)}, {len(failures)} not allowed")
    if failures:
        sys.exit("\n".join(failures[:20]))


if __name__ == "__main__":
    main()
