"""Builds the compiled extension ``blockdrop_fast._C``; the metadata is in pyproject.toml.

Environment variables:
    BLOCKDROP_BUILD: what to compile.
        unset   CPU kernels if there is a C++ compiler; CUDA kernels too if the installed torch is
                a CUDA build and a matching nvcc is found. A GPU is not needed and not looked for.
        cuda    CPU and CUDA kernels; what is missing is an error.
        cpu     CPU kernels; no compiler is an error.
        none    nothing; torch need not be installed yet, the package runs on its references.
    CXX, CUDA_HOME: the compilers, as torch finds them.
    TORCH_CUDA_ARCH_LIST: GPU architectures, default ``DEFAULT_CUDA_ARCHS`` below. Containers come
            with one set; what is older than ``OLDEST_CUDA_ARCH`` is left out.
    MAX_JOBS: parallel compilations.

Sources are found by folder: csrc/*.cpp, csrc/cpu/*.cpp, csrc/cuda/*.cu. On x86-64, files named
csrc/cpu/*_avx2.cpp and *_avx512.cpp are compiled with the flags in ``ISA_FLAGS``; elsewhere they
are left out. csrc/README.md explains what such files may contain.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import setuptools
from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
PACKAGE = "blockdrop_fast"
RECORD_NAME = "_build_record.json"  # read by blockdrop_fast/_extension.py
# That module cannot be imported here: the package imports torch.
LOADER = (ROOT / PACKAGE / "_extension.py").read_text()
INTERFACE = int(re.search(r"^INTERFACE = (\d+)$", LOADER, re.MULTILINE).group(1))

# sm_90a: the matrix instructions and clusters of Hopper are not in plain sm_90. PTX of 8.0 lets
# newer GPUs compile the kernels when they are loaded.
DEFAULT_CUDA_ARCHS = "8.0+PTX;9.0a"
OLDEST_CUDA_ARCH = (8, 0)  # has matrix products of bfloat16, and copies past the registers
CXX_FLAGS = ["-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
# at::parallel_for is a header that needs OpenMP where it is compiled. It must run on the OpenMP
# library that torch brings and configures (torch.set_num_threads), so none is linked here.
OPENMP_FLAGS = ["-fopenmp"] if sys.platform == "linux" else []
# Python's own flags ask for debug information, most of the extension's size. CFLAGS=-g keeps it.
DEBUG_FLAGS = [] if "-g" in os.environ.get("CFLAGS", "").split() else ["-g0"]
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fvisibility=hidden"]
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": [
        *("-mavx2", "-mfma", "-mf16c", "-mbmi2"),
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    ],
}
NO_TORCH = f"""
{PACKAGE}: torch cannot be imported here, and its headers are needed to compile the kernels.

  If torch is installed, pip built in an isolated environment that does not see it:
      pip install --no-build-isolation .
  (setuptools, wheel, ninja and pybind11 have to be installed then, too.)

  To install without compiled kernels:
      BLOCKDROP_BUILD=none pip install .
"""
OLDEST_SETUPTOOLS = 77  # as in pyproject.toml, which pip ignores under --no-build-isolation
OLD_SETUPTOOLS = f"""
{PACKAGE}: setuptools {setuptools.__version__} is too old to read pyproject.toml, so:
    pip install --upgrade "setuptools>={OLDEST_SETUPTOOLS}" wheel ninja pybind11
"""
BUILD_FAILED = f"""
{PACKAGE}: compiling the extension failed, see above.
  BLOCKDROP_BUILD=cpu   leaves the CUDA kernels out
  BLOCKDROP_BUILD=none  compiles nothing; the package then runs on its PyTorch references
