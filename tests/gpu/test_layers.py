"""cuDNN's fused convolutions on a GPU: `make gpu-check`. Everywhere else these tests are skipped.

What they compute is ``alpha1 * conv + alpha2 * z + bias`` before ReLU. Without a residual torch
passes the output itself as z, with alpha2 = 0: an implementation that multiplied what happens to be
there by 0 would give NaN where that is NaN.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import blockdrop_fast as bdf
from blockdrop_fast.executors.layers import Conv
from blockdrop_fast.executors.recording import tuned_convolutions
from blockdrop_fast.measure import baselines
from blockdrop_fast.measure.tolerance import make_reference
from blockdrop_fast.networks.folding import FoldedConv, fold_network
from tests.gpu.conditions import on_gpu
from tests.random_networks import BOTTLENECK, CIFAR, make_network, random_images

pytestmark = on_gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# c_in, c_out, kernel, stride, size: a stem, ResNet-101's at 14x14 and 7x7, a CIFAR network's.
CONVS = [
    (3, 64, 7, 2, 56),
    (1024, 256, 1, 1, 14),
    (256, 256, 3, 1, 14),
    (512, 512, 3, 2, 14),
    (512, 2048, 1, 1, 7),
    (3, 16, 3, 1, 32),
    (16, 16, 3, 1, 32),
    (64, 64, 3, 1, 8),
]
ERROR = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-9}  # TF32 is allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conv", CONVS, ids=str)
@pytest.mark.parametrize("batch", [1, 33])
def test_fused_relu_leaves_nothing_of_what_was_in_its_output(
    dtype, conv, batch, poison_free_memory
):
    c_in, c_out, kernel, stride, size = conv
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*sizes):
        values = torch.randn(sizes, generator=generator, device="cuda").to(dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(sizes) == 4 else values

    weight = random(c_out, c_in, kernel, kernel) / (kernel * c_in**0.5)
    folded = FoldedConv(weight, random(c_out), stride, kernel // 2)
    layer, x = Conv(folded), random(batch, c_in, size, size)
    exact = F.conv2d(x.double(), weight.double(), folded.bias.double(), stride, kernel // 2)
    other = random(*exact.shape)
    with torch.no_grad(), tuned_convolutions():
        for _ in range(3):  # cuDNN's tries, then its choice
            poison_free_memory()
            plain = layer.relu(x)
            poison_free_memory()
            added = layer.add_relu(x, other)
            for result, expected in ((plain, exact), (added, exact + other.double())):
                assert not result.isnan().any()
                error = (result.double() - expected.relu()).abs().max()
                assert error <= ERROR[dtype] * expected.abs().max()


@pytest.mark.parametrize("config", [CIFAR, BOTTLENECK], ids=["basic", "bottleneck"])
@pytest.mark.parametrize("way", ["cudnn-graph", "dense", "eager"])
def test_nothing_is_left_of_an_earlier_call_with_nan(config, way):
    """Of a captured graph too, whose buffers the caching allocator does not hand out again."""
    dtype, network = torch.bfloat16, make_network(config).cuda()
    images = random_images(64, dtype, device="cuda")
    if way == "dense":
        engine = bdf.compile(network, dtype=dtype, strategy="dense")
        run = lambda batch: engine(batch).logits  # noqa: E731
    else:
        folded = fold_network(network, dtype)
        make = {"eager": lambda: baselines.torch_eager(folded)}
        make["cudnn-graph"] = lambda: baselines.cudnn_graph(folded, images)
        call = make[way]()
        run = lambda batch: call(batch, None)  # noqa: E731
    with torch.no_grad():
        for _ in range(3):
            run(torch.full_like(images, torch.nan))
            make_reference(network, images, None, dtype).check(way, run(images))
