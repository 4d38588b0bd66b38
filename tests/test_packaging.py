"""setup.py: what it builds, what it refuses, and that a build without kernels works."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# What setup.py is run on; the build writes next to it, so tests work on a copy.
BUILD_INPUTS = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE")


@pytest.fixture
def source_tree(tmp_path) -> Path:
    tree = tmp_path / "source"
    tree.mkdir()
    for name in BUILD_INPUTS:
        shutil.copy(ROOT / name, tree / name)
    (tree / "README.md").write_text("The text does not matter here.\n")
    built = shutil.ignore_patterns("*.so", "__pycache__", "_build_record.json")
    for folder in ("blockdrop_fast", "csrc"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=built)
    return tree


def run(tree: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key != "BLOCKDROP_BUILD"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


# Runs setup.py as an isolated build would: torch is absent.
WITHOUT_TORCH = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
RUN_SETUP = "runpy.run_path('setup.py', run_name='__main__')"


def test_install_without_kernels_runs_on_references(source_tree, tmp_path):
    target = tmp_path / "installed"
    record = Path("blockdrop_fast", "executors", "gpus", "some-gpu", "proven.json")
    (source_tree / record).parent.mkdir()
    (source_tree / record).write_text("{}")
    result = run(
        source_tree,
        *("-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"),
        *("--target", str(target), "."),
        BLOCKDROP_BUILD="none",
    )
    assert result.returncode == 0, result.stderr
    assert not list(target.rglob("*.so"))
    assert (target / record).exists()
    code = (
        # An editable install of this environment would offer its own _C for the missing one.
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        # These belong to extras.
        "sys.modules.update(dict.fromkeys(['tyro', 'matplotlib', 'tqdm', 'tensorboard']))\n"
        "import torch, blockdrop_fast\n"
        "from blockdrop_fast import ops\n"
        "from blockdrop_fast.commands.info import info\n"
        "print(blockdrop_fast.__file__)\n"
        "print(ops.plan(torch.ones(3, 2, dtype=torch.bool))[1].tolist())\n"
        "print(info()['parts']['CPU kernels']['why_not'])\n"
    )
    result = run(tmp_path, "-c", code, PYTHONPATH=str(target))
    assert result.returncode == 0, result.stderr
    path, counts, why_not = result.stdout.splitlines()
    assert path.startswith(str(target))
    assert counts == "[3, 3]"
    assert "BLOCKDROP_BUILD=none" in why_not
    (metadata,) = target.glob("*.dist-info/METADATA")
    requires = re.findall(r"(?m)^Requires-Dist: ([\w-]+)[^;\n]*$", metadata.read_text())
    assert sorted(requires) == ["Pillow", "numpy", "safetensors", "scikit-learn", "torch"]


def test_no_torch_names_the_remedy(source_tree):
    result = run(source_tree, "-c", WITHOUT_TORCH + RUN_SETUP, "setup.py", "--version")
    assert result.returncode != 0
    assert "--no-build-isolation" in result.stderr
    assert "BLOCKDROP_BUILD=none" in result.stderr


def test_no_torch_is_fine_without_kernels(source_tree):
    result = run(
        source_tree,
        *("-c", WITHOUT_TORCH + RUN_SETUP, "setup.py", "--version"),
        BLOCKDROP_BUILD="none",
    )
    assert result.returncode == 0, result.stderr


def test_cuda_builds_record_the_sources_of_their_kernels(source_tree):
    code = (
        "import setup; setup.why_no_cuda = lambda *_: ''; print(setup.choose_build().cuda_sources)"
    )

    def hash_now() -> str:
        return run(source_tree, "-c", code).stdout.strip()

    before = hash_now()
    assert len(before) == 64
    (source_tree / "csrc" / "cuda" / "NOTES.md").write_text("Only notes.\n")
    (source_tree / "csrc" / "cpu" / "plan.cpp").write_text("// of the CPU\n")
    assert hash_now() == before
    with open(source_tree / "csrc" / "cuda" / "plan.cu", "a") as file:
        file.write("// changed\n")
    assert hash_now() != before


def test_unknown_request_is_refused(source_tree):
    result = run(source_tree, "setup.py", "--version", BLOCKDROP_BUILD="gpu")
    assert result.returncode != 0
    assert "BLOCKDROP_BUILD: expected cpu, cuda, none or unset, got 'gpu'" in result.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build here")
def test_asking_for_cuda_in_vain_is_an_error(source_tree):
    result = run(source_tree, "setup.py", "--version", BLOCKDROP_BUILD="cuda")
    assert result.returncode != 0
    assert "is a build without CUDA" in result.stderr


@pytest.mark.parametrize(("requested", "archs", "left_out"), [
    ("8.0+PTX;9.0a", "8.0+PTX;9.0a", None),
    ("7.5 8.0 8.6 9.0 10.0+PTX", "8.0;8.6;9.0;10.0+PTX", "left out: 7.5\n"),
    ("5.2;7.0;7.5+PTX;12.0f", "12.0f", "left out: 5.2 7.0 7.5+PTX\n"),
])  # fmt: skip
def test_old_architectures_are_left_out(requested, archs, left_out, capsys):
    """Containers come with TORCH_CUDA_ARCH_LIST set, and 7.5 in it."""
    assert runpy.run_path(ROOT / "setup.py")["cuda_archs"](requested) == archs
    said = capsys.readouterr().err
    assert left_out in said if left_out else not said


@pytest.mark.parametrize(("requested", "message"), [
    ("7.0 7.5+PTX", "CUDA kernels need 8.0 or later, got '7.0 7.5.PTX'; .* BLOCKDROP_BUILD=cpu"),
    ("8.0;Hopper", "expected versions like 8.0, 9.0a or 8.0.PTX, got 'Hopper'"),
])  # fmt: skip
def test_no_architecture_left_is_an_error(requested, message):
    with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST: .*{message}"):
        runpy.run_path(ROOT / "setup.py")["cuda_archs"](requested)


def test_gpu_build_is_for_the_gpu_at_hand(tmp_path):
    """Whatever TORCH_CUDA_ARCH_LIST was set to; the Python it runs tells of its calls."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\n[ "$1" = .ci/gpu_extension.py ] && echo 9.0a || '
        'echo "$TORCH_CUDA_ARCH_LIST, $BLOCKDROP_BUILD: $*"'
    )
    python.chmod(0o755)
    environment = {"PYTHON": str(python), "TORCH_CUDA_ARCH_LIST": "7.5 8.0", "PATH": os.defpath}
    script = ROOT / ".ci" / "gpu-build"
    done = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "9.0a, cuda: setup.py -q build_ext --inplace" in done.stdout


