"""A case: a target and its arguments, drawn by its number."""

from __future__ import annotations

import random
import warnings

import torch

from tests.fuzz.arguments import ALLOWED
from tests.fuzz.engines import fuzz_engine, fuzz_threads
from tests.fuzz.makers import fuzz_compile, fuzz_configs, fuzz_depths, fuzz_heuristics, fuzz_models
from tests.fuzz.measures import fuzz_command, fuzz_evaluate, fuzz_files, fuzz_flops
from tests.fuzz.modules import fuzz_gates, fuzz_module, fuzz_policy
from tests.fuzz.operators import fuzz_gathered_conv, fuzz_operator
from tests.fuzz.right import Wrong

TARGETS = {
    fuzz_engine: 40,
    fuzz_operator: 20,
    fuzz_module: 8,
    fuzz_threads: 2,
    fuzz_gathered_conv: 5,
    fuzz_policy: 4,
    fuzz_gates: 4,
    fuzz_heuristics: 3,
    fuzz_flops: 3,
    fuzz_configs: 4,
    fuzz_models: 4,
    fuzz_depths: 2,
    fuzz_compile: 3,
    fuzz_files: 3,
    fuzz_evaluate: 3,
    fuzz_command: 1,
}


def run(number: int) -> str:
    """Run a case and say what came of it: "right", or the name of an allowed error.

    Raises:
        Wrong: something else, naming the case.
    """
    rng = random.Random(number)
    (target,) = rng.choices(list(TARGETS), list(TARGETS.values()))
    torch.manual_seed(number)
    about: list = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target(rng, about)
    except ALLOWED as error:
        if "\n" in str(error).strip() and "Exception raised from" not in str(error):
            raise Wrong(f"case {number}, {target.__name__} {about}: lines {error}") from error
        return f"{target.__name__}: {type(error).__name__}"
    except Exception as error:
        raise Wrong(f"case {number}, {target.__name__} {about}: {error!r}") from error
    return f"{target.__name__}: right"
