"""Backbones that bear dropping: what they are trained on, and their batch-norm statistics."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import blockdrop_fast as bdf
from train.batch_statistics import recalibrate
from train.config import Pretrain
from train.droppable import Chain, random_subnetworks
from train.pretrain import pretrain

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _digits(monkeypatch):
    monkeypatch.delenv("BLOCKDROP_DATA", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    out = tmp_path_factory.mktemp("plain")
    pretrain(Pretrain(arch="resnet14", epochs=4, out=out, limit=512, batch_size=32, threads=1))
    return out / "model.safetensors"


def droppable(start: Path, out: Path) -> Pretrain:
    return Pretrain(
        init=start,
        droppable=True,
        epochs=4,
        lr=0.05,
        out=out,
        limit=512,
        batch_size=32,
        chain_images=100,
        threads=1,
        seed=3,
    )


def test_shares_are_exact():
    chain = torch.ones(6, 6).tril(-1).bool()[2:]
    generator = torch.Generator().manual_seed(0)
    decisions = random_subnetworks(200, chain, 0.12, 0.38, 0.35, generator)
    assert decisions[:24].all()
    drawn = decisions[24:100].float().mean(1)
    assert 0.5 < drawn.mean() < 0.85
    assert not torch.isin(decisions[24:100].sum(1), torch.tensor([6])).all()
    rows, counts = decisions[100:].unique(dim=0, return_counts=True)
    assert sorted(rows.sum(1).tolist()) == [2, 3, 4, 5]
    assert torch.equal(rows.sort(1, descending=True).values, rows)
    assert counts.min() > 10
    assert random_subnetworks(8, chain, 1.0, 0.0, 0.35, generator).all()
    nothing = random_subnetworks(8, chain, 0.0, 1.0, 1.0, generator)
    assert nothing.all()


@pytest.mark.slow
def test_trains_what_sets_of_the_chain_need(start, tmp_path):
    pretrain(droppable(start, tmp_path))
    rows = json.loads((tmp_path / "metrics.json").read_text())
    sizes = [name for name in rows[-1] if name.endswith("_blocks")]
    assert sizes == ["test_accuracy_2_blocks", "test_accuracy_3_blocks"] + sizes[2:]
    plain, trained = (bdf.load_backbone(p) for p in (start, tmp_path / "model.safetensors"))
    assert not torch.equal(plain.conv1.weight, trained.conv1.weight)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["schedulers"][1]["sets"].sum(1).tolist() == [2, 3, 4, 5]


SCRIPT = """
import sys
from pathlib import Path
from tests.train.test_droppable import droppable
from dataclasses import replace
from train.pretrain import pretrain
start, out, resume = sys.argv[1:]
pretrain(replace(droppable(Path(start), Path(out)), chain_every=3, resume=resume == "resume"))
"""


def run(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
def test_resume_after_kill_9_keeps_the_chain(start, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(str(start), str(whole), "new").wait(timeout=300) == 0
    process = run(str(start), str(killed), "new")
    deadline = time.monotonic() + 300
    while not (killed / "state.pt").exists() and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = torch.load(killed / "state.pt", weights_only=True)["epoch"]
    assert 1 <= saved < 4, "the run was over before it was killed"
    assert run(str(start), str(killed), "resume").wait(timeout=300) == 0
    expected, resumed = (torch.load(out / "state.pt", weights_only=True) for out in (whole, killed))
    for name, value in expected["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
    assert torch.equal(expected["schedulers"][1]["sets"], resumed["schedulers"][1]["sets"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"drop_rate": 0.2}, "droppable"),
        ({"full_share": 0.7}, "at most 1 together"),
        ({"random_share": 1.2}, "random_share"),
        ({"chain_lowest": 6}, "chain_lowest"),
        ({"chain_every": 0}, "chain_every"),
    ],
)
def test_bad_options(start, tmp_path, wrong, match):
    with pytest.raises(ValueError, match=match):
        pretrain(replace(droppable(start, tmp_path), **wrong))


@pytest.mark.slow
def test_chain_looks_when_due(start):
    backbone = bdf.load_backbone(start)
    batches = [(torch.randn(8, 3, 32, 32), torch.arange(8))]
    chain = Chain(batches, 2, 0, 6)
    chain.look(bdf.compile(backbone), 1)
    assert chain.sets.sum(1).tolist() == [0, 1, 2, 3, 4, 5]
    before = chain.sets
    chain.look(bdf.compile(backbone), 2)
    assert chain.sets is before


def test_recalibration_by_hand():
    torch.manual_seed(0)
    backbone = bdf.resnet_cifar(8)
    backbone.bn1.running_mean.fill_(7.0)
    unused = backbone.segments[1][0].bn1
    unused.running_mean.fill_(3.0)
    backbone.segments[1].eval()
    images = torch.randn(2, 12, 3, 16, 16)
    keep = torch.tensor([True, False, True]).expand(12, 3).clone()
    keep[4:, 0] = False  # the first block: 4 active images
    recalibrate(backbone, [(batch, None) for batch in images], lambda _: keep)
    means, variances = [], []
    for batch in images:
        # In recalibration batch norm goes by the batch, so the stem's is in what block 1 sees.
        x = backbone.conv1(batch)
        x = torch.relu(
            (x - x.mean((0, 2, 3))[:, None, None])
            / (x.var((0, 2, 3), correction=0) + 1e-5).sqrt()[:, None, None]
        )
        x = backbone.segments[0][0].conv1(x[:4])
        means.append(x.mean((0, 2, 3)))
        variances.append(x.var((0, 2, 3)))
    layer = backbone.segments[0][0].bn1
    torch.testing.assert_close(layer.running_mean, sum(means) / 2)
    torch.testing.assert_close(layer.running_var, sum(variances) / 2)
    assert backbone.bn1.running_mean.abs().max() < 1
    assert (unused.running_mean == 3).all()
    assert layer.momentum == 0.1
    assert layer.training
    assert not unused.training
    assert layer.num_batches_tracked == 0
