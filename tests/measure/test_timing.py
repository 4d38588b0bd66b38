"""Timing contenders, the baselines, the published decisions and ``blockdrop benchmark``."""

from __future__ import annotations

import contextlib
import json
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.commands import benchmark, cli
from blockdrop_fast.machine import machine_info
from blockdrop_fast.measure import baselines, timing, tolerance
from blockdrop_fast.measure.published import PUBLISHED, fits, published_decisions
from blockdrop_fast.networks.folding import fold_network

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino", "onnx")}


@pytest.fixture
def workload() -> benchmark.Workload:
    """ResNet-8 on 64 tiny images, each block dropped by about half of them."""
    torch.manual_seed(0)
    backbone = bdf.resnet_cifar(8)
    benchmark._settle(backbone)
    model = bdf.BlockDrop(backbone, bdf.policy_resnet8(3)).eval().requires_grad_(False)
    return benchmark.Workload("resnet8", model, torch.randn(64, 3, 8, 8), torch.rand(64, 3) < 0.5)


def test_interleave_is_round_robin_with_one_sample_a_round():
    order = []
    calls = {name: lambda index, name=name: order.append((name, index)) for name in "abc"}
    samples = timing.interleave(calls, rounds=3, warmup=0)
    # Quick calls get an untimed call of their own before each timed one.
    assert order == [(name, index) for index in range(3) for name in "abc" for _ in range(2)]
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys("abc", 3)


def test_interleave_warms_up_and_goes_on_for_the_minimal_time():
    seen = []
    samples = timing.interleave({"a": seen.append}, rounds=1, min_seconds=0.02, warmup=2)
    assert seen[:2] == [0, 1]
    assert len(samples["a"]) > 1
    assert sum(samples["a"]) <= 0.03 + samples["a"][-1]


def test_interleave_measures_seconds():
    samples = timing.interleave({"a": lambda _: time.sleep(0.02)}, rounds=2, warmup=0)
    assert all(0.02 <= value < 2 for value in samples["a"])


def test_interleave_needs_a_round():
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        timing.interleave({}, rounds=0)


@pytest.mark.parametrize("kind", ["baseline", "blockdrop"])
@pytest.mark.parametrize("fault", ["other decisions", "nan", "shape"])
def test_a_wrong_contender_is_not_timed(workload, kind, fault):
    timed = []

    def wrong(images, keep):
        timed.append(len(images))
        other = ~keep if kind == "blockdrop" else keep
        logits = workload.model.backbone(images, other)
        if fault == "nan":
            logits[0, 0] = float("nan")
        return logits[:, :-1] if fault == "shape" else logits

    batches = timing.chunks(32, workload.images, workload.decisions)
    with pytest.raises(tolerance.WrongLogitsError, match=r"^wrong: "):
        timing.time_contenders(
            [timing.Contender("wrong", wrong, kind)],
            batches,
            workload.all_kept,
            workload.at_decisions,
        )
    assert timed == [32, 32]


@pytest.mark.parametrize("fault", ["decisions", "logits", "shape"])
def test_a_contender_that_decides_wrongly_is_not_timed(workload, fault):
    def call(images, _):
        logits, keep = workload.model(images)
        if fault == "decisions":
            keep = torch.zeros_like(keep)  # the fastest ones there are
            logits = workload.model.backbone(images, keep)
        if fault == "shape":
            keep = keep[:, 1:]
        return bdf.Output(logits + (fault == "logits"), keep)

    workload = benchmark.fit_policy(workload)
    assert workload.policy_logits.logits.max() > workload.policy_logits.tolerance
    batches = timing.chunks(64, workload.images, workload.decisions)
    with pytest.raises(tolerance.WrongLogitsError, match=r"^wrong: "):
        timing.time_contenders(
            [timing.Contender("wrong", call, "decides")],
            batches,
            workload.all_kept,
            workload.at_decisions,
            workload.check_own,
        )


