"""Two processes train as one: the same gradients, samples and figures, and no lost checkpoints."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import blockdrop_fast as bdf
from tests.random_networks import BOTTLENECK, CIFAR, make_look_model, make_network
from tests.train.conftest import FEW
from tests.train.processes import environment, free_port, launch, run_stage, run_stages
from tests.train.sync_batch_norm import on_cpu
from train import __main__ as command
from train import distributed
from train.config import Curriculum, Expert, Finetune, Heuristics, Joint, Pretrain
from train.curriculum import curriculum
from train.expert import expert
from train.finetune import finetune, freeze_batch_norm, masked_pass
from train.heuristics import heuristics
from train.images import training_batches
from train.joint import joint
from train.pretrain import pretrain
from train.reward import flip, sample, sample_antithetic
from train.run_files import MODEL_FILE
from train.systems.cascade import cascade
from train.systems.config import (
    Cascade,
    Exits,
    Halting,
    Lccl,
    Pfec,
    Sact,
    Sequential,
)
from train.systems.exits import exits
from train.systems.halting import halting
from train.systems.lccl import lccl
from train.systems.pfec import pfec
from train.systems.sact import sact
from train.systems.sequential import sequential

ROOT = Path(__file__).parents[2]
SETS = torch.tensor([[1, 0, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
# So small a rate that later steps of an epoch are at the same weights, but for roundings.
TINY = {
    "limit": 96,
    "batch_size": 32,
    "threads": 1,
    "epochs": 1,
    "lr": 1e-6,
    "routing_images": 64,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints of untrained networks: a backbone, a policy network, a menu that looks."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.manual_seed(0)
    normalization = bdf.data.image_sets.NO_NORMALIZATION
    backbone = make_network(CIFAR)
    backbone.normalization = normalization
    bdf.save(backbone, folder / "backbone.safetensors")
    policy = bdf.policy_resnet8(backbone.num_blocks)
    bdf.save(bdf.BlockDrop(backbone, policy), folder / "model.safetensors")
    menu, _ = make_look_model(sets=SETS)
    menu.backbone.normalization = normalization
    bdf.save(menu, folder / "menu.safetensors")
    return folder


def metrics(out):
    return json.loads((out / "metrics.json").read_text())


def assert_same(alone, together, gradients=True):
    """The gradients of the first step, and all figures."""
    outs = (alone, together) if gradients else ()
    found = [torch.load(out / "gradients.pt", weights_only=True) for out in outs]
    for one, other in zip(*found, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5 * float(a.abs().max()))
    for one, other in zip(metrics(alone), metrics(together), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if name != "images_per_second" and isinstance(value, int | float | list):
                assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def in_both(runs, tmp_path, **options):
    """Run stages alone and in two processes: their folders, in pairs."""
    pairs = []
    for index, (stage, config) in enumerate(runs):
        alone, together = (
            replace(config, out=tmp_path / f"{index}-{stage.__name__}-{name}")
            for name in ("alone", "together")
        )
        run_stage(stage, alone, **options)
        pairs.append((alone, together))
    together = [(stage, pair[1]) for (stage, _), pair in zip(runs, pairs, strict=True)]
    launch(2, partial(run_stages, **options), together)
    return [(alone.out, together.out) for alone, together in pairs]


@pytest.mark.slow
def test_gradients_are_those_of_one_process(files, tmp_path):
    """With frozen batch norm; the same images get the same samples, and figures are the same."""
    backbone, model = files / "backbone.safetensors", files / "model.safetensors"
    policy = {"static_images": 0, "backbone": backbone} | TINY
    runs = [
        (curriculum, Curriculum(**policy, usage_target=2.0)),
        (curriculum, Curriculum(**policy, estimator="arms", samples=3, blocks_per_epoch=5)),
        (finetune, Finetune(**TINY, static_images=32, model=model, bn="frozen", entropy=0.1)),
        (joint, Joint(**TINY | {"limit": 160}, held_out=64, model=files / "menu.safetensors")),
    ]
    for folders in in_both(runs, tmp_path):
        assert_same(*folders)


@pytest.mark.slow
def test_gradients_of_more_options(files, tmp_path):
    backbone, model = files / "backbone.safetensors", files / "model.safetensors"
    policy = {"static_images": 0} | TINY
    held_out = {"held_out": 63} | TINY | {"limit": 160}
    runs = [
        (pretrain, Pretrain(**TINY, init=backbone, drop_rate=0.5)),
        (pretrain, Pretrain(**TINY, init=backbone, droppable=True, chain_images=33)),
        (curriculum, Curriculum(**policy, backbone=backbone, estimator="flips", flips=2)),
        (finetune, Finetune(**policy, model=model, bn="all")),
        (finetune, Finetune(**policy, model=model, bn="active", samples=2, teacher=backbone)),
        (expert, Expert(**held_out, backbone=backbone, line_images=65, look=1, static_images=32)),
        (joint, Joint(**held_out, model=files / "menu.safetensors", policy_lr=1e-6, budget=2.5)),
        (joint, Joint(**held_out, backbone=backbone, static=3, static_set="random_k_per_image")),
    ]
    for folders in in_both(runs, tmp_path):
        assert_same(*folders)


@pytest.mark.slow
def test_gradients_of_the_systems(files, tmp_path):
    backbone, model = files / "backbone.safetensors", files / "model.safetensors"
    gates = {"free_epochs": 0, "policy_lr": 1e-6} | TINY
    policy = {"static_images": 0, "samples": 2, "estimator": "leave_one_out"} | TINY
    runs = [
        (sequential, Sequential(**policy, backbone=backbone, usage_target=2.0)),
        (halting, Halting(**gates, backbone=backbone, tau=0.1)),
        (exits, Exits(**TINY, backbone=backbone, held_out=63, head_lr=1e-6)),
        (lccl, Lccl(**gates, model=backbone, sparsity=1.0)),
        (sact, Sact(**gates, model=backbone, tau=0.1)),
        (pfec, Pfec(**TINY, model=model, ratios=(0.5,) * len(CIFAR.layers))),
    ]
    for folders in in_both(runs, tmp_path):
        assert_same(*folders)


@pytest.mark.slow
def test_stages_that_do_not_train(files, tmp_path):
    backbone, model = files / "backbone.safetensors", files / "model.safetensors"
    runs = [
        (heuristics, Heuristics(limit=96, threads=1, model=model, keep=2)),
        (cascade, Cascade(limit=96, threads=1, networks=(backbone, backbone), held_out=63)),
    ]
    (one, two), (three, four) = in_both(runs, tmp_path)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir()) == ["heuristics.json"]
    assert (one / names[0]).read_text() == (two / names[0]).read_text()
    assert metrics(three) == metrics(four)


@pytest.mark.slow
def test_batch_statistics_are_those_of_a_process(files, tmp_path):
    """What docs/distributed.md names as the difference, and nothing is hidden by the tolerance."""
    config = Pretrain(**TINY, init=files / "backbone.safetensors")
    ((alone, together),) = in_both([(pretrain, config)], tmp_path, frozen=False)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(alone, together)
    # Before the first batch norm nothing differs: its running mean is that of all images.
    one, other, before = (
        bdf.load_backbone(file).bn1.running_mean
        for file in (alone / MODEL_FILE, together / MODEL_FILE, config.init)
    )
    assert not torch.allclose(one, before, atol=1e-3)
    torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_counted_statistics_are_those_of_one_process(files, tmp_path):
    """Bit for bit, where weights are; each process counts all images."""
    options = {"static_images": 0, "statistics_images": 80} | TINY | {"lr": 0.0}
    runs = [
        (curriculum, Curriculum(**options, backbone=files / "backbone.safetensors")),
        (finetune, Finetune(**options, model=files / "model.safetensors", bn="active")),
        (finetune, Finetune(**options, model=files / "model.safetensors", bn="all")),
    ]
    before = bdf.load(files / "model.safetensors").state_dict()
    for folders in in_both(runs, tmp_path, frozen=False):
        one, other = (bdf.load(out / MODEL_FILE).state_dict() for out in folders)
        for name, value in one.items():
            if not name.endswith("num_batches_tracked"):
                assert torch.equal(other[name], value), name
        name = "policy.network.bn1.running_mean"
        assert not torch.allclose(one[name], before[name], atol=1e-3)


def masked_steps(out):
    """Steps of ``--sync-bn``, in float64; one block is kept in one process alone, one in none."""
    torch.manual_seed(0)
    network = make_network(CIFAR).double().train()
    images, labels = torch.randn(16, 3, 32, 32).double(), torch.randint(10, (16,))
    decisions = torch.rand(16, 5) < 0.6
    decisions[1::2, 1] = decisions[:, 3] = False
    config = Pretrain(sync_bn=True, device="cpu")
    with distributed.processes(config), on_cpu():
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        distributed.synchronize_batch_norm(config, network, False)
        run = distributed.parallel(network, [optimizer])
        own = [distributed.own(each) for each in (images, decisions, labels)]
        for _ in range(2):
            distributed.average_statistics(network)
            loss = run(lambda x, keep, y: F.cross_entropy(masked_pass(network, x, keep), y), *own)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if distributed.is_first():
            torch.save(network.state_dict(), out)


@pytest.mark.slow
def test_synchronised_batch_statistics_are_those_of_the_batch(tmp_path):
    """Torch's layers, with kernels of our own, as torch has some for GPUs only."""
    masked_steps(tmp_path / "alone.pt")
    launch(2, masked_steps, tmp_path / "together.pt")
    one, other = (torch.load(tmp_path / f"{name}.pt") for name in ("alone", "together"))
    before = make_network(CIFAR).double().state_dict()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-12)
    some, none = ("segments.0.1.conv1.weight", "segments.2.0.conv1.weight")
    assert not torch.equal(one[some], before[some])
    assert torch.equal(one[none], before[none])


