"""What BlockDrop has to beat: the complete ResNet in other engines, and the authors' way.

All run the same folded weights; on a GPU cuDNN tries its algorithms for them. ONNX Runtime and
OpenVINO are optional (the extra ``[baselines]``) and imported only when they are asked for.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockdrop_fast.executors.dense import DenseExecutor
from blockdrop_fast.executors.recording import tuned_convolutions
from blockdrop_fast.networks.blockdrop import BlockDrop
from blockdrop_fast.networks.folding import FoldedConv, FoldedNetwork
from blockdrop_fast.networks.resnet import AveragePoolShortcut, ResNet, SubsampleShortcut

Call = Callable[[Tensor, Tensor], Tensor]
ONNX_OPSET = 17


class UnavailableError(RuntimeError):
    """A baseline cannot run here; the message says why."""


class FoldedResNet(nn.Module):
    """A complete ResNet in plain torch: batch norm folded in, channels-last, nothing dropped."""

    def __init__(self, network: FoldedNetwork):
        super().__init__()
        self.imagenet = network.config.stem == "imagenet"
        self.stem = _conv_module(network.stem)
        self.blocks = nn.ModuleList(
            nn.ModuleList(_conv_module(conv) for conv in block.convs) for block in network.blocks
        )
        self.shortcuts = nn.ModuleList(
            _conv_module(block.shortcut)
            if isinstance(block.shortcut, FoldedConv)
            else block.shortcut or nn.Identity()
            for block in network.blocks
        )
        self.fc = nn.Linear(
            network.fc_weight.shape[1],
            network.fc_weight.shape[0],
            device=network.fc_weight.device,
            dtype=network.fc_weight.dtype,
        )
        self.fc.weight.data, self.fc.bias.data = network.fc_weight, network.fc_bias

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, num_classes) logits."""
        x = F.relu(self.stem(images.contiguous(memory_format=torch.channels_last)), inplace=True)
        if self.imagenet:
            x = F.max_pool2d(x, 3, 2, 1)
        for convs, shortcut in zip(self.blocks, self.shortcuts, strict=True):
            residual = shortcut(x)
            for conv in convs[:-1]:
                x = F.relu(conv(x), inplace=True)
            x = F.relu(convs[-1](x).add_(residual), inplace=True)
        return self.fc(x.mean((2, 3)))


def _conv_module(folded: FoldedConv) -> nn.Conv2d:
    out_channels, group_channels, height, width = folded.weight.shape
    module = nn.Conv2d(
        group_channels * folded.groups,
        out_channels,
        (height, width),
        folded.stride,
        folded.padding,
        groups=folded.groups,
        device=folded.weight.device,
        dtype=folded.weight.dtype,
    )
    module.weight.data, module.bias.data = folded.weight, folded.bias
    return module


def torch_eager(network: FoldedNetwork) -> Call:
    """The complete ResNet in eager PyTorch, folded and channels-last."""
    module = FoldedResNet(network).eval()

    def call(images: Tensor, _: Tensor) -> Tensor:
        with tuned_convolutions():
            return module(images)

    return call


