"""Loading the compiled extension ``blockdrop_fast._C``, or saying why there is none."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MODULE = "blockdrop_fast._C"
REBUILD = "pip install --no-build-isolation <the blockdrop_fast source>"
# Of compiled kernels: raised where the arguments or packed weights of an operator mean something
# else. A checkout's kernels may be older than its Python. Read by setup.py.
INTERFACE = 2
# Written by setup.py: what was asked for, what was built, and why the rest was not.
BUILD_RECORD = Path(__file__).with_name("_build_record.json")


@dataclass(frozen=True)
class ExtensionStatus:
    """Whether the compiled kernels are in use.

    Attributes:
        state: "loaded", "not built" (the package runs on its references, as was to be expected
            from its build) or "failed" (there is an extension, and it could not be loaded).
        reason: why it is not loaded; empty if it is.
        build_info: what the extension says about its build (see csrc/build_info.cpp); empty if
            it is not loaded.
    """

    state: str
    reason: str = ""
    build_info: dict[str, Any] = field(default_factory=dict)

    @property
    def loaded(self) -> bool:
        """True if the compiled kernels are registered."""
        return self.state == "loaded"


def build_record() -> dict[str, Any]:
    """What setup.py wrote down about the build; empty if it never ran for this copy."""
    try:
        return json.loads(BUILD_RECORD.read_text())
    except FileNotFoundError:
        return {}


@functools.cache
def load_extension() -> ExtensionStatus:
    """Load the compiled kernels once; never raises, warns if an extension is there but broken.

    Returns:
        What happened, the same object at every call.
    """
    status = _load()
    if status.state == "failed":
        warnings.warn(
            f"blockdrop_fast runs on its slow reference kernels: {status.reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return status


def extension_status() -> ExtensionStatus:
    """Whether the compiled kernels are in use, and if not, why."""
    return load_extension()


def _load() -> ExtensionStatus:
    record = build_record()
    if importlib.util.find_spec(MODULE) is None:
        reason = record.get("why_no_extension") or f"it was never built; run {REBUILD}"
        return ExtensionStatus("not built", reason)
    if record.get("interface", 1) != INTERFACE:
        reason = f"{MODULE} was built from sources of another version, so rebuild it: {REBUILD}"
        return ExtensionStatus("failed", reason)
    # Not even imported then: torch's C++ interface changes, and not all of it shows when linking.
    built_for = record.get("torch")
    if built_for and _release(built_for) != _release(torch.__version__):
        reason = (
            f"{MODULE} was built for torch {built_for} and torch {torch.__version__} is "
            f"installed, so rebuild it: {REBUILD}"
        )
        return ExtensionStatus("failed", reason)
    try:
        module = importlib.import_module(MODULE)
    except ImportError as error:
        return ExtensionStatus("failed", f"{MODULE} could not be imported ({error})")
    return ExtensionStatus("loaded", build_info=module.build_info())


def _release(version: str) -> str:
    """Without what is local to a build: 2.13.0+cpu is 2.13.0."""
    return version.partition("+")[0]
