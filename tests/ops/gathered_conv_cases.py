"""Runs the Triton kernel of ``gathered_conv_`` on the CPU, in Triton's interpreter.

Triton decides when a kernel is defined whether it is interpreted, so this is a process of its own.
``TRITON_INTERPRET=1 python tests/ops/gathered_conv_cases.py RESULTS.json FOLDER`` writes what is
wrong with each case, nothing for a right one; ``test_gathered_conv.py`` calls it and reports.
No bfloat16: the interpreter multiplies it wrongly.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from blockdrop_fast.ops.gathered_conv import gathered_conv_reference_, pack_conv

IMAGES = 5
# Channels that fill tiles and others that do not, sizes that strides of 2 do not divide.
SHAPES = [(24, 40, 5, 3), (32, 16, 6, 4), (17, 19, 3, 3), (16, 64, 4, 6), (33, 48, 1, 9)]
# (block_m, block_n, block_k, warps, stages), programs: one program for all tiles, fewer programs
# than tiles, more programs than tiles.
CONFIGS = [((16, 16, 16, 4, 1), 1), ((32, 16, 32, 1, 2), 3), ((64, 64, 16, 4, 3), 50)]
CONFIGS += [((16, 32, 16, 4, 4), 7), ((128, 16, 16, 4, 2), None)]
DTYPES = {"float32": torch.float32, "float16": torch.float16}
FORMS = {"plain": (False, False), "gather": (True, False), "scatter": (False, True)}
FORMS["gather-scatter"] = (True, True)


def case_names() -> list[str]:
    """The names of all cases, which need no triton to be known."""
    kernels = ["1x1", "1x1-stride2", "3x3", "3x3-stride2"]
    combined = map("-".join, itertools.product(kernels, FORMS, DTYPES))
    return [*combined, "nan-stays-nan", "wide-offsets", "default-config", "tune"]


def channels_last(*sizes: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Random activations."""
    values = torch.randn(sizes, generator=generator).to(dtype)
    return values.contiguous(memory_format=torch.channels_last)


