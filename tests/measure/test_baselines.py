"""Complete networks in other engines, and CUDA graphs of them."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.measure import baselines
from blockdrop_fast.measure.tolerance import make_reference
from blockdrop_fast.measure.workload import settle
from blockdrop_fast.networks.folding import fold_network
from tests.random_networks import GROUPED

PACKAGES = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino", "onnx")}


@pytest.mark.parametrize(
    "backbone",
    [
        bdf.resnet_cifar(8, shortcut="subsample"),
        bdf.ResNet(bdf.ResNetConfig("bottleneck", (1, 1), (4, 8), "imagenet", "projection", 7)),
        bdf.ResNet(GROUPED),
    ],
    ids=["subsample", "imagenet", "grouped"],
)
@pytest.mark.parametrize("name", ["eager", "onnxruntime", "openvino"])
def test_baselines_run_other_architectures(backbone, name):
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package)
    torch.manual_seed(0)
    settle(backbone.eval())
    images = torch.randn(64, 3, 32, 32)
    folded = fold_network(backbone, torch.float32)
    if name == "eager":
        call = baselines.torch_eager(folded)
    else:
        call = getattr(baselines, name)(folded, images)
    with torch.inference_mode():
        logits = call(images, None)
    make_reference(backbone, images, None, torch.float32).check(name, logits)


@pytest.mark.parametrize("masked", [False, True])
def test_captured_takes_its_arguments_over_at_each_call(fake_cuda, masked):
    def run(images, keep):
        out = torch.empty(2, 3)

        def operation():
            rows = images.mean((2, 3))
            out.copy_(rows if keep is None else rows * keep)

        operation()
        if fake_cuda.current is not None:
            fake_cuda.current.recorded.append(operation)
        return out

    images, keep = torch.randn(2, 3, 4, 4), torch.ones(2, 3, dtype=torch.bool)
    call = baselines.captured(run, images, keep if masked else None)
    for seed in range(2):
        torch.manual_seed(seed)
        images, keep = torch.randn(2, 3, 4, 4), torch.rand(2, 3) < 0.5
        expected = images.mean((2, 3)) * (keep if masked else 1)
        torch.testing.assert_close(call(images, keep), expected)


def test_cpu_baselines_say_why_they_cannot_run(workload):
    with pytest.raises(baselines.UnavailableError, match=r"float32 only, not on cpu in .*float64"):
        baselines.openvino(workload.folded, workload.images.double())
    with pytest.raises(baselines.UnavailableError, match="needs a GPU, not cpu"):
        baselines.cudnn_graph(workload.folded, workload.images)
    with pytest.raises(baselines.UnavailableError, match="no_such_package is not installed"):
        baselines._optional("no_such_package")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_when_it_is_built_for_no_time_later():
    """Bottlenecks of ImageNet, as in ResNet-101; calls of one shape compile nothing more."""
    config = bdf.ResNetConfig("bottleneck", (1, 1), (4, 8), "imagenet", "projection", 7)
    backbone = bdf.ResNet(config)
    settle(backbone.eval())
    images = torch.randn(64, 3, 32, 32)
    with torch.no_grad():
        call = baselines.torch_compiled(fold_network(backbone, torch.float32), images[:16])
    with torch.inference_mode(), torch.compiler.set_stance("fail_on_recompile"):
        logits = torch.cat([call(part, None).clone() for part in images.split(16)])
    make_reference(backbone, images, None, torch.float32).check("compile", logits)


@pytest.mark.slow
def test_compiled_without_a_compiler_says_so():
    """In a process of its own: PyTorch finds its compiler once."""
    code = (
        "import torch, torch._inductor.config as config\n"
        "config.cpp.cxx = ('no-such-compiler',)\n"
        "import blockdrop_fast as bdf\n"
        "from blockdrop_fast.measure import baselines\n"
        "from blockdrop_fast.networks.folding import fold_network\n"
        "network = fold_network(bdf.resnet_cifar(8), torch.float32)\n"
        "try:\n"
        "    baselines.torch_compiled(network, torch.zeros(2, 3, 8, 8))\n"
        "except baselines.UnavailableError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.stdout.startswith("torch.compile fails here: InvalidCxxCompiler: "), result.stderr