def test_a_contender_that_decides_is_read_at_its_own_decisions(workload):
    workload = benchmark.fit_policy(workload)
    measured = benchmark.measure(workload, 32, ["eager", "gather-all", "gather-decides"], rounds=2)
    row = measured.rows[-1]
    with torch.no_grad():
        decisions = workload.model(workload.images).decisions
    cost = bdf.flops(workload.model, decisions, image_size=8).view(2, 32).mean(1)
    assert row.flops == pytest.approx(float(cost.mean()))
    assert row.block_usage[0] == pytest.approx(float(decisions.sum(1).double().mean()))
    assert row.policies == len(decisions.unique(dim=0))
    assert row.share_of_own_bound > 0
    assert row.host_seconds is None


def test_fitted_policy_keeps_each_block_as_often(workload):
    fitted = benchmark.fit_policy(workload)
    with torch.no_grad():
        own = fitted.model(fitted.images).decisions
        before = workload.model(workload.images).decisions
    given = fitted.decisions
    assert torch.equal(given, workload.decisions)
    # An image's logit may be on the threshold.
    assert (own.sum(0) - given.sum(0)).abs().max() <= 1
    assert (own == given).double().mean() > (before == given).double().mean() + 0.1


def test_fitted_policy_meets_few_policies_exactly(workload):
    pool = torch.tensor([[0, 0, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1]]).bool()
    fitted = benchmark.fit_policy(workload.at(pool[torch.arange(64) % 4]))
    with torch.no_grad():
        assert torch.equal(fitted.model(fitted.images).decisions, fitted.decisions)


def test_workloads_share_engines_and_what_is_slow_to_build(workload, monkeypatch):
    built = []
    slow = ("baseline", lambda *_: built.append(1) or len(built))
    monkeypatch.setitem(benchmark.CONTENDERS, "compile", slow)
    images = workload.images[:8]
    assert workload.build("compile", images) == workload.first(8).build("compile", images) == 1
    assert workload.build("compile", images[:4]) == 2
    assert workload.engine("gather") is workload.at(~workload.decisions).engine("gather")
    assert workload.first(8).images.shape == workload.images[:8].shape


def test_reference_in_chunks(workload, monkeypatch):
    whole = tolerance.make_reference(
        workload.model.backbone, workload.images, workload.decisions, torch.float32
    )
    monkeypatch.setattr(tolerance, "REFERENCE_CHUNK", 24)
    split = tolerance.make_reference(
        workload.model.backbone, workload.images, workload.decisions, torch.float32
    )
    torch.testing.assert_close(split.logits, whole.logits, rtol=1e-12, atol=1e-12)
    assert split.tolerance == pytest.approx(whole.tolerance, rel=0.5)


def test_contender_names_are_unique(workload):
    right = timing.Contender("one", lambda images, _: workload.model.backbone(images), "baseline")
    batches = timing.chunks(64, workload.images, workload.decisions)
    with pytest.raises(ValueError, match="two are called 'one'"):
        timing.time_contenders(
            [right, right], batches, workload.all_kept, workload.at_decisions, rounds=1
        )


def test_chunks_are_whole_batches():
    values = torch.arange(6)
    assert [part.tolist() for (part,) in timing.chunks(2, values)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="divisor of the 6 images, got 4"):
        timing.chunks(4, values)


def test_tolerance_follows_the_rule(workload):
    reference = workload.at_decisions
    backbone, images, keep = workload.model.backbone, workload.images, workload.decisions
    eager = backbone(images, keep)
    exact = backbone.double()(images.double(), keep)
    error = float((eager.double() - exact).abs().max())
    eps = torch.finfo(torch.float32).eps
    assert torch.allclose(reference.logits, exact, rtol=1e-12, atol=1e-12)
    assert reference.tolerance == pytest.approx(
        2 * error + 4 * eps * float(exact.abs().max()), rel=1e-6
    )


