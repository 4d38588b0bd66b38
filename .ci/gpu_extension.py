"""Finds the compiled extension that fits this machine with a GPU: .ci/gpu-build runs this.

The one in place is taken if it fits, else the one in build/gpu-extension/, which
`make gpu-extension` leaves there on any machine with nvcc. Prints the GPU's architecture if
neither fits, so that one has to be compiled, and nothing otherwise; why is on standard error.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "blockdrop_fast"
BROUGHT = ROOT / "build" / "gpu-extension"
RECORD = "_build_record.json"
LIBRARY = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
LOAD = """
from blockdrop_fast._extension import extension_status

status = extension_status()
if not status.build_info.get("cuda"):
    print(status.reason or "no CUDA kernels")
"""


def why_not(folder: Path, torch_version: str, arch: str, cuda_sources: str) -> str:
    """Why the extension in a folder was not built for here, from its record; empty if it was.

    Args:
        folder: with the extension and its record.
        torch_version, arch: of this machine: 2.11.0+cu130, 9.0a.
        cuda_sources: the hash of this tree's.
    """
    if not (folder / LIBRARY).exists():
        others = ", ".join(sorted(path.name for path in folder.glob("_C.*"))) or "no extension"
        return f"expected {LIBRARY}, found {others}"
    try:
        record = json.loads((folder / RECORD).read_text())
        torch_built, sources = record["torch"], record["cuda_sources"]
        archs = record["cuda_archs"].replace("+PTX", "").split(";")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return f"its {RECORD} does not say what it was built for ({type(error).__name__}: {error})"
    if sources != cuda_sources:
        return "it was built from other CUDA sources"
    if torch_built.split("+")[0] != torch_version.split("+")[0]:
        return f"it was built for torch {torch_built}, here is {torch_version}"
    if arch not in archs:
        return f"it was built for {' '.join(archs)}, this GPU is {arch}"
    return ""


def why_not_loaded() -> str:
    """Why the extension in place does not load; empty if it does, with CUDA kernels."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD], cwd=ROOT, capture_output=True, text=True
    )
    # A library that is missing, or too old, may end the process as well.
    return (done.stdout if done.returncode == 0 else done.stderr).strip()


def place(torch_version: str, arch: str, cuda_sources: str) -> bool:
    """Put an extension in place that fits; False if there is none."""
    say = lambda text: print(f"gpu-build: {text}", file=sys.stderr)  # noqa: E731
    built_for = (torch_version, arch, cuda_sources)
    if not (why_not(PACKAGE, *built_for) or why_not_loaded()):
        return True
    if not BROUGHT.exists():
        return False
    reason = why_not(BROUGHT, *built_for)
    if not reason:
        for name in (LIBRARY, RECORD):
            shutil.copy(BROUGHT / name, PACKAGE / name)
        reason = why_not_loaded()
        if not reason:
            say(f"took {BROUGHT.relative_to(ROOT)}")
            return True
        for name in (LIBRARY, RECORD):
            (PACKAGE / name).unlink()
    say(f"{BROUGHT.relative_to(ROOT)} does not fit, compiling: {reason}")
    return False


def main() -> int:
    import torch

    sys.path.insert(0, str(ROOT))
    from setup import hash_cuda_sources

    if not torch.cuda.is_available():
        print("gpu-build: torch finds no GPU here", file=sys.stderr)
        return 1
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}.{minor}{'a' if major >= 9 else ''}"
    if not place(torch.__version__, arch, hash_cuda_sources()):
        print(arch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