def test_no_compiler_installs_with_a_warning(source_tree):
    result = run(source_tree, "setup.py", "build", CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler was found (no-such-compiler)" in result.stderr
    (record,) = source_tree.glob("build/lib*/blockdrop_fast/_build_record.json")
    assert "no-such-compiler" in json.loads(record.read_text())["why_no_extension"]


def test_no_compiler_is_an_error_where_kernels_were_asked_for(source_tree):
    result = run(source_tree, "setup.py", "build", BLOCKDROP_BUILD="cpu", CXX="no-such-compiler")
    assert result.returncode != 0
    assert "BLOCKDROP_BUILD=cpu, but no C++ compiler was found" in result.stderr


def test_code_that_does_not_compile_stops_the_build(source_tree):
    for source in source_tree.glob("csrc/**/*.cpp"):
        source.unlink()
    (source_tree / "csrc" / "broken.cpp").write_text("this is not C++\n")
    result = run(source_tree, "setup.py", "build", BLOCKDROP_BUILD="cpu")
    assert result.returncode != 0
    assert "BLOCKDROP_BUILD=none" in result.stderr


def test_source_archive_has_the_kernels(source_tree):
    result = run(source_tree, "setup.py", "-q", "sdist", BLOCKDROP_BUILD="none")
    assert result.returncode == 0, result.stderr
    (archive,) = source_tree.glob("dist/*.tar.gz")
    names = subprocess.run(["tar", "tzf", archive], capture_output=True, text=True).stdout
    for name in ("csrc/build_info.cpp", "csrc/cpu/plan.cpp", "csrc/cuda/plan.cu", "csrc/plan.h"):
        assert name in names
    assert ".so" not in names


VARIANT = """
#include <cstdint>
namespace blockdrop_fast {
int %s_vector_bytes() {
#if defined(__AVX512F__)
  return 64;
#elif defined(__AVX2__)
  return 32;
#else
  return 16;
#endif
}
}  // namespace blockdrop_fast
"""
# Uses Python's C interface alone, so that this compiles in a second.
MODULE = """
#include <Python.h>
namespace blockdrop_fast { int avx2_vector_bytes(); int avx512_vector_bytes();
int portable_vector_bytes(); }
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr,
                                 nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "avx2", blockdrop_fast::avx2_vector_bytes());
  PyModule_AddIntConstant(module, "avx512", blockdrop_fast::avx512_vector_bytes());
  PyModule_AddIntConstant(module, "portable", blockdrop_fast::portable_vector_bytes());
  return module;
}
"""


@pytest.mark.skipif(
    os.uname().machine != "x86_64" or shutil.which("c++") is None, reason="needs x86-64 and c++"
)
def test_variants_are_compiled_for_their_instruction_set(source_tree):
    shutil.rmtree(source_tree / "csrc")
    (source_tree / "csrc" / "cpu").mkdir(parents=True)
    for isa in ("portable", "avx2", "avx512"):
        (source_tree / "csrc" / "cpu" / f"probe_{isa}.cpp").write_text(VARIANT % isa)
    (source_tree / "csrc" / "module.cpp").write_text(MODULE)
    result = run(source_tree, "setup.py", "-q", "build_ext", "--inplace", BLOCKDROP_BUILD="cpu")
    assert result.returncode == 0, result.stderr
    code = (
        "import torch, importlib.util, glob\n"
        "spec = importlib.util.spec_from_file_location('_C', glob.glob('blockdrop_fast/_C.*')[0])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "print(module.portable, module.avx2, module.avx512)\n"
    )
    result = run(source_tree, "-c", code)
    assert result.stdout.split() == ["16", "32", "64"], result.stderr
