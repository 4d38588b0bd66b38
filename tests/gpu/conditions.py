"""Where tests of the CUDA kernels run."""

import pytest
import torch

from blockdrop_fast._extension import extension_status


def _why_skip() -> str:
    if not torch.cuda.is_available():
        return "there is no GPU here"
    if extension_status().build_info.get("cuda") is None:
        return "the extension has no CUDA kernels"
    return ""


on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(_why_skip()), reason=_why_skip() or "-"),
]