def torch_compiled(network: FoldedNetwork, images: Tensor) -> Call:
    """The same under ``torch.compile`` with frozen weights, one compilation a batch size.

    On a GPU with what ``mode="max-autotune"`` stands for, CUDA graphs among it. Frozen weights
    and max-autotune together turn 1x1 convolutions into matrix products.

    Args:
        network: folded.
        images: (B, 3, H, W); it compiles for this shape at once, which on a GPU takes minutes.

    Raises:
        UnavailableError: it cannot compile here, as without a C++ compiler.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # a second of imports, for this alone

    # Compilations of one function are limited, whatever module they are for; beyond the limit it
    # would silently run eagerly.
    torch.compiler.reset()
    module = FoldedResNet(network).eval()
    options: dict[str, bool] = {"freezing": True}
    if images.device.type == "cuda":
        options |= {
            "max_autotune": True,
            "coordinate_descent_tuning": True,
            "triton.cudagraphs": True,
        }
    compiled = torch.compile(module, dynamic=False, options=options)

    def call(images: Tensor, _: Tensor) -> Tensor:
        return compiled(images)

    try:
        with torch.inference_mode(), tuned_convolutions():
            call(images, None)
            if images.device.type == "cuda":
                for _ in range(2):  # captures the graph; replays it
                    call(images, None)
    except BackendCompilerFailed as error:
        why = f"{type(error.inner_exception).__name__}: {error.inner_exception}".splitlines()[0]
        raise UnavailableError(f"torch.compile fails here: {why}") from None
    return call


def cudnn_graph(network: FoldedNetwork, images: Tensor) -> Call:
    """The complete ResNet as one captured CUDA graph of cuDNN's fused convolutions.

    Args:
        network: folded, on a GPU.
        images: (B, 3, H, W), whose shape is captured.

    Raises:
        UnavailableError: not on a GPU.
    """
    if images.device.type != "cuda":
        raise UnavailableError(f"captures a CUDA graph, which needs a GPU, not {images.device}")
    executor = DenseExecutor(network)
    replay = captured(lambda images, _: executor.run_complete(images), images, None)
    return lambda images, _: replay(images, None)


def captured(
    run: Callable[[Tensor, Tensor | None], Tensor], images: Tensor, decisions: Tensor | None
) -> Call:
    """A function as a CUDA graph; cuDNN tries its algorithms before it is captured.

    A call copies its arguments into the graph's inputs, which also makes images channels-last,
    and returns the graph's output, which the next call overwrites.

    Args:
        run: (images, decisions) -> logits, without synchronisation.
        images, decisions: on a GPU; arguments of these shapes are captured. Without decisions
            here, a call does not take any over.
    """
    with torch.cuda.device(images.device), torch.no_grad(), tuned_convolutions():
        static = torch.empty_like(images, memory_format=torch.channels_last).copy_(images)
        keep = None if decisions is None else decisions.clone()
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(3):  # what is chosen or allocated at first calls is no part of a graph
                run(static, keep)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = run(static, keep)

    def call(images: Tensor, decisions: Tensor | None) -> Tensor:
        static.copy_(images)
        if keep is not None:
            keep.copy_(decisions)
        graph.replay()
        return logits

    return call


def onnxruntime(network: FoldedNetwork, images: Tensor) -> Call:
    """The complete ResNet in ONNX Runtime on the CPU, with torch's number of threads.

    Args:
        network: float32, on the CPU.
        images: (B, 3, H, W), whose shape is compiled in.

    Raises:
        UnavailableError: not installed, or not on the CPU in float32.
    """
    _need_cpu_float32(images)
    runtime = _optional("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its idle threads would otherwise spin into the next contender's time.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(
        onnx_model(network, tuple(images.shape)),
        options,
        providers=["CPUExecutionProvider"],
    )
    return lambda images, _: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def openvino(network: FoldedNetwork, images: Tensor) -> Call:
    """The complete ResNet in OpenVINO on the CPU in float32, with torch's number of threads.

    Args, Raises: as of ``onnxruntime``.
    """
    _need_cpu_float32(images)
    os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")
    runtime = _optional("openvino")
    core = runtime.Core()
    model = core.read_model(onnx_model(network, tuple(images.shape)))
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        },
    )
    request = compiled.create_infer_request()

    def call(images: Tensor, _: Tensor) -> Tensor:
        # The request reuses its output buffer, so the few logits are copied out of it.
        outputs = request.infer({0: images.numpy()}, share_inputs=True, share_outputs=True)
        return torch.from_numpy(outputs[0].copy())

    return call


def _need_cpu_float32(images: Tensor) -> None:
    if images.device.type != "cpu" or images.dtype != torch.float32:
        raise UnavailableError(
            f"runs on the CPU in float32 only, not on {images.device} in {images.dtype}"
        )


def _optional(package: str):
    try:
        return __import__(package)
    except ImportError as error:
        raise UnavailableError(
            f"{package} is not installed ({error}); pip install 'blockdrop_fast[baselines]'"
        ) from None


def authors_way(model: BlockDrop, dtype: torch.dtype) -> Call:
    """The BlockDrop authors' execution: compute, then multiply by the mask.

    Unfolded batch norm, channels-first, a block computed for all images as soon as one keeps it:
    ``relu(residual + F(x)) * mask + residual * (1 - mask)``. The policy network runs, too; the
    decisions executed are the given ones.

    Args:
        model: in eval mode.
        dtype: of weights and images.
    """
    model = copy.deepcopy(model).to(dtype)
    backbone, policy = model.backbone, model.policy

    def call(images: Tensor, decisions: Tensor) -> Tensor:
        policy(images)
        return masked_forward(backbone, images, decisions)

    return call


def masked_forward(backbone: ResNet, images: Tensor, decisions: Tensor) -> Tensor:
    """The backbone's part of ``authors_way``, also of the authors' training."""
    x = backbone.stem(images)
    for k, (block, shortcut) in enumerate(backbone.blocks()):
        residual = shortcut(x)
        mask = decisions[:, k].to(x.dtype)[:, None, None, None]
        if mask.sum() == 0:
            x = residual
            continue
        kept = F.relu(residual + block(x))
        x = kept * mask + residual * (1 - mask)
    return backbone.classifier(x)


def onnx_model(network: FoldedNetwork, shape: tuple[int, int, int, int]) -> bytes:
    """A complete folded ResNet as a serialised ONNX model, "images" -> "logits".

    Written node by node: torch's exporter needs two more packages and some ten seconds a network.

    Args:
        network: float32, on the CPU.
        shape: of the images, (B, 3, H, W).

    Raises:
        UnavailableError: the package onnx is not installed.
    """
    _optional("onnx")
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], []

    def constant(value: Tensor) -> str:
        name = f"constant{len(constants)}"
        constants.append(numpy_helper.from_array(value.contiguous().numpy(), name))
        return name

    def node(operation: str, *inputs: str, **attributes) -> str:
        output = f"value{len(nodes)}"
        nodes.append(helper.make_node(operation, list(inputs), [output], **attributes))
        return output

    def conv(x: str, folded: FoldedConv) -> str:
        return node(
            "Conv", x, constant(folded.weight), constant(folded.bias),
            strides=[folded.stride] * 2, pads=[folded.padding] * 4, group=folded.groups,
        )  # fmt: skip

    def pad_channels(x: str, before: int, after: int) -> str:
        return node("Pad", x, constant(torch.tensor([0, before, 0, 0, 0, after, 0, 0])))

    def shortcut(x: str, module: FoldedConv | nn.Module | None) -> str:
        if isinstance(module, FoldedConv):
            return conv(x, module)
        if isinstance(module, AveragePoolShortcut):
            if module.stride > 1:
                size = [module.stride] * 2
                x = node("AveragePool", x, kernel_shape=size, strides=size)
            return pad_channels(x, 0, module.extra)
        if isinstance(module, SubsampleShortcut):
            starts, ends = torch.tensor([0, 0]), torch.tensor([2**31 - 1] * 2)
            axes, steps = torch.tensor([2, 3]), torch.tensor([module.stride] * 2)
            x = node("Slice", x, *map(constant, (starts, ends, axes, steps)))
            return pad_channels(x, module.before, module.after)
        return x

    x = node("Relu", conv("images", network.stem))
    if network.config.stem == "imagenet":
        x = node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for block in network.blocks:
        residual = shortcut(x, block.shortcut)
        for folded in block.convs[:-1]:
            x = node("Relu", conv(x, folded))
        x = node("Relu", node("Add", conv(x, block.convs[-1]), residual))
    x = node("Flatten", node("GlobalAveragePool", x))
    x = node("Gemm", x, constant(network.fc_weight), constant(network.fc_bias), transB=1)
    nodes[-1].output[0] = "logits"
    float32 = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "resnet",
        [helper.make_tensor_value_info("images", float32, shape)],
        [helper.make_tensor_value_info("logits", float32, (shape[0], len(network.fc_bias)))],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", ONNX_OPSET)])
    model.ir_version = 8  # what opset 17 came with: newer ones are refused by older runtimes
    return model.SerializeToString()
