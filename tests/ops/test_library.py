"""What every operator refuses: tensors that are not dense, on several devices, or none at all.

And what shape functions refuse: all that the references do, as far as it needs no values.
"""

import pytest
import torch

from tests.fuzz.arguments import operator_calls
from tests.ops.gathered_conv_cases import make_case
from tests.ops.walk_checks import compiled
from tests.random_networks import GATED

OPERATORS = torch.ops.blockdrop_fast


MAY_BE_MISSING = {"sets", "costs", "order"}
NAMES = (
    *("plan", "gathered_conv_", "walk", "walk_policy", "walk_half", "walk_half_policy"),
    *("walk_imagenet", "walk_imagenet_policy", "walk_sequential", "walk_halting", "walk_weighted"),
    *("walk_exits", "walk_look"),
)


@pytest.fixture(scope="module")
def calls():
    """Operator -> a right call's arguments by their names."""
    models = ("bottleneck", "policy", "policy of its own stem", "look, menu", *GATED)
    found = dict(operator_calls(models))
    found["gathered_conv_"] = make_case(3, 1, (5, 6, 7, 4), 5, True, True, torch.float32)
    return {
        operator: dict(zip(names_of(operator), args, strict=False))
        for operator, args in found.items()
    }


def names_of(operator):
    return [one.name for one in getattr(OPERATORS, operator).default._schema.arguments]


def tensors_of(values):
    return [name for name, one in values.items() if isinstance(one, torch.Tensor)]


def call(operator, values):
    return getattr(OPERATORS, operator)(*values.values())


def on_meta(values):
    return {
        name: one.to("meta") if isinstance(one, torch.Tensor) else one
        for name, one in values.items()
    }


@pytest.mark.parametrize("operator", NAMES)
def test_operands(calls, operator):
    values = calls[operator]
    for name in tensors_of(values):
        sparse = values[name].to_sparse()
        with pytest.raises(TypeError, match=f"{name}: expected a dense tensor, got .*sparse"):
            call(operator, values | {name: sparse})
        if operator == "plan":
            continue
        meta = values | {name: values[name].to("meta")}
        with pytest.raises((TypeError, ValueError), match=r"meta device|expected on meta, got on"):
            call(operator, meta)
        if name not in MAY_BE_MISSING and (operator, name) != ("walk_exits", "decisions"):
            with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
                call(operator, values | {name: None})


@pytest.mark.parametrize("operator", NAMES)
def test_shape_functions_take_what_kernels_take(calls, operator):
    values = calls[operator]
    found, shapes = call(operator, values), call(operator, on_meta(values))
    if isinstance(found, torch.Tensor):
        found, shapes = [found], [shapes]
    for one, other in zip(found or (), shapes or (), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize(("operator", "changes", "message"), [
    ("plan", {"decisions": torch.ones(3, dtype=torch.bool)}, "decisions: expected shape"),
    ("walk", {"layers": [1, 0, 1]}, "layers: expected at least one block in 3 segments"),
    ("walk", {"layers": [1, 2**40, 1]}, "layers: expected at least one block in 3 segments"),
    ("walk", {"decisions": torch.ones(5, 4, dtype=torch.bool)}, "decisions: expected shape"),
    ("walk_policy", {"policy_layers": [1, 0, 1]}, "layers: expected at least one block"),
    ("walk_policy", {"policy_layers": [1, 2**62, 1]}, "layers: expected at least one block"),
    ("walk_policy", {"policy_weights": torch.zeros(7)}, "policy_weights: expected a vector of"),
    ("walk_half", {"layers": [1, 1]}, "layers: expected at least one block in 3 segments"),
    ("walk_half", {"order": torch.zeros(9, dtype=torch.int32)}, "order: expected a vector of"),
    ("walk_imagenet", {"winograd": -1}, "winograd: expected at least 0"),
    ("walk_imagenet", {"layers": [2**40, 1]}, "expected a positive number for each of"),
    ("walk_imagenet_policy", {"pool": 25}, "pool: expected 1 to the images' size, got 25"),
    ("walk_imagenet_policy", {"policy_layers": [0, 1]}, "layers: expected a positive number"),
    ("walk_sequential", {"gates": torch.zeros(3, 64)}, r"gates: expected shape \(5, 65\)"),
    ("walk_halting", {"epsilon": 1.0}, "epsilon: expected between 0 and 1"),
    ("walk_weighted", {"shares": torch.ones(2, 4)}, r"shares: expected shape \(5, 5\)"),
    ("walk_exits", {"after": [2, 1, 3]}, "after: expected ascending blocks out of 1 to 4"),
    ("walk_look", {"sets": torch.tensor(True)}, r"sets: expected shape \(M, 5\), got"),
    ("walk_look", {"costs": torch.zeros(4)}, "costs: expected one of each of 3 sets"),
    ("gathered_conv_", {"stride": 3}, "stride: expected 1 or 2, got 3"),
])  # fmt: skip
def test_kernels_and_shape_functions_refuse(calls, operator, changes, message):
    values = calls[operator] | changes
    for one in (values, on_meta(values)):
        with pytest.raises(ValueError, match=message):
            call(operator, one)


@compiled
@pytest.mark.parametrize(("operator", "size"), [
    ("walk_imagenet", (2**29 - 2, 2**29 - 2)), ("walk", (2**31, 4)),
])  # fmt: skip
def test_sizes_that_overflow(calls, operator, size):
    """Of the first, pixels with their margin times channels are 2^64."""
    values = calls[operator]
    images = torch.zeros(1).expand(len(values["images"]), 3, *size)
    with pytest.raises(ValueError, match="images: too large for this kernel"):
        call(operator, values | {"images": images})


def test_operators_know_nothing_of_autocast(calls):
    """References that serve a device in place of a kernel, either."""
    for operator in ("walk", "walk_half"):
        values = calls[operator]
        with torch.autocast("cpu", torch.bfloat16):
            found = call(operator, values)
        assert torch.equal(found, call(operator, values))


def test_lazily_negated_outputs_are_refused(calls):
    values = calls["gathered_conv_"]
    with pytest.raises(ValueError, match="expected no lazily negated tensors"):
        call("gathered_conv_", values | {"out": torch._neg_view(values["out"])})
