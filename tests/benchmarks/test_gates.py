"""The benchmark of gates, in seconds on ResNet-8: what it writes."""

from __future__ import annotations

import json

import pytest

from benchmarks import gates


@pytest.mark.slow
def test_every_kind_is_measured(tmp_path):
    arguments = gates.Arguments(
        depth=8, batches=(1, 2), rounds=1, min_seconds=0, out=tmp_path / "machine" / "gates.json"
    )
    gates.main(arguments)
    found = json.loads(arguments.out.read_text())["kinds"]
    assert list(found) == list(arguments.kinds)
    for kind in found.values():
        assert list(kind["batches"]) == ["1", "2"]
        assert kind["same_decisions_block_major"] > 0.9
        for one in kind["batches"].values():
            assert set(one["milliseconds"]) == {"on the way", "given", "complete", "block-major"}
            assert one["over_given"] > 0


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"kinds: expected some of sequential, .* got 'act'"):
        gates.measure("act", gates.Arguments(depth=8))