@pytest.mark.parametrize("name", [name for name in benchmark.CONTENDERS if name != "compile"])
def test_every_contender_gives_right_logits(workload, name):
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package)
    kind, build = benchmark.CONTENDERS[name]
    for batch in (1, 64):
        batches = timing.chunks(batch, workload.images, workload.decisions)
        try:
            call = build(workload, batches[0][0])
        except baselines.UnavailableError as error:
            pytest.skip(str(error))
        executed = timing.check_contender(
            timing.Contender(name, call, kind),
            batches,
            workload.all_kept,
            workload.at_decisions,
            workload.check_own,
        )
        if kind == "blockdrop":
            assert torch.equal(executed, workload.decisions)
        else:
            assert (executed is None) == (kind != "decides")


@pytest.mark.parametrize(
    "backbone",
    [
        bdf.resnet_cifar(8, shortcut="subsample"),
        bdf.ResNet(bdf.ResNetConfig("bottleneck", (1, 1), (4, 8), "imagenet", "projection", 7)),
    ],
    ids=["subsample", "imagenet"],
)
@pytest.mark.parametrize("name", ["eager", "onnxruntime", "openvino"])
def test_baselines_run_other_architectures(backbone, name):
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package)
    torch.manual_seed(0)
    benchmark._settle(backbone.eval())
    images = torch.randn(64, 3, 32, 32)
    folded = fold_network(backbone, torch.float32)
    if name == "eager":
        call = baselines.torch_eager(folded)
    else:
        call = getattr(baselines, name)(folded, images)
    with torch.inference_mode():
        logits = call(images, None)
    tolerance.make_reference(backbone, images, None, torch.float32).check(name, logits)


class FakeGraph:
    """A CUDA graph without CUDA: what ``capture`` records, ``replay`` runs again."""

    current = None

    def __init__(self):
        self.recorded = []

    def replay(self):
        for operation in self.recorded:
            operation()


