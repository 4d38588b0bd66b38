"""Complete networks in other engines, and CUDA graphs of them."""

from __future__ import annotations

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
