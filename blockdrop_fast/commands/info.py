"""``blockdrop info``: what is installed, built and active, and why the rest is not."""

from __future__ import annotations

import json as json_module
import platform
from importlib import import_module
from typing import Any

import torch

import blockdrop_fast
from blockdrop_fast import ops, triton_kernels
from blockdrop_fast._extension import build_record, extension_status
from blockdrop_fast.executors import proven
from blockdrop_fast.networks.architectures import by_name


def command(json: bool = False, arch: str | None = None) -> None:
    """Print versions, what was built, what is active, and why the rest is not.

    Args:
        json: print JSON instead of text.
        arch: also what an architecture of ``python -m train pretrain --arch`` has, and what
            executes it on this CPU in float32.
    """
    print(json_module.dumps(info(arch), indent=2) if json else format_info(arch))


def info(arch: str | None = None) -> dict[str, Any]:
    """Versions, build and active parts of this installation.

    Args:
        arch: name of an architecture, see ``architectures.by_name``.

    Returns:
        "versions": name -> version, None where it cannot be imported.
        "build": what the extension says of its build, empty without one.
        "devices": the GPUs that torch can use: name, compute capability, "proven": which of our
            strategies have passed their tests there, "record": where that is written, or why not.
        "parts": kernels by name -> {"active": bool, "detail": what is there, "why_not": the
            reason if it is not active, else empty}.
        "architecture": of ``arch``, where there is one: its blocks, parameters and FLOPs, the
            strategy that executes it on this CPU in float32, and the reason.

    Raises:
        ValueError: no such architecture.
    """
    status = extension_status()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [_device(torch.device("cuda", index)) for index in range(count)]
    found = {} if arch is None else {"architecture": _architecture(arch)}
    return found | {
        "versions": {
            "blockdrop_fast": blockdrop_fast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": _version("numpy"),
            "triton": _version("triton"),
        },
        "build": status.build_info,
        "devices": devices,
        "parts": {
            "PyTorch references": {
                "active": True,
                "detail": "every operator, every device",
                "why_not": "",
            },
            "CPU kernels": {
                "active": status.loaded,
                "detail": _cpu_detail(status.build_info) if status.loaded else "",
                "why_not": status.reason,
            },
            "CUDA kernels": _cuda_part(devices),
            "Triton kernels": _triton_part(devices),
        },
    }


def format_info(arch: str | None = None) -> str:
    """``info(arch)`` as text for people."""
    found = info(arch)
    lines = []
    if arch is not None:
        lines.append("Architecture")
        lines += [f"  {name:<20} {value}" for name, value in found["architecture"].items()]
    lines.append("Versions")
    for name, version in found["versions"].items():
        lines.append(f"  {name:<20} {version or 'not installed'}")
    lines.append("Build of the extension")
    for name, value in found["build"].items():
        if isinstance(value, list):
            value = " ".join(value)
        lines.append(f"  {name:<20} {value or 'none'}")
    if not found["build"]:
        lines.append("  none loaded")
    lines.append("GPUs")
    for device in found["devices"]:
        major, minor = device["capability"]
        lines.append(f"  {device['name']} (compute capability {major}.{minor})")
        lines.append(f"    {_auto(device)}")
    if not found["devices"]:
        lines.append("  none that torch can use")
    lines.append("Parts")
    for name, part in found["parts"].items():
        state = "active" if part["active"] else "not active"
        remark = part["detail"] if part["active"] else part["why_not"]
        lines.append(f"  {name:<20} {state:<11} {remark}")
    return "\n".join(lines)


def _architecture(arch: str) -> dict[str, Any]:
    network = by_name(arch)()
    engine = blockdrop_fast.compile(network)
    return {
        "name": arch,
        "blocks": network.num_blocks,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "flops": float(blockdrop_fast.flops(network)),
        "strategy": engine.strategy,
        "reason": engine.strategy_reason,
    }


def _device(device: torch.device) -> dict[str, Any]:
    proof = proven.load(device)
    return {
        "name": torch.cuda.get_device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "proven": sorted(proof.strategies),
        "record": proof.reason,
    }


def _auto(device: dict[str, Any]) -> str:
    if not device["proven"]:
        return f"strategy='auto' is plain PyTorch: {device['record']}"
    return f"strategy='auto' takes what was measured to be fastest: {device['record']}"


def arch_runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code built for an entry of TORCH_CUDA_ARCH_LIST runs on a GPU.

    Args:
        arch: such as "8.0", "9.0a" (that architecture only) or "8.0+PTX" (also all later ones).
        capability: the GPU's compute capability.
    """
    version, _, ptx = arch.partition("+")
    major, minor = (int(number) for number in version.rstrip("af").split("."))
    if version.endswith("a"):
        return (major, minor) == capability
    if version.endswith("f") or not ptx:
        return major == capability[0] and minor <= capability[1]
    return (major, minor) <= capability


def _cpu_detail(build_info: dict[str, Any]) -> str:
    variants = ", ".join(build_info.get("isa_variants", []))
    try:
        return f"variants: {variants}; in use: {ops.walk_isa()}"
    except (ValueError, RuntimeError) as error:  # BLOCKDROP_CPU_ISA asks for what there is not
        return f"variants: {variants}; {error}"


def _triton_part(devices: list[dict[str, Any]]) -> dict[str, Any]:
    # Devices are numbered as torch numbers them.
    reasons = [triton_kernels.why_not(torch.device("cuda", index)) for index in range(len(devices))]
    runnable = [
        device["name"] for device, reason in zip(devices, reasons, strict=True) if not reason
    ]
    why_not = "" if runnable else (reasons[0] if reasons else triton_kernels.why_not())
    return {"active": bool(runnable), "detail": ", ".join(runnable), "why_not": why_not}


def _cuda_part(devices: list[dict[str, Any]]) -> dict[str, Any]:
    status = extension_status()
    archs = status.build_info.get("cuda_archs", [])
    runnable = [
        device["name"]
        for device in devices
        if any(arch_runs_on(arch, tuple(device["capability"])) for arch in archs)
    ]
    if not status.loaded:
        reason = status.reason
    elif not archs:
        reason = build_record().get("why_no_cuda") or "the extension was built without CUDA"
    elif not devices:
        reason = "torch finds no GPU"
    elif not runnable:
        reason = f"built for {' '.join(archs)}, which none of the GPUs runs"
    else:
        reason = ""
    return {"active": bool(runnable), "detail": ", ".join(runnable), "why_not": reason}


def _version(module: str) -> str | None:
    try:
        return import_module(module).__version__
    except ImportError:
        return None