@pytest.fixture
def fake_cuda(monkeypatch):
    """Just enough of torch.cuda, on CPU tensors, for code that captures and times."""

    class Nothing(contextlib.nullcontext):
        def __init__(self, *_, **__):
            super().__init__()

        def wait_stream(self, _):
            pass

    class Capture:
        def __init__(self, graph, **_):
            self.graph = graph

        def __enter__(self):
            FakeGraph.current = self.graph

        def __exit__(self, *_):
            FakeGraph.current = None

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = time.perf_counter()

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1e3 * (end.time - self.time)

    properties = types.SimpleNamespace(L2_cache_size=1024)
    fakes = {
        "device": Nothing, "Stream": Nothing, "stream": Nothing, "current_stream": Nothing,
        "CUDAGraph": FakeGraph, "graph": Capture, "Event": Event,
        "get_device_properties": lambda _: properties,
        "_sleep": lambda cycles: time.sleep(cycles / 2e9), "synchronize": lambda: None,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.parametrize("masked", [False, True])
def test_captured_takes_its_arguments_over_at_each_call(fake_cuda, masked):
    def run(images, keep):
        out = torch.empty(2, 3)

        def operation():
            rows = images.mean((2, 3))
            out.copy_(rows if keep is None else rows * keep)

        operation()
        if FakeGraph.current is not None:
            FakeGraph.current.recorded.append(operation)
        return out

    images, keep = torch.randn(2, 3, 4, 4), torch.ones(2, 3, dtype=torch.bool)
    call = baselines.captured(run, images, keep if masked else None)
    for seed in range(2):
        torch.manual_seed(seed)
        images, keep = torch.randn(2, 3, 4, 4), torch.rand(2, 3) < 0.5
        expected = images.mean((2, 3)) * (keep if masked else 1)
        torch.testing.assert_close(call(images, keep), expected)


@pytest.mark.parametrize("host", [False, True])
def test_gpu_stopwatch_leaves_the_head_start_out(fake_cuda, host):
    stopwatch = timing._CudaStopwatch(torch.device("cpu"), host)
    took = stopwatch(lambda index: time.sleep(index), 0.01)
    assert 0.01 <= took < 1
    short = min(stopwatch(lambda _: None, 0) for _ in range(5))
    assert short < timing.HEAD_START_SECONDS


def test_cpu_baselines_say_why_they_cannot_run(workload):
    with pytest.raises(baselines.UnavailableError, match=r"float32 only, not on cpu in .*float64"):
        baselines.openvino(workload.folded, workload.images.double())
    with pytest.raises(baselines.UnavailableError, match="needs a GPU, not cpu"):
        baselines.cudnn_graph(workload.folded, workload.images)
    with pytest.raises(baselines.UnavailableError, match="no_such_package is not installed"):
        baselines._optional("no_such_package")


def test_measure_reads_its_samples(workload, monkeypatch):
    def unavailable(*_):
        raise baselines.UnavailableError("not here")

    monkeypatch.setitem(benchmark.CONTENDERS, "openvino", ("baseline", unavailable))
    names = ["eager", "openvino", "gather", "gather-all"]
    measured = benchmark.measure(workload, 16, names, rounds=3)
    assert measured.unavailable == {"openvino": "not here"}
    rows = {row.contender: row for row in measured.rows}
    assert list(rows) == ["eager", "gather", "gather-all"]
    for row in rows.values():
        assert len(row.samples) == 3
        assert row.seconds == sorted(row.samples)[1]
        assert row.images_per_second == pytest.approx(16 / row.seconds)
        assert row.speedup == pytest.approx(rows["eager"].seconds / row.seconds)
        assert row.share_of_bound == pytest.approx(row.speedup / row.flop_bound)
    complete = float(bdf.flops(workload.model.backbone, image_size=8))
    means = bdf.flops(workload.model, workload.decisions, image_size=8).view(4, 16).mean(1)
    assert rows["eager"].flops == complete
    # Three rounds ran the first three batches, policy network included.
    assert rows["gather"].flops == pytest.approx(float(means[:3].median()))
    assert rows["gather"].flop_bound == pytest.approx(complete / rows["gather"].flops)
    own = rows["gather-all"].seconds / rows["gather"].seconds / rows["gather"].flop_bound
    assert rows["gather"].share_of_own_bound == pytest.approx(own)
    assert rows["eager"].share_of_own_bound is None
    table = benchmark.format_rows(measured.rows)
    assert all(name in table for name in rows)


def test_a_strategy_that_does_not_serve_a_network_is_unavailable(workload):
    pytest.importorskip("blockdrop_fast._C")
    doubled = benchmark.Workload(
        "float64", workload.model.double(), workload.images.double(), workload.decisions
    )
    measured = benchmark.measure(doubled, 64, ["eager", "walk"], rounds=1)
    assert [row.contender for row in measured.rows] == ["eager"]
    assert "supports torch.float32 only" in measured.unavailable["walk"]


def test_measure_needs_a_baseline_and_known_names(workload):
    with pytest.raises(ValueError, match="at least one complete baseline"):
        benchmark.measure(workload, 64, ["gather"], rounds=1)
    with pytest.raises(ValueError, match=r"contenders: expected names out of .*got 'nothing'"):
        benchmark.measure(workload, 64, ["nothing"], rounds=1)


def test_quick_form_leaves_the_slow_cases_out():
    assert "compile" in benchmark.contender_names(quick=False)
    assert "compile" not in benchmark.contender_names(quick=True)
    assert "cudnn-graph" not in benchmark.contender_names(quick=False)
    on_gpu = benchmark.contender_names(quick=False, on_gpu=True)
    assert {"cudnn-graph", "walk-decides", "gather-decides", "compile"} < set(on_gpu)
    assert "openvino" not in on_gpu
    (run,) = benchmark.plan_runs(["resnet101"], (), quick=True, on_gpu=True)
    assert (run.batches, run.images) == ((1, 8, 64, 256), 256)
    small, large = benchmark.plan_runs(["resnet110", "resnet101"], (), quick=True)
    assert small.batches == (1, 8, 64)
    assert large.batches == (1, 8)
    full = benchmark.plan_runs(["resnet110", "resnet101"], (), quick=False)
    assert [run.batches for run in full] == [(1, 8, 64, 256), (1, 8, 64)]
    for run in (small, large, *full, *benchmark.plan_runs(["resnet32"], (3, 100), quick=False)):
        assert all(run.images % batch == 0 for batch in run.batches)


@pytest.mark.parametrize("network", PUBLISHED)
def test_committed_decisions_have_the_published_usage(network):
    usage, decisions = PUBLISHED[network], published_decisions(network)
    packed = np.load(ROOT / "benchmarks" / "decisions" / f"{network}.npy")
    committed = np.unpackbits(packed, axis=1, count=usage.num_blocks)
    assert (torch.from_numpy(committed).bool() == decisions).all()
    assert decisions.shape == (1024, usage.num_blocks)
    assert fits(usage, decisions)


def test_published_numbers_of_policies_and_flops():
    different = {name: len(published_decisions(name).unique(dim=0)) for name in PUBLISHED}
    assert different["resnet101"] == 10
    assert 300 <= different["resnet110"] <= 469
    # Table 3 with the policy network: 1.81e8; at equal usage the blocks kept matter by a few
    # per cent, as a segment's first block is cheaper.
    model = bdf.BlockDrop(bdf.resnet110(), bdf.policy_resnet8(54))
    mean = float(bdf.flops(model, published_decisions("resnet110")).mean())
    assert mean == pytest.approx(1.81e8, rel=0.05)


def test_published_decisions_of_an_unknown_network():
    with pytest.raises(ValueError, match=r"network: expected one of resnet32.*got 'resnet7'"):
        published_decisions("resnet7")


def test_machine_info_names_the_machine():
    info = machine_info()
    assert info["cpu"]
    assert info["torch"] == torch.__version__
    assert info["threads"] == torch.get_num_threads()
    json.dumps(info)


@pytest.mark.slow
def test_command_on_a_checkpoint(workload, tmp_path, capsys):
    torch.manual_seed(0)
    path = tmp_path / "small.safetensors"
    bdf.save(workload.model, path)
    out = tmp_path / "out.json"
    benchmark.command(str(path), batch=(32,), quick=True, contenders=("eager", "gather"), json=out)
    printed = capsys.readouterr().out
    assert "small" in printed
    assert "gather" in printed
    written = json.loads(out.read_text())
    assert [row["contender"] for row in written["rows"]] == ["eager", "gather"]
    assert written["machine"]["torch"] == torch.__version__


def test_command_refuses_a_bare_backbone(workload, tmp_path):
    path = tmp_path / "backbone.safetensors"
    bdf.save(workload.model.backbone, path)
    with pytest.raises(ValueError, match="holds no policy network"):
        benchmark.command(str(path), batch=(1,))
    with pytest.raises(ValueError, match="batch: expected positive"):
        benchmark.command("resnet32", batch=(0,))


def test_command_refuses_devices_that_are_not_here(monkeypatch):
    for device in ("abacus", "meta"):
        with pytest.raises(ValueError, match=f"device: expected cpu or cuda, got '{device}'"):
            benchmark.command("resnet32", device=device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device: torch .* finds no GPU here, got 'cuda'"):
        benchmark.command("resnet32", device="cuda")


@pytest.mark.slow
def test_command_line_knows_the_options(workload, tmp_path, capsys):
    path = tmp_path / "small.safetensors"
    bdf.save(workload.model, path)
    call = ["benchmark", "--model", str(path), "--batch", "16", "--quick", "--dtype", "bfloat16"]
    assert cli.main([*call, "--device", "cpu", "--contenders", "eager", "gather"]) == 0
    assert "gather" in capsys.readouterr().out
