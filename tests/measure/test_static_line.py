"""The static line: greedy elimination, and its file beside a checkpoint."""

import json

import pytest
import torch
import torch.nn.functional as F

import blockdrop_fast as bdf
from blockdrop_fast.measure import static_line as static_line_module
from blockdrop_fast.measure.static_line import (
    StaticLine,
    cached_accuracies,
    cached_static_line,
    line_file,
    set_accuracies,
    static_line,
    without_one,
)


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    backbone = bdf.resnet_cifar(14).eval()
    for block, _ in backbone.blocks():
        torch.nn.init.uniform_(block.bn2.weight, 0.2, 1)
    return bdf.compile(backbone)


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 3, 16, 16, generator=generator),
            torch.randint(10, (n,), generator=generator),
        )
        for n in (24, 9)
    ]


@pytest.fixture(scope="module")
def line(engine, batches):
    return static_line(engine, batches)


def loss_of(engine, batches, blocks) -> float:
    logits = [engine.run(images, blocks.expand(len(images), -1)) for images, _ in batches]
    labels = torch.cat([labels for _, labels in batches])
    return F.cross_entropy(torch.cat(logits), labels).item()


def test_sets_are_nested_and_of_each_size(line):
    assert line.sets.sum(1).tolist() == list(range(7))
    assert (line.sets[:-1] <= line.sets[1:]).all()
    assert line.images == 33
    assert sorted(line.order) == list(range(6))


def test_each_step_is_the_best_of_all(engine, batches, line, monkeypatch):
    for k in range(6, 0, -1):
        losses = [loss_of(engine, batches, blocks) for blocks in without_one(line.sets[k])]
        best = without_one(line.sets[k])[losses.index(min(losses))]
        assert torch.equal(line.sets[k - 1], best)
        assert line.losses[k - 1].item() == pytest.approx(min(losses), abs=1e-5)
    monkeypatch.setattr(static_line_module, "ROWS", 7)  # batches are split; nothing changes
    assert torch.equal(static_line(engine, batches).sets, line.sets)


def test_first_blocks_can_be_kept_for_longest(engine, batches, line):
    assert set(line.order[:4]) & {0, 1}  # the unrestricted line drops one of them earlier
    restricted = static_line(engine, batches, tiers=(torch.arange(6) < 2).int())
    assert sorted(restricted.order[-2:]) == [0, 1]
    assert restricted.sets.sum(1).tolist() == list(range(7))
    later = [blocks for blocks in without_one(torch.ones(6).bool()) if blocks[:2].all()]
    losses = [loss_of(engine, batches, blocks) for blocks in later]
    assert torch.equal(restricted.sets[5], later[losses.index(min(losses))])
    again = StaticLine.from_dict(json.loads(json.dumps(restricted.to_dict())))
    assert torch.equal(again.sets, restricted.sets)


def test_accuracy_of_each_set(engine, batches, line):
    accuracies = set_accuracies(engine, batches, line.sets)
    for blocks, accuracy in zip(line.sets, accuracies, strict=True):
        right = [
            (engine.run(images, blocks.expand(len(images), -1)).argmax(1) == labels).sum().item()
            for images, labels in batches
        ]
        assert accuracy.item() == pytest.approx(sum(right) / 33)


def test_through_json_and_back(line):
    again = StaticLine.from_dict(json.loads(json.dumps(line.to_dict())))
    assert torch.equal(again.sets, line.sets)
    assert torch.equal(again.losses, line.losses)
    assert again.images == line.images


def test_file_is_read_until_weights_or_images_change(engine, batches, line, tmp_path, monkeypatch):
    computed = []
    real = static_line_module.static_line
    monkeypatch.setattr(
        static_line_module, "static_line", lambda *args: computed.append(1) or real(*args)
    )
    checkpoint = tmp_path / "model.safetensors"
    for _ in range(2):
        assert torch.equal(cached_static_line(checkpoint, engine, batches).sets, line.sets)
    assert len(computed) == 1
    cached_static_line(checkpoint, engine, batches[:1])
    assert len(computed) == 2
    other = bdf.resnet_cifar(14).eval()
    other.load_state_dict(engine.backbone.state_dict())
    cached_static_line(checkpoint, bdf.compile(other), batches[:1])
    assert len(computed) == 2  # the same weights, wherever they came from
    other.bn1.running_mean += 1
    cached_static_line(checkpoint, bdf.compile(other), batches[:1])
    assert len(computed) == 3
    line_file(checkpoint).write_text("{")  # no line in it
    cached_static_line(checkpoint, engine, batches)
    assert len(computed) == 4
    cached_static_line(tmp_path / "nowhere" / "model.safetensors", engine, batches)


def test_a_damaged_file_is_never_taken_for_a_line(line, tmp_path):
    path, values = tmp_path / "line.json", {"key": "0f", "accuracies": {"a": [0.25]}}
    static_line_module._write(path, line.to_dict() | values)
    whole = path.read_bytes()
    kept = static_line_module._read(path)
    assert kept == line.to_dict() | values
    for at in range(len(whole)):
        for byte in (whole[at] ^ 1, ord("7")):
            path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
            assert static_line_module._read(path) in ({}, kept)
    path.write_text("[]")
    assert static_line_module._read(path) == {}


def test_kept_accuracies(engine, batches, tmp_path, monkeypatch):
    checkpoint, passes = tmp_path / "model.safetensors", []
    real = static_line_module.set_accuracies
    monkeypatch.setattr(
        static_line_module, "set_accuracies", lambda *args: passes.append(1) or real(*args)
    )
    assert cached_static_line(checkpoint, engine, batches, only_kept=True) is None
    line = cached_static_line(checkpoint, engine, batches)
    ask = (checkpoint, engine, line)
    assert cached_accuracies(*ask, lambda: iter(batches), only_kept=True) is None
    expected = real(engine, batches, line.sets)
    for _ in range(2):
        assert torch.equal(cached_accuracies(*ask, lambda: iter(batches)), expected)
    assert len(passes) == 1
    cached_accuracies(*ask, lambda: iter(batches[:1]))
    assert len(passes) == 2
    assert torch.equal(cached_accuracies(*ask, lambda: batches, only_kept=True), expected)


def test_no_images(engine):
    with pytest.raises(ValueError, match="batches"):
        static_line(engine, [])
