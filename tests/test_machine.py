"""What is recorded of the machine."""

from __future__ import annotations

import json

import torch

from blockdrop_fast.machine import machine_info


def test_machine_info_names_the_machine():
    info = machine_info()
    assert info["cpu"]
    assert info["torch"] == torch.__version__
    assert info["threads"] == torch.get_num_threads()
    json.dumps(info)
