"""What the fuzzer calls with: models, and right and wrong arguments drawn at random."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import random
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import blockdrop_fast as bdf
from blockdrop_fast.executors.walk_half import WalkHalfExecutor
from blockdrop_fast.networks.folding import fold_network
from tests.random_networks import (
    BOTTLENECK,
    CIFAR,
    CUSTOM,
    GATED,
    NARROWER,
    keep_half,
    make_gated_model,
    make_images,
    make_look_model,
    make_menu_policy,
    make_model,
    make_network,
    make_policy,
    random_images,
)

SETS = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 1, 1]]).bool()
ALLOWED = (TypeError, ValueError)

# ------------------------------------------------------------------ models


def _cascade() -> bdf.Cascade:
    cascade = bdf.Cascade([make_network(CIFAR, seed) for seed in range(3)]).eval()
    cascade.set_thresholds([0.2, 0.3])
    return cascade


def _fixed() -> bdf.BlockDrop:
    keep = torch.tensor([True, False, True, False, True])
    return bdf.BlockDrop(make_network(CIFAR), bdf.FixedPolicy(keep)).eval()


def _menu() -> bdf.BlockDrop:
    policy = make_menu_policy(SETS, make_images(CIFAR, 64))
    return bdf.BlockDrop(make_network(CIFAR), policy).eval()


def _imagenet_policy() -> bdf.BlockDrop:
    config = bdf.ResNetConfig("basic", (1, 1), (32, 64), "imagenet", "projection", 5)
    policy = bdf.PolicyNetwork(make_network(config, 1), input_pool=2).eval()
    keep_half(policy, make_images(BOTTLENECK, 64))
    return bdf.BlockDrop(make_network(BOTTLENECK), policy).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "backbone": lambda: make_network(CIFAR),
    "bottleneck": lambda: make_network(BOTTLENECK),
    "narrower": lambda: make_network(NARROWER),
    **{name: lambda config=config: make_network(config) for name, config in CUSTOM.items()},
    "policy": lambda: make_model(CIFAR)[0],
    "policy of a bottleneck": lambda: make_model(BOTTLENECK)[0],
    "policy of its own stem": _imagenet_policy,
    "menu": _menu,
    "fixed": _fixed,
    "look": lambda: make_look_model()[0],
    "look, menu": lambda: make_look_model(sets=SETS)[0],
    **{kind: lambda kind=kind: make_gated_model(kind)[0] for kind in GATED},
    "cascade": _cascade,
}


@functools.cache
def model_of(name: str) -> nn.Module:
    return MODELS[name]()


@functools.cache
def engine_of(name: str, dtype: torch.dtype, strategy: str) -> bdf.Engine | None:
    """None where a model, a precision and a strategy do not go together."""
    try:
        return bdf.compile(model_of(name), dtype=dtype, strategy=strategy)
    except ALLOWED:
        return None


@functools.cache
def in_dtype(name: str, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model_of(name)).to(dtype)


def config_of(name: str) -> bdf.ResNetConfig:
    model = model_of(name)
    if isinstance(model, bdf.Cascade):
        return model.networks[0].config
    return (model.backbone if isinstance(model, bdf.BlockDrop) else model).config


# ------------------------------------------------------------------ tensors


def is_plain(tensor: Tensor) -> bool:
    special = tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested
    return not (special or tensor.is_meta)


def strange(rng: random.Random, tensor: Tensor) -> object:
    """Something else than a call expects in the place of a tensor."""
    if not is_plain(tensor):
        return tensor  # strange already
    choices: list[Callable[[], object]] = [
        lambda: None,
        lambda: tensor.tolist() if tensor.numel() < 1000 else [],
        lambda: tensor.resolve_neg().numpy() if tensor.dtype != torch.bfloat16 else "tensor",
        lambda: tensor.to("meta"),
        lambda: tensor.to_sparse() if tensor.numel() else None,
        lambda: tensor.unsqueeze(0),
        lambda: tensor[0] if tensor.ndim and len(tensor) else tensor.new_zeros(0),
        lambda: tensor.flatten(),
        lambda: tensor.to(rng.choice([torch.int64, torch.uint8, torch.float64, torch.float16])),
        lambda: tensor.to(torch.complex64),
        lambda: tensor[..., :-1] if tensor.ndim else None,
        lambda: tensor[:0] if tensor.ndim else tensor,
        lambda: torch.cat([tensor, tensor], rng.randrange(tensor.ndim)) if tensor.ndim else None,
        lambda: tensor.new_zeros(tensor.shape[:-1] + (0,)),
        lambda: tensor.new_zeros(()),
        lambda: torch.nested.nested_tensor([tensor.float()]) if tensor.numel() else None,
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        lambda: tensor.float().to_mkldnn() if tensor.ndim and tensor.numel() else None,
        lambda: tensor.flatten(1).to_sparse_csr() if tensor.ndim > 1 and tensor.numel() else "",
        lambda: tensor.new_zeros(1).expand(2**40),
        lambda: tensor.new_zeros(0, 3, 2**40, 4),
    ]
    return rng.choice(choices)()


def valued(rng: random.Random, tensor: Tensor) -> Tensor:
    """The tensor with other values, of which NaN and infinity are wrong ones."""
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    kind = rng.choice(["zero", "denormal", "small", "large", "huge", "nan", "inf", "one huge"])
    scales = {"zero": 0.0, "denormal": 1e-41, "small": 1e-20, "large": 1e4, "huge": 1e30}
    if kind in scales:
        return tensor * scales[kind]
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    value = {"nan": float("nan"), "inf": float("-inf"), "one huge": 3e38}[kind]
    tensor.view(-1)[rng.randrange(tensor.numel())] = value
    return tensor


def laid_out(rng: random.Random, tensor: Tensor) -> Tensor:
    """The same values in another layout."""
    kind = rng.choice(["as is", "last", "steps", "offset", "turned", "negative", "parameter"])
    if kind == "last" and tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if kind == "steps" and tensor.ndim:
        room = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1)
        room[..., 1::2] = tensor
        return room[..., 1::2]
    if kind == "offset":
        room = tensor.new_zeros(tensor.numel() + 3)
        room[3:] = tensor.reshape(-1)
        return room[3:].view(tensor.shape)
    if kind == "turned" and tensor.ndim > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "negative" and tensor.is_floating_point():
        return torch._neg_view(-tensor)
    if kind == "parameter" and tensor.is_floating_point():
        return nn.Parameter(tensor.clone())
    return tensor


def given_images(rng: random.Random, name: str, dtype: torch.dtype) -> object:
    """Images for a model, mostly such as it takes."""
    config = config_of(name)
    batch = rng.choice([0, 1, 1, 2, 3, 5, 9, rng.choice([17, 33, 150])])
    if config.stem == "imagenet":
        size = rng.choice([(24, 32), (1, 1), (7, 33), (32, 32), (40, 16)])
    else:
        size = rng.choice([(8, 12), (4, 4), (32, 32), (12, 8), (36, 4), (6, 10)])
    if rng.random() < 0.1:
        size = (rng.randrange(40), rng.randrange(40))
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    images = torch.randn(batch, 3, *size, generator=generator).to(dtype)
    if batch and rng.random() < 0.1:
        images = images[:1].expand(batch, -1, -1, -1)
    if rng.random() < 0.2:
        images = valued(rng, images)
    if rng.random() < 0.5:
        images = laid_out(rng, images)
    return strange(rng, images.detach()) if rng.random() < 0.12 else images


def batch_of(images: object) -> int:
    if not isinstance(images, Tensor) or images.is_nested or not images.ndim:
        return 1
    return min(len(images), 1000)


def given_decisions(rng: random.Random, batch: int, blocks: int, sets: int | None = None) -> object:
    shape = (batch, blocks) if sets is None else (sets, batch, blocks)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    share = rng.choice([0.0, 0.2, 0.5, 0.9, 1.0])
    decisions = torch.rand(*shape, generator=generator) < share
    if batch and rng.random() < 0.1:
        decisions = decisions[..., :1, :].expand(shape)
    if rng.random() < 0.3:
        kinds = [torch.uint8, torch.int64, torch.float32, torch.float16, torch.int8]
        decisions = decisions.to(rng.choice(kinds))
    if rng.random() < 0.3:
        decisions = laid_out(rng, decisions)
    if rng.random() < 0.08 and decisions.numel() and decisions.dtype != torch.bool:
        decisions = decisions.detach().clone(memory_format=torch.contiguous_format)
        wrong = [2, -1, float("nan"), 0.5] if decisions.is_floating_point() else [2, -1, 7]
        decisions.view(-1)[rng.randrange(decisions.numel())] = rng.choice(wrong)
    return strange(rng, decisions.detach()) if rng.random() < 0.08 else decisions


def surroundings(rng: random.Random, stack: ExitStack) -> str:
    """Enter a mode that a caller may be in, and say which."""
    kinds = [
        "",
        "",
        "no_grad",
        "inference",
        "autocast",
        "half",
        "threads",
        "anomaly",
        "double",
        "isa",
    ]
    kind = rng.choice(kinds)
    if kind == "no_grad":
        stack.enter_context(torch.no_grad())
    elif kind == "inference":
        stack.enter_context(torch.inference_mode())
    elif kind == "autocast":
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
    elif kind == "half":
        stack.enter_context(torch.autocast("cpu", torch.float16))
    elif kind == "isa":
        before = os.environ.pop("BLOCKDROP_CPU_ISA", None)
        stack.callback(os.environ.pop, "BLOCKDROP_CPU_ISA")
        if before is not None:
            stack.callback(os.environ.__setitem__, "BLOCKDROP_CPU_ISA", before)
        kind = os.environ["BLOCKDROP_CPU_ISA"] = rng.choice(["avx512", "avx2", "portable", "x"])
    elif kind == "double":
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
    elif kind == "anomaly":
        stack.enter_context(torch.autograd.set_detect_anomaly(True))
    elif kind == "threads":
        before = torch.get_num_threads()
        stack.callback(torch.set_num_threads, before)
        torch.set_num_threads(rng.choice([1, 2, 3, 5]))
    return kind


# ------------------------------------------------------------------ operators


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "blockdrop_fast":
            self.calls.append((func._schema.name.split("::")[1], args, kwargs or {}))
        return func(*args, **kwargs or {})


@functools.cache
def operator_calls(names: tuple[str, ...] = tuple(MODELS)) -> list[tuple[str, tuple]]:
    """Right calls of the operators: those that engines of these models make."""
    calls = {}
    for name in names:
        engine = engine_of(name, torch.float32, "walk") or engine_of(name, torch.float32, "gather")
        if engine is None:
            continue
        images, blocks = make_images(config_of(name), 5), config_of(name).num_blocks
        keep = torch.rand(2, 5, blocks, generator=torch.Generator().manual_seed(0)) < 0.5
        # Not all models take all of these.
        with contextlib.suppress(*ALLOWED, RuntimeError), _Recorder() as recorder:
            output = engine(images)
            if not isinstance(model_of(name), bdf.Cascade):
                engine.run(images, output.decisions)
                if isinstance(output, bdf.WeightedOutput):
                    engine.run(images, output.decisions, output.weights)
                else:
                    engine.run_sets(images, keep)
                    engine.run(images, keep[0], torch.rand(5, blocks))
        for operator, args, _ in recorder.calls:
            calls[operator, str([shape_of(one) for one in args])] = (operator, args)
    keep = torch.rand(7, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    return [*calls.values(), ("plan", (keep,)), *_half_calls()]


def _half_calls() -> list[tuple[str, tuple]]:
    """Of the operators for GPUs, whose references serve the CPU."""
    images, keep = random_images(3, torch.bfloat16), torch.ones(3, 5, dtype=torch.bool)
    executor = WalkHalfExecutor(fold_network(make_network(CIFAR), torch.bfloat16))
    assert executor.set_policy(fold_network(make_policy(5).network, torch.bfloat16), 1)
    with _Recorder() as recorder:
        executor.run(images, keep)
        executor.run_policy(images)
    return [(operator, args) for operator, args, _ in recorder.calls if operator != "plan"]


def shape_of(value: object) -> object:
    return (value.dtype, value.shape) if isinstance(value, Tensor) else value


def mutated(rng: random.Random, value: object) -> object:
    """An argument of an operator, changed."""
    if isinstance(value, Tensor):
        kind = rng.random()
        if not is_plain(value) or value.numel() > 2**30:
            return value
        if kind < 0.35:
            return laid_out(rng, value)
        if kind < 0.55 and value.ndim == 1 and value.numel() > 1000:
            # Packed weights say some things twice: a value that changes alone is of no network.
            return value * rng.choice([0, 1, 2])
        if kind < 0.55:
            return valued(rng, value)
        if kind < 0.6:  # not for calls that look at values: there are too many
            return value.new_zeros(1).expand(1, 3, 2**29 - 2, 2**29 - 2)
        return strange(rng, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([0, 1, -1, value + 1, value - 1, 2**31 - 1, 2**31, 2**62, -(2**63)])
    if isinstance(value, float):
        return rng.choice([0.0, 1.0, -1.0, 0.5, float("nan"), float("inf")])
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
        value = list(value)
        kind = rng.choice(["less", "more", "none", "one", "all"])
        if kind == "less":
            return value[:-1]
        if kind == "more":
            return value + [1]
        if kind == "none":
            return []
        for at in range(len(value)) if kind == "all" else [rng.randrange(len(value))]:
            value[at] = mutated(rng, value[at])
        return value
    return value


# ------------------------------------------------------------------ everything else

VALUES = (
    None, True, 0, 1, 2, 3, 5, 15, -1, 2**31, 2**70, 0.5, float("nan"), float("inf"), "x", "", b"y",
    (), (1,), (5, 5, 5), [2, 1, 2], (0,), (-1, 2), ("a",), (1.5,), {}, {1: 2}, {3}, object(), int,
)  # fmt: skip


def pick(rng: random.Random, right: object, share: float = 0.3) -> object:
    """The right argument, or any."""
    return rng.choice(VALUES) if rng.random() < share else right


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout == torch.strided and not value.is_nested else "-"
        shape = "nested" if value.is_nested else tuple(value.shape)
        return f"{value.dtype} {value.device} {value.layout} {shape} {strides}"
    return repr(value)[:80]