"""


@dataclass(frozen=True)
class BuildChoice:
    """What to compile, and why the rest is not.

    ``cuda_sources`` says which CUDA kernels: see blockdrop_fast/executors/proven.py; ``cuda_archs``
    for which GPUs, as a TORCH_CUDA_ARCH_LIST; ``interface`` which Python they fit: see
    blockdrop_fast/_extension.py.
    """

    torch: str | None
    why_no_extension: str = ""
    why_no_cuda: str = ""
    cuda_sources: str = ""
    cuda_archs: str = ""
    interface: int = INTERFACE

    def write(self, package_dir: Path) -> None:
        """Record the choice beside the installed modules, for ``blockdrop info``."""
        (package_dir / RECORD_NAME).write_text(json.dumps(vars(self), indent=2) + "\n")


def choose_build() -> BuildChoice:
    """Decide from BLOCKDROP_BUILD, torch and the compilers at hand; stop where asked in vain."""
    request = os.environ.get("BLOCKDROP_BUILD") or "auto"
    if request not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"BLOCKDROP_BUILD: expected cpu, cuda, none or unset, got {request!r}")
    if request == "none":
        reason = "it was installed with BLOCKDROP_BUILD=none"
        return BuildChoice(None, reason, reason)
    locate_cuda()
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        raise SystemExit(NO_TORCH) from None

    if compiler_missing := why_no_compiler(cpp_extension):
        if request != "auto":
            raise SystemExit(f"{PACKAGE}: BLOCKDROP_BUILD={request}, but {compiler_missing}")
        warn(f"{compiler_missing}: installing without compiled kernels, on PyTorch references")
        return BuildChoice(torch.__version__, compiler_missing, compiler_missing)
    if request == "cpu":
        return BuildChoice(torch.__version__, why_no_cuda="it was built with BLOCKDROP_BUILD=cpu")
    cuda_missing = why_no_cuda(torch, cpp_extension)
    if cuda_missing and request == "cuda":
        raise SystemExit(f"{PACKAGE}: BLOCKDROP_BUILD=cuda, but {cuda_missing}")
    if cuda_missing:
        warn(f"{cuda_missing}: building the CPU kernels only")
        return BuildChoice(torch.__version__, why_no_cuda=cuda_missing)
    archs = cuda_archs(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS)
    return BuildChoice(torch.__version__, cuda_sources=hash_cuda_sources(), cuda_archs=archs)


def locate_cuda() -> None:
    """Ask nvcc where its toolkit is: torch goes by nvcc's path, which may be a wrapper's."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    dry_run = subprocess.run(command, capture_output=True, text=True).stderr
    if top := re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE):
        os.environ["CUDA_HOME"] = os.path.realpath(top.group(1).strip())


def why_no_compiler(cpp_extension) -> str:
    """Empty if there is a C++ compiler."""
    compiler = shlex.split(cpp_extension.get_cxx_compiler())[0]
    return "" if shutil.which(compiler) else f"no C++ compiler was found ({compiler})"


def why_no_cuda(torch, cpp_extension) -> str:
    """Empty if CUDA kernels can be compiled. Never asks for a GPU: build machines have none."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    nvcc = Path(cpp_extension.CUDA_HOME or "/nonexistent", "bin", "nvcc")
    if not nvcc.exists():
        return "no nvcc was found (set CUDA_HOME to the CUDA toolkit)"
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", release).group(1)
    if found.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is {found}, torch was built with CUDA {torch.version.cuda}"
    return ""


def cuda_archs(requested: str) -> str:
    """The architectures of a TORCH_CUDA_ARCH_LIST that the kernels can be compiled for."""
    archs = requested.replace(";", " ").split()
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", arch):
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: expected versions like 8.0, 9.0a or 8.0+PTX, got {arch!r}"
            )
    kept = [
        arch
        for arch in archs
        if tuple(int(number) for number in re.findall(r"\d+", arch)) >= OLDEST_CUDA_ARCH
    ]
    needed = "the CUDA kernels need {}.{} or later".format(*OLDEST_CUDA_ARCH)
    if not kept:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST: {needed}, got {requested!r}; without them: BLOCKDROP_BUILD=cpu"
        )
    if left_out := [arch for arch in archs if arch not in kept]:
        warn(f"TORCH_CUDA_ARCH_LIST: {needed}; left out: {' '.join(left_out)}")
    return ";".join(kept)


def warn(message: str) -> None:
    """Say it where pip shows it under -v and setup.py always."""
    print(f"\n{'*' * 78}\n* {PACKAGE}: {message}\n{'*' * 78}\n", file=sys.stderr, flush=True)


def sources() -> list[str]:
    """C++ sources that take the common flags, relative to the root as setuptools wants them."""
    found = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    isa_sources = {source for isa in ISA_FLAGS for source in variant_sources(isa)}
    return sorted({str(path.relative_to(ROOT)) for path in found} - isa_sources)


def hash_cuda_sources() -> str:
    """SHA-256 of what the CUDA kernels are compiled from, flags included."""
    found = hashlib.sha256(" ".join(NVCC_FLAGS).encode())
    for pattern in ("csrc/*.h", "csrc/cuda/*.cu", "csrc/cuda/*.cuh", "csrc/cuda/*.h"):
        for path in sorted(ROOT.glob(pattern)):
            found.update(f"\n{path.relative_to(ROOT).as_posix()}\n".encode() + path.read_bytes())
    return found.hexdigest()


def variant_sources(isa: str) -> list[str]:
    """The sources that are compiled for one instruction set only."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/cpu/*_{isa}.cpp"))