@pytest.mark.slow
def test_figures_with_synchronised_batch_norm(files, tmp_path):
    """Not gradients: float32 batch norm in train mode has them to a hundredth."""
    tiny = TINY | {"sync_bn": True}
    policy, gates = {"static_images": 0} | tiny, {"free_epochs": 0, "policy_lr": 1e-6} | tiny
    held_out = {"held_out": 63, "static_images": 32} | tiny | {"limit": 160}
    backbone, model = files / "backbone.safetensors", files / "model.safetensors"
    runs = [
        (pretrain, Pretrain(**tiny, init=backbone)),
        (curriculum, Curriculum(**policy, backbone=backbone)),
        (finetune, Finetune(**policy, model=model, bn="all")),
        (finetune, Finetune(**policy, model=model, bn="frozen")),
        (expert, Expert(**held_out, backbone=backbone, line_images=65, look=1)),
        (lccl, Lccl(**gates, model=backbone, sparsity=1.0)),
        (sact, Sact(**gates, model=backbone, tau=0.1)),
        (pfec, Pfec(**tiny, model=backbone, ratios=(0.5,) * len(CIFAR.layers))),
    ]
    for folders in in_both(runs, tmp_path, frozen=False):
        assert_same(*folders, gradients=False)


@pytest.mark.slow
def test_exits_with_synchronised_batch_norm(files, tmp_path):
    """In float64, gradients too.

    Untrained exits are equally sure of all images: the weights of their rules are 100,000, so that
    float32's roundings let one image in 300 leave elsewhere.
    """
    options = TINY | {"limit": 160, "sync_bn": True, "backbone": files / "backbone.safetensors"}
    runs = [(exits, Exits(**options, held_out=63, head_lr=1e-6))]
    ((alone, together),) = in_both(runs, tmp_path, frozen=False, float64=True)
    assert_same(alone, together)
    one, other = (bdf.load(out / MODEL_FILE).policy.rules for out in (alone, together))
    assert one.abs().max() > 1000
    torch.testing.assert_close(other, one)