def make_case(kernel_size, stride, shape, count, gather, scatter, dtype, seed=0, images=IMAGES):
    """Operands of ``gathered_conv_``, NaN wherever nothing may be read or has to be written."""
    c_in, c_out, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    active = torch.randperm(images, generator=generator).int()
    used = active[:count].long()
    x = channels_last(images, c_in, height, width, generator=generator, dtype=dtype)
    unread = torch.ones(images, dtype=torch.bool)
    unread[used if gather else slice(count)] = False
    x[unread] = torch.nan
    size = [(length - 1) // stride + 1 for length in (height, width)]
    out = channels_last(images, c_out, *size, generator=generator, dtype=dtype)
    untouched = torch.ones(images, dtype=torch.bool)
    untouched[used if scatter else slice(count)] = False
    out[untouched if scatter else slice(None)] = torch.nan
    kernel = torch.randn(c_out, c_in, kernel_size, kernel_size, generator=generator)
    weight = pack_conv(kernel / (c_in * kernel_size**2) ** 0.5).to(dtype)
    bias = torch.randn(c_out, generator=generator)
    counts = torch.tensor([count], dtype=torch.int32)
    return out, x, weight, bias, active, counts, kernel_size, stride, gather, scatter


def what_is_wrong(out: Tensor, before: Tensor, expected: Tensor) -> str:
    """Compare with the reference's result: rows bit for bit untouched, all else within rounding."""
    as_integers = torch.int16 if out.element_size() == 2 else torch.int32
    untouched = (before.view(as_integers) == expected.view(as_integers)).flatten(1).all(1)
    if not torch.equal(out[untouched].view(as_integers), before[untouched].view(as_integers)):
        return "a row changed that is not addressed"
    out, expected = out[~untouched].float(), expected[~untouched].float()
    if out.numel() == 0:
        return ""
    if out.isnan().any():
        return "NaN where there should be a number"
    # Both round once, at the end; the rest is for another order of a few hundred sums.
    limit = 2 * max(torch.finfo(before.dtype).eps, 2**-19) * expected.abs().max()
    error = (out - expected).abs().max()
    return "" if error <= limit else f"error {error:.3g}, at most {limit:.3g} expected"


def run_interpreted() -> dict[str, str]:
    """All cases -> what is wrong with each, empty where nothing is."""
    import blockdrop_fast.triton_kernels.gathered_conv as kernels

    mend_interpreter()
    checks: dict[str, Callable[[], str]] = {}
    forms = itertools.product((1, 3), (1, 2), FORMS, DTYPES)
    for number, (kernel_size, stride, form, dtype) in enumerate(forms):
        name = f"{kernel_size}x{kernel_size}{'-stride2' * (stride == 2)}-{form}-{dtype}"
        arguments = (kernels, kernel_size, stride, form, dtype, number)
        checks[name] = functools.partial(check_form, *arguments)
    checks["nan-stays-nan"] = functools.partial(check_nan, kernels)
    checks["wide-offsets"] = functools.partial(check_wide, kernels)
    checks["default-config"] = functools.partial(check_default, kernels)
    checks["tune"] = functools.partial(check_tune, kernels, Path(sys.argv[2]))
    results = {}
    for name, check in checks.items():
        try:
            results[name] = check()
        except Exception:
            results[name] = traceback.format_exc()
    return results


def compare(kernels, arguments, config=None, programs=None) -> str:
    """Launch the kernel and the reference on the same operands."""
    before = arguments[0].clone()
    expected = before.clone()
    gathered_conv_reference_(expected, *arguments[1:])
    kernels.launch_gathered_conv(*arguments, config=config, programs=programs)
    return what_is_wrong(arguments[0], before, expected)


def check_form(kernels, kernel_size, stride, form, dtype, number) -> str:
    """Two shapes, each with a configuration and a number of programs, at two counts each."""
    for offset, counts in enumerate([(0, 3), (1, IMAGES)]):
        shape = SHAPES[(number + offset) % len(SHAPES)]
        # Over the cases every shape meets every configuration.
        blocks, programs = CONFIGS[(number // len(SHAPES) + offset) % len(CONFIGS)]
        for count in counts:
            arguments = make_case(
                kernel_size, stride, shape, count, *FORMS[form], DTYPES[dtype], seed=number
            )
            wrong = compare(kernels, arguments, kernels.Config(*blocks), programs)
            if wrong:
                return f"{shape}, {count} images, {blocks}, {programs} programs: {wrong}"
    return ""


def check_nan(kernels) -> str:
    """A NaN in an active image reaches that image's results, and no other's."""
    arguments = make_case(1, 1, (16, 16, 4, 4), 3, True, False, torch.float32)
    out, x, active = arguments[0], arguments[1], arguments[4]
    x[active[1], :, 2, 2] = torch.nan
    kernels.launch_gathered_conv(*arguments, config=kernels.Config(16, 16, 16, 4, 2))
    expected = torch.zeros(3, 4, 4, dtype=torch.bool)
    expected[1, 2, 2] = True
    return "" if torch.equal(out[:3].isnan().all(1), expected) else "NaN at other pixels"


def check_wide(kernels) -> str:
    """Offsets of 64 bits, which otherwise only tensors of 2**31 elements need."""
    kernels.OFFSET_LIMIT = 0
    try:
        arguments = make_case(3, 1, (24, 40, 5, 7), 3, True, True, torch.float32)
        return compare(kernels, arguments, kernels.Config(32, 32, 16, 4, 2))
    finally:
        kernels.OFFSET_LIMIT = 2**31


def check_default(kernels) -> str:
    """The rule's own choice and as many programs as there are tiles."""
    for kernel_size in (1, 3):
        arguments = make_case(kernel_size, 1, (20, 70, 3, 5), 4, True, True, torch.float16)
        wrong = compare(kernels, arguments)
        if wrong:
            return wrong
    return ""


def check_tune(kernels, folder: Path) -> str:
    """Of three configurations the fastest is wrong, the second fastest has to win."""
    from blockdrop_fast.measure import tune as tuning
    from blockdrop_fast.triton_kernels import config as configs

    wrong, best, slow = (kernels.Config(size, 16, 16, 4, 2) for size in (16, 32, 64))
    seconds = {wrong: 1.0, best: 2.0, slow: 3.0}
    ran: list[kernels.Config] = []

    def launch(out, *arguments, config):
        kernels.launch_gathered_conv(out, *arguments, config=config)
        ran.append(config)
        if config == wrong:
            out += 1.0

    def timer(call):
        call()
        return seconds[ran[-1]]

    tuning.launch_gathered_conv = launch
    shapes = [tuning.Shape(1, 1, 16, 32, 4, 4), tuning.Shape(3, 2, 16, 16, 5, 5)]
    arguments = {"timer": timer, "device": "cpu", "folder": folder}
    for shape in shapes:  # one by one: the second call has to keep the first one's entry
        [entry] = tuning.tune(
            [shape, shape], torch.float16, 3, choices=lambda *_: list(seconds), **arguments
        )
        if (entry.config, entry.microseconds) != (best, 2.0):
            return f"{shape}: chose {entry}"
    table = configs.read_tables("interpreter", folder)
    rows = {problem.rows for problem in table}
    if set(table.values()) != {best} or len(table) != len(shapes) or rows != {4}:
        return f"the table holds {table}"
    try:
        tuning.tune(shapes[:1], torch.float16, 3, choices=lambda *_: [wrong], **arguments)
    except RuntimeError:
        return ""
    return "no error where no candidate is right"


def mend_interpreter() -> None:
    """Loop bounds are arrays of one element, which NumPy 2.4 converts to int no more."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, *scopes):  # one; Triton 3.5 has none
        patch_tensor(tensor, *scopes)
        set_attribute = scopes[0].set_attr if scopes else setattr
        set_attribute(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[1]).write_text(json.dumps(run_interpreted()))
