"""The order of the package's wings: a module imports from its own wing and from those below it.

Imports are read from the source, also those within functions and under ``if TYPE_CHECKING``.
docs/architecture.md says what is in each wing.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import blockdrop_fast

PACKAGE = "blockdrop_fast"
INSTALLED = Path(blockdrop_fast.__file__).parents[1]  # the checkout, or where a wheel went
TESTS = Path(__file__).parent
# From the top down. What stands in no folder, but for the engine, is the bottom.
WINGS = (
    "commands",
    "measure",
    "engine",
    "executors",
    "ops",
    "triton_kernels",
    "networks",
    "data",
    "root helpers",
)
OUTSIDE = ("train", "benchmarks", "tests", "examples")  # may import the package, not the reverse


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    imported: str


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_package(root: Path) -> tuple[dict[str, Path], list[Import]]:
    """All modules below ``root / PACKAGE``, and what each imports: modules by their full names."""
    modules = {module_name(path, root): path for path in sorted((root / PACKAGE).rglob("*.py"))}
    known = {*modules, f"{PACKAGE}._C"}  # the compiled extension is one of the root helpers
    imports = []
    for module, path in modules.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
                # Each name is a module of that package, or is defined in it.
                names = {
                    full if (full := f"{base}.{alias.name}") in known else base
                    for alias in node.names
                }
            else:
                continue
            imports += [Import(module, node.lineno, name) for name in sorted(names)]
    return modules, imports


def wing(module: str) -> str:
    """The wing of a module, or the outermost folder of what is not the package's."""
    outermost, *inner = module.split(".")
    if outermost != PACKAGE:
        return outermost
    if not inner:
        return "measure"  # what __init__ imports, and all below
    return inner[0] if inner[0] in WINGS else "root helpers"


def wrong_imports(root: Path) -> list[str]:
    """What is imported from above or from outside, as ``file:line: which may not import what``."""
    modules, imports = read_package(root)
    found = []
    for one in imports:
        if one.module == PACKAGE:
            continue
        importing, imported = wing(one.module), wing(one.imported)
        if imported in OUTSIDE or (
            imported in WINGS and WINGS.index(imported) < WINGS.index(importing)
        ):
            place = f"{modules[one.module].relative_to(root)}:{one.line}"
            found.append(f"{place}: {importing} may not import {one.imported} ({imported})")
    return found


def cycle(root: Path) -> str:
    """A ring of modules that import each other, "" if there is none."""
    modules, imports = read_package(root)
    graph = {module: set() for module in modules}
    for one in imports:
        if one.imported in modules and one.imported != one.module:
            graph[one.module].add(one.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " imports ".join(reversed(error.args[1]))
    return ""


def test_imports_point_downwards():
    assert not (wrong := wrong_imports(INSTALLED)), "\n".join(wrong)


def test_no_cycles():
    assert cycle(INSTALLED) == ""


def test_tests_do_not_import_tests():
    """What several need is in modules of its own, such as random_networks.py."""
    found = []
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            found += [
                f"{path.relative_to(TESTS.parent)}:{node.lineno}: {name}"
                for name in names
                if name.startswith("tests.") and ".test_" in name
            ]
    assert not found, "\n".join(found)


# ------------------------------------------------------------------ the test itself


@pytest.fixture
def write(tmp_path):
    """Writes a made-up package, from sources by path; all folders above them become packages."""

    def write(**sources: str) -> Path:
        for name, source in sources.items():
            path = tmp_path / PACKAGE / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        for folder in {path.parent for path in tmp_path.rglob("*.py")}:
            (folder / "__init__.py").touch()
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("from blockdrop_fast.engine import compile\n", 1),
        ("import torch\nimport blockdrop_fast.engine\n", 2),
        ("from blockdrop_fast import engine\n", 1),
        ("from ..engine import compile\n", 1),
        ("from .. import engine\n", 1),
        ("def f():\n    from blockdrop_fast.engine import compile\n", 2),
        ("if TYPE_CHECKING:\n    from blockdrop_fast.engine import compile\n", 2),
    ],
)
def test_finds_what_points_upwards(write, source, line):
    root = write(ops__walk=source, engine="from blockdrop_fast.ops import walk\n")
    place = f"{PACKAGE}/ops/walk.py:{line}"
    assert wrong_imports(root) == [
        f"{place}: ops may not import {PACKAGE}.engine (engine)",
    ]


@pytest.mark.parametrize(
    ("source", "imported"),
    [
        ("import train.loop\n", "train.loop (train)"),
        ("def f():\n    from benchmarks import gpu\n", "benchmarks (benchmarks)"),
    ],
)
def test_finds_what_comes_from_outside(write, source, imported):
    (found,) = wrong_imports(write(commands__cli=source))
    assert found.endswith(f": commands may not import {imported}")


def test_the_package_itself_is_for_commands_only(write):
    """Its ``__init__`` imports all wings but theirs."""
    root = write(commands__cli="import blockdrop_fast\n", ops__plan="import blockdrop_fast\n")
    (found,) = wrong_imports(root)
    assert found.endswith(f"ops may not import {PACKAGE} (measure)")


def test_helpers_import_no_wing(write):
    (found,) = wrong_imports(write(files="from .data import batches\n", data__batches=""))
    assert found.endswith(f"root helpers may not import {PACKAGE}.data.batches (data)")


def test_downwards_and_beside_are_fine(write):
    root = write(
        ops__walk="import torch\nfrom . import plan\n",
        ops__plan="def f():\n    from blockdrop_fast.triton_kernels import config\n",
        triton_kernels__config="from .. import files\nimport triton\n",
        files="import training\n",
    )
    assert wrong_imports(root) == []
    assert cycle(root) == ""


def test_finds_cycles(write):
    root = write(ops__a="def f():\n    from . import b\n", ops__b="from .a import f\n")
    found = cycle(root)
    assert found.count(" imports ") == 2
    assert f"{PACKAGE}.ops.a imports {PACKAGE}.ops.b" in found