@pytest.mark.slow
def test_image_files(tmp_path):
    """Processes share them, in training and in evaluation; the last batch is uneven."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 5), ("val", 3)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count - (name == "b")):
                coarse = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
                image = Image.fromarray(coarse.numpy()).resize((90, 80))
                image.save(tmp_path / split / name / f"{index}.png")
    torch.manual_seed(0)
    network = make_network(replace(BOTTLENECK, num_classes=2))
    network.normalization = bdf.data.image_sets.NO_NORMALIZATION
    bdf.save(network, tmp_path / "backbone.safetensors")
    options = TINY | {"limit": None, "batch_size": 4, "data": tmp_path}
    policy = {"backbone": tmp_path / "backbone.safetensors", "static_images": 5}
    runs = [
        (pretrain, Pretrain(**options, init=policy["backbone"])),
        (curriculum, Curriculum(**options, **policy)),
    ]
    for folders in in_both(runs, tmp_path):
        assert_same(*folders)


@pytest.mark.parametrize("processes", [2, 3])
def test_samples_of_an_image_do_not_depend_on_the_processes(monkeypatch, processes):
    torch.manual_seed(0)
    images, blocks = 6 * processes, 5
    probabilities = torch.rand(images, blocks)
    decisions = sample(probabilities, 3, 1, torch.Generator().manual_seed(1))
    draws = {
        "sample": lambda p, _, generator: sample(p, 3, 1, generator),
        "arms": lambda p, _, generator: sample_antithetic(p, 3, 1, generator),
        "flips": lambda _, u, generator: flip(u, 1, 2, generator),
    }
    for name, draw in draws.items():
        expected = draw(probabilities, decisions, torch.Generator().manual_seed(2))
        for rank in range(processes):
            with monkeypatch.context() as context:
                context.setattr(distributed, "rank", lambda rank=rank: rank)
                context.setattr(distributed, "count", lambda: processes)
                own = distributed.own(probabilities), distributed.own(decisions, 1)
                found = draw(*own, torch.Generator().manual_seed(2))
                assert torch.equal(found, expected[:, rank::processes]), name


def test_every_process_has_its_images_of_each_batch(monkeypatch):
    dataset = bdf.data.batches.load_digits().train.subset(71)
    backbone = make_network(CIFAR)

    def epoch(rank, count, batch_size):
        with monkeypatch.context() as context:
            context.setattr(distributed, "rank", lambda: rank)
            context.setattr(distributed, "count", lambda: count)
            config = Pretrain(seed=3)
            return list(training_batches(backbone, dataset, config, 1, batch_size, numbered=True))

    for batch_size in (16, 1000):  # 1000: what three processes can share of 71 images
        parts = [epoch(rank, 3, batch_size // 3 * 3) for rank in range(3)]
        whole = epoch(0, 1, min(batch_size // 3 * 3, 69))
        assert len(whole) == len(parts[0])
        for (images, numbers), *own in zip(whole, *parts, strict=True):
            for rank, (some, their_numbers) in enumerate(own):
                assert torch.equal(some, images[rank::3])
                assert torch.equal(their_numbers, numbers[rank::3])
    with pytest.raises(ValueError, match="71 images cannot be shared by 72"):
        epoch(0, 72, 144)
    with pytest.raises(ValueError, match=r"shard: expected .* batch_size 4, got \(0, 5\)"):
        bdf.data.batches.batches_of(dataset, 4, shard=(0, 5))


@pytest.mark.slow
def test_resume_with_other_numbers_of_processes(files, tmp_path):
    """2, then 1, then 2: the weights of one process throughout, with frozen batch norm."""
    options = FEW | {"limit": 128, "epochs": 3, "lr": 0.02, "drop_rate": 0.5}
    config = Pretrain(**options, init=files / "backbone.safetensors", out=tmp_path / "changing")
    launch(2, partial(run_stages, epochs=1), [(pretrain, config)])
    run_stage(pretrain, replace(config, resume=True), epochs=1)
    launch(2, run_stages, [(pretrain, replace(config, resume=True))])
    run_stage(pretrain, replace(config, out=tmp_path / "alone"))
    assert [row["epoch"] for row in metrics(config.out)] == [1, 2, 3]
    one, other = (
        bdf.load_backbone(tmp_path / name / "model.safetensors").state_dict()
        for name in ("alone", "changing")
    )
    started = bdf.load_backbone(config.init).state_dict()
    for name, weight in one.items():
        if weight.is_floating_point():
            moved = float((weight - started[name]).abs().max())
            torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-3 * moved + 1e-6)


def start(config, count=2):
    """Processes of ``python -m train pretrain``, with their errors."""
    options = [
        f"--{name.replace('_', '-')}={getattr(config, name)}"
        for name in ("init", "out", "limit", "batch_size", "threads", "epochs", "timeout")
    ]
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-m", "train", "pretrain", *options],
            cwd=ROOT,
            env=os.environ | environment(rank, count, port),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_process_ends_the_other(files, tmp_path, how):
    timeout = 10
    init, out = files / "backbone.safetensors", tmp_path / "run"
    config = Pretrain(init=init, out=out, **FEW | {"epochs": 10_000}, timeout=timeout)
    first, second = started = start(config)
    try:
        deadline = time.monotonic() + 600
        while not (out / "state.pt").exists():
            assert time.monotonic() < deadline
            assert first.poll() is None
            time.sleep(0.1)
        second.send_signal(how)
        lost = time.monotonic()
        error = first.communicate(timeout=600)[1]
        # Beyond the timeout: machines may be busy.
        assert time.monotonic() - lost < timeout + 60
    finally:
        for process in started:
            process.kill()
    assert first.returncode == 1
    message = error.strip().splitlines()[-1]
    assert message.startswith("pretrain: process 0 of 2 has lost another one (")
    assert "the last checkpoint in" in message
    assert "--resume goes on from it" in message
    done = torch.load(out / "state.pt", weights_only=True)["epoch"]
    run_stage(pretrain, replace(config, resume=True), frozen=False, epochs=1)
    assert torch.load(out / "state.pt", weights_only=True)["epoch"] == done + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 33}, "batch_size: expected a multiple of the 2 processes, got 33"),
        ({"sync_bn": True}, "sync_bn: torch's SyncBatchNorm is for GPUs, this run is on a CPU"),
        ({"sync_bn": True, "drop_rate": 0.5}, "sync_bn: this training skips blocks"),
    ],
)
def test_what_does_not_go_is_said(monkeypatch, tmp_path, options, message):
    monkeypatch.setattr(distributed, "count", lambda: 2)
    with pytest.raises(ValueError, match=message):
        pretrain(Pretrain(arch="resnet8", out=tmp_path, device="cpu", **FEW | options))


def test_synchronised_batch_norm_is_another_module_of_the_same_model(files, monkeypatch, tmp_path):
    """What GPUs would train: engines and files take it, and freezing finds it."""
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "device_for", lambda _: torch.device("cuda"))
    model, plain = (bdf.load(files / "model.safetensors").eval() for _ in range(2))
    distributed.synchronize_batch_norm(Pretrain(sync_bn=True), model, skips_blocks=False)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
    images = torch.rand(4, 3, 32, 32)
    assert torch.equal(bdf.compile(model)(images).logits, bdf.compile(plain)(images).logits)
    bdf.save(model, tmp_path / "model.safetensors")
    saved = bdf.load(tmp_path / "model.safetensors").state_dict()
    assert all(torch.equal(saved[name], one) for name, one in plain.state_dict().items())
    freeze_batch_norm(model.train())
    assert not any(isinstance(m, torch.nn.SyncBatchNorm) and m.training for m in model.modules())


def test_the_demo_runs_in_one_process(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train", "demo", "--out", str(tmp_path)])
    monkeypatch.setattr(distributed, "count", lambda: 2)
    with pytest.raises(SystemExit, match="demo: runs in one process, without torchrun"):
        command.main()


@pytest.mark.slow
def test_torchrun_runs_a_recipe(tmp_path):
    """As a user would, all stages; one process prints and writes."""
    arguments = "recipe --recipe paper --arch resnet8 --epochs 1 --limit 64 --threads 1"
    port = ["--master-port", str(free_port())]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *port]
    options = [*arguments.split(), "--static-images", "0", "--out", str(tmp_path)]
    found = subprocess.run(
        [*torchrun, "-m", "train", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    assert "find_unused_parameters" not in found.stderr  # in its stages all weights are used
    assert found.stdout.count("epoch 1:") == 3
    assert found.stdout.count("full network") == 1
    assert (tmp_path / "recipe.json").exists()