def isa_variants() -> list[str]:
    """The instruction sets to compile variants for, on this kind of processor."""
    return list(ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else []


def make_extension(choice: BuildChoice):
    """The extension, as torch's builder takes it."""
    import pybind11
    import torch
    from torch.utils import cpp_extension

    cuda = not choice.why_no_cuda
    flags = CXX_FLAGS + DEBUG_FLAGS + OPENMP_FLAGS
    macros = [
        ("BLOCKDROP_FLAGS", f'"{" ".join(flags)}"'),
        ("BLOCKDROP_ISA_VARIANTS", f'"{" ".join(["portable", *isa_variants()])}"'),
        *((f"BLOCKDROP_HAVE_{isa.upper()}", "1") for isa in isa_variants()),
    ]
    if cuda:
        os.environ["TORCH_CUDA_ARCH_LIST"] = choice.cuda_archs  # torch's builder reads it
        macros += [
            ("BLOCKDROP_WITH_CUDA", "1"),
            ("BLOCKDROP_CUDA_VERSION", f'"{torch.version.cuda}"'),
            ("BLOCKDROP_CUDA_ARCHS", f'"{choice.cuda_archs.replace(";", " ")}"'),
        ]
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    cuda_sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu"))
    extension = kind(
        name=f"{PACKAGE}._C",
        sources=sources() + (cuda_sources if cuda else []),
        define_macros=macros,
        extra_compile_args={"cxx": flags, "nvcc": list(NVCC_FLAGS)},
        # Relinking is decided by these; what to recompile, ninja sees from the #includes.
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*")),
    )
    # torch's headers as system headers, so that warnings are ours.
    torch_headers = str(Path(torch.__file__).parent)
    system = [path for path in extension.include_dirs if path.startswith(torch_headers)]
    others = [path for path in extension.include_dirs if not path.startswith(torch_headers)]
    for compiler_flags in extension.extra_compile_args.values():
        compiler_flags += [
            part for path in (pybind11.get_include(), *system) for part in ("-isystem", path)
        ]
    extension.include_dirs = [str(ROOT / "csrc"), *others]
    return extension


def make_commands(choice: BuildChoice) -> dict[str, type]:
    """The setuptools commands: record the choice, compile variants with flags of their own."""

    class BuildPython(build_py):
        def run(self) -> None:
            super().run()
            package_dir = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib, PACKAGE)
            package_dir.mkdir(parents=True, exist_ok=True)
            choice.write(package_dir)
            if choice.why_no_extension:
                for stale in package_dir.glob("_C.*.so"):
                    stale.unlink()

    commands = {"build_py": BuildPython}
    if choice.why_no_extension:
        return commands

    from torch.utils.cpp_extension import BuildExtension

    class BuildVariants(BuildExtension):
        """setuptools knows flags of an extension, not of a file: compile variants first."""

        def finalize_options(self) -> None:
            super().finalize_options()
            # Also for editable installs, whose default is a fresh temporary folder: ninja
            # compiles again only what changed.
            tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / "build" / f"temp.{tag}")

        def run(self) -> None:
            try:
                super().run()
            except Exception:
                print(BUILD_FAILED, file=sys.stderr, flush=True)
                raise
            if self.inplace:
                choice.write(ROOT / PACKAGE)

        def build_extension(self, ext) -> None:
            for isa in isa_variants():
                flags = {
                    compiler: [*common, *ISA_FLAGS[isa]]
                    for compiler, common in ext.extra_compile_args.items()
                }
                if isa_sources := variant_sources(isa):
                    ext.extra_objects = ext.extra_objects + self.compiler.compile(
                        isa_sources,
                        output_dir=os.path.join(self.build_temp, isa),
                        macros=ext.define_macros,
                        include_dirs=ext.include_dirs,
                        extra_postargs=flags,
                        depends=ext.depends,
                    )
            super().build_extension(ext)

    commands["build_ext"] = BuildVariants
    return commands


def main() -> None:
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(OLD_SETUPTOOLS)
    choice = choose_build()
    setup(
        ext_modules=[] if choice.why_no_extension else [make_extension(choice)],
        cmdclass=make_commands(choice),
    )


if __name__ == "__main__":
    main()
