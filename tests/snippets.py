"""The Python snippets of a page of documentation, and whether what they run is right."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.measure.tolerance import make_output_reference, make_reference

ROOT = Path(__file__).parents[1]


def run_snippets(page: str) -> dict:
    """Run all snippets of a page, one after the other.

    Args:
        page: its path from the root of the repository.

    Returns:
        The names that the snippets leave behind. "runs" are the calls of engines in them: engine,
        images, decisions if there were any, result.
    """
    runs = []

    def recording(method):
        def call(self, images, *decisions):
            result = method(self, images, *decisions)
            runs.append((self, images, *decisions, result))
            return result

        return call

    path = ROOT / page
    names = {"runs": runs}
    snippets = re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        for method in ("run", "run_sets", "__call__"):
            patch.setattr(bdf.Engine, method, recording(getattr(bdf.Engine, method)))
        for number, snippet in enumerate(snippets):
            exec(compile(snippet, f"{path.name}, snippet {number}", "exec"), names)
    return names


def check_run(engine: bdf.Engine, images: Tensor, *given: Tensor | bdf.Output) -> None:
    """Compare one of the runs with the reference at its decisions."""
    *given, result = given
    decisions = given[0].bool() if given else None
    if isinstance(result, bdf.Output):
        logits, decisions = result
    else:
        logits = result
    if logits.ndim == 3:  # of several sets, the last, whose prefixes are shared
        assert len(logits) == len(decisions)
        logits, decisions = logits[-1], decisions[-1]
    model = copy.deepcopy(engine.model).eval()
    if isinstance(model, bdf.BlockDrop) and isinstance(result, bdf.Output):
        reference = make_output_reference(model, images, result, engine.dtype)
    else:
        backbone = model if isinstance(model, bdf.ResNet) else model.backbone
        reference = make_reference(backbone, images, decisions, engine.dtype)
    reference.check("engine", logits)
