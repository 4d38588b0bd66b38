"""The engine: a frozen model ready to execute. Start reading here.

images -> policy network -> decisions -> plan -> executor (walk | gather | dense) -> logits
                                                 ^ folded, packed weights
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from blockdrop_fast import triton_kernels
from blockdrop_fast._extension import build_record, extension_status
from blockdrop_fast.decisions import check_decisions, check_images
from blockdrop_fast.executors import crossover
from blockdrop_fast.executors.crossover import Crossover
from blockdrop_fast.executors.dense import DenseExecutor
from blockdrop_fast.executors.gather import GatherExecutor
from blockdrop_fast.executors.gather_graph import DTYPES as GRAPH_DTYPES
from blockdrop_fast.executors.gather_graph import GraphGatherExecutor, Launch
from blockdrop_fast.executors.recording import why_no_switches
from blockdrop_fast.executors.walk import WalkExecutor
from blockdrop_fast.executors.walk_half import WalkHalfExecutor
from blockdrop_fast.networks.blockdrop import BlockDrop, Output
from blockdrop_fast.networks.folding import FoldedNetwork, fold_network
from blockdrop_fast.networks.policy import decide
from blockdrop_fast.networks.resnet import ResNet, ResNetConfig

Strategy = Literal["auto", "walk", "gather", "dense"]
Walk = WalkExecutor | WalkHalfExecutor
Executor = Walk | GraphGatherExecutor | GatherExecutor | DenseExecutor
OLDEST_GPU = (8, 0)  # that the walk's matrix instructions run on
# Until `make gpu-check` has passed on a GPU, nobody gets those kernels without asking for them.
GPU_UNPROVEN = (
    "our GPU kernels have not run on a GPU yet: plain PyTorch; "
    "strategy='walk' and strategy='gather' ask for them"
)
ASKED_FOR = "asked for"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _exactly(method: Callable) -> Callable:
    """Run a method without gradients and at the engine's own precision, whatever autocast says."""

    @torch.inference_mode()
    @functools.wraps(method)
    def call(self: Engine, *args, **kwargs):
        if not torch.is_autocast_enabled(self.device.type):
            return method(self, *args, **kwargs)
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return call


class Engine:
    """A snapshot of a model that runs only the blocks its decisions keep. Made by ``compile``.

    Attributes:
        model: what the engine was compiled from, and takes over at ``refresh``.
        strategy: how the backbone is executed: "walk", "gather" or "dense".
        strategy_reason: why it is this one.
        config: the backbone's architecture.
        dtype: of weights and images; of logits too, but for the walk's on a GPU: float32.
        device: of weights and images.
    """

    def __init__(
        self,
        model: BlockDrop | ResNet,
        dtype: torch.dtype,
        strategy: Strategy,
        validate: bool,
        launch: Launch,
    ):
        self.model = model
        self.dtype = dtype
        self._asked = strategy
        self._validate = validate
        self._launch = launch
        self._table_key: tuple[ResNetConfig, torch.dtype, torch.device] | None = None
        self._table: Crossover | None = None
        self.refresh()

    def refresh(self) -> None:
        """Take over the model's present weights, batch-norm statistics and device."""
        self.config = self.backbone.config
        self.device = self.backbone.fc.weight.device
        _check_device(self.model, self.device)
        network = fold_network(self.backbone, self.dtype)
        self._executor, self.strategy_reason = self._choose_executor(network)
        self.strategy = _strategy_of(self._executor)
        # The walk on a GPU sums in float32, and gives its logits so.
        half_walk = isinstance(self._executor, WalkHalfExecutor)
        self._logits_dtype = torch.float32 if half_walk else self.dtype
        self._policy, self._decides_itself = None, False
        if isinstance(self.model, BlockDrop):
            self._policy_pool = self.model.policy.input_pool
            policy = fold_network(self.model.policy.network, self.dtype)
            # The policy network runs complete: by the walk where that serves it, else densely.
            if isinstance(self._executor, Walk):
                walk, _ = _find_walk(policy)
                self._policy = DenseExecutor(policy) if walk is None else walk
                self._decides_itself = self._executor.set_policy(policy, self._policy_pool)
            else:
                self._policy = DenseExecutor(policy)
            if isinstance(self._executor, GraphGatherExecutor):
                self._executor.set_policy(policy, self._policy_pool)
                self._decides_itself = True
            self._policy_config = policy.config

    def _choose_executor(self, network: FoldedNetwork) -> tuple[Executor, str]:
        """What executes the backbone, and why."""
        self._where_walk_loses = None
        if self._asked == "auto" and self.device.type == "cuda":
            return GatherExecutor(network), GPU_UNPROVEN
        if self._asked == "walk":
            return _make_walk(network), ASKED_FOR
        if self._asked == "dense":
            return DenseExecutor(network), ASKED_FOR
        table = self._crossover()
        if self._asked == "gather":
            gather, remark = _make_gather(network, table, self._launch)
            return gather, f"{ASKED_FOR}{remark}"
        walk, reason = _find_walk(network)
        if walk is None:
            gather, remark = _make_gather(network, table, self._launch)
            return gather, f"{reason}{remark}"
        if table is not None and table.walk_loses_somewhere():
            self._where_walk_loses, remark = _make_gather(network, table, self._launch)
            reason = f"{reason}, but for batch sizes at which gather was faster{remark}"
        return walk, reason

    def _executor_for(self, batch: int) -> Executor:
        loses = self._where_walk_loses is not None and batch > 0
        if loses and self._table.walk_wins(batch) is False:
            return self._where_walk_loses
        return self._executor

    def _crossover(self) -> Crossover | None:
        """The measured table for this network here; read again only when one of these changes."""
        key = (self.config, self.dtype, self.device)
        if self._table_key != key:
            self._table_key, self._table = key, crossover.load(*key)
        return self._table

    @property
    def backbone(self) -> ResNet:
        """The model's backbone."""
        return self.model.backbone if isinstance(self.model, BlockDrop) else self.model

    @_exactly
    def __call__(self, images: Tensor) -> Output:
        """Decide and execute; a bare backbone has no policy and keeps all blocks.

        Args:
            images: (B, 3, H, W) normalised, of the engine's dtype and device; B may be 0.

        Returns:
            ``Output(logits (B, num_classes), decisions (B, K) bool)``.

        Raises:
            TypeError, ValueError: see ``blockdrop_fast.decisions.check_images``.
        """
        self._check(images)
        decides_itself = self._decides_itself and images.shape[0] > 0
        if decides_itself and self._executor_for(images.shape[0]) is self._executor:
            self._check_policy_size(images)
            return Output(*self._executor.run_policy(images))
        decisions = self._decide(images)
        return Output(self._execute(images, decisions), decisions)

    @_exactly
    def probabilities(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, K), the policy's probability of keeping each block.

        Raises:
            RuntimeError: the engine was compiled from a bare backbone.
        """
        self._check(images)
        if self._policy is None:
            raise RuntimeError(
                "probabilities: this engine was compiled from a bare backbone, "
                "which has no policy network"
            )
        return self._probabilities(images)

    @_exactly
    def run(self, images: Tensor, decisions: Tensor) -> Tensor:
        """Execute decisions from anywhere.

        Args:
            images: (B, 3, H, W) normalised, of the engine's dtype and device; B may be 0.
            decisions: (B, K) bool or 0/1 of any dtype, 1 = keep.

        Returns:
            (B, num_classes) logits.
        """
        self._check(images)
        return self._execute(images, self._check_decisions(images, decisions))

    @_exactly
    def run_sets(self, images: Tensor, decisions: Tensor) -> Tensor:
        """Execute several decision sets of the same images, computing shared prefixes once.

        Args:
            images: (B, 3, H, W) as for ``run``.
            decisions: (S, B, K) bool or 0/1 of any dtype.

        Returns:
            (S, B, num_classes) logits: ``result[s]`` equals ``run(images, decisions[s])``.
        """
        self._check(images)
        if not isinstance(decisions, Tensor):
            raise TypeError(f"decisions: expected a torch.Tensor, got {type(decisions).__name__}")
        if decisions.ndim != 3 or decisions.shape[0] < 1:
            raise ValueError(
                "decisions: expected shape (S, B, K) with S at least 1, got "
                f"{tuple(decisions.shape)}"
            )
        keep = torch.stack([self._check_decisions(images, one) for one in decisions])
        if images.shape[0] == 0:
            return images.new_zeros(
                (len(keep), 0, self.config.num_classes), dtype=self._logits_dtype
            )
        return self._executor.run_sets(images, keep)

    def _check(self, images: Tensor) -> None:
        check_images(images, channels=3, size_multiple=self.config.size_multiple, dtype=self.dtype)
        if images.device != self.device:
            raise ValueError(f"images: expected on {self.device}, got on {images.device}")
        if self._validate and not torch.isfinite(images).all():
            raise ValueError("images: contain NaN or infinite values")

    def _check_decisions(self, images: Tensor, decisions: Tensor) -> Tensor:
        return check_decisions(
            decisions,
            batch=images.shape[0],
            num_blocks=self.config.num_blocks,
            device=images.device,
            values=self._validate or images.device.type == "cpu",
        )

    def _decide(self, images: Tensor) -> Tensor:
        if self._policy is None or images.shape[0] == 0:
            return torch.ones(
                images.shape[0], self.config.num_blocks, dtype=torch.bool, device=images.device
            )
        return decide(self._probabilities(images))

    def _check_policy_size(self, images: Tensor) -> None:
        pool, multiple = self._policy_pool, self._policy_config.size_multiple
        height, width = (size // pool for size in images.shape[2:])
        if min(height, width) < multiple or height % multiple or width % multiple:
            raise ValueError(
                "images: height and width must be positive multiples of "
                f"{multiple} for the policy network (after pooling by {pool}), "
                f"got {height}x{width}"
            )

    def _probabilities(self, images: Tensor) -> Tensor:
        self._check_policy_size(images)
        if self._policy_pool > 1:
            images = torch.nn.functional.avg_pool2d(images, self._policy_pool)
        if isinstance(self._policy, DenseExecutor):
            return self._policy.run(images).sigmoid()
        everything = torch.ones(
            images.shape[0], self._policy_config.num_blocks, dtype=torch.bool, device=images.device
        )
        return self._policy.run(images, everything).sigmoid()

    def _execute(self, images: Tensor, decisions: Tensor) -> Tensor:
        if images.shape[0] == 0:
            return images.new_zeros((0, self.config.num_classes), dtype=self._logits_dtype)
        return self._executor_for(images.shape[0]).run(images, decisions)


def _check_device(model: BlockDrop | ResNet, device: torch.device) -> None:
    """Raise unless the whole model is on one device that can compute."""
    others = {tensor.device for tensor in model.state_dict().values()} - {device}
    if others:
        raise ValueError(
            f"model: expected on one device, got weights on {device} and {others.pop()}"
        )
    if device.type == "meta":
        raise ValueError("model: expected weights, those on the meta device have no values")


def _strategy_of(executor: Executor) -> Strategy:
    if isinstance(executor, Walk):
        return "walk"
    return "dense" if isinstance(executor, DenseExecutor) else "gather"


def _make_gather(
    network: FoldedNetwork, table: Crossover | None, launch: Launch
) -> tuple[GraphGatherExecutor | GatherExecutor, str]:
    """The gather executor for the network's device and precision, and what to remark of it."""
    rule, remark = {}, ""
    if table is not None:
        rule, remark = {"dense_from": table.dense_from}, f" (measured: {table.source})"
    dtype, device = network.stem.weight.dtype, network.stem.weight.device
    if device.type != "cuda":
        return GatherExecutor(network, **rule), remark
    why_not = triton_kernels.why_not(device)
    if not why_not and dtype not in GRAPH_DTYPES:
        why_not = f"they do not compute in {dtype}"
    if why_not:
        # A table would be of the kernels that are missing.
        return GatherExecutor(network), f"; by plain PyTorch, without our kernels: {why_not}"
    if launch == "conditional" and (why_not := why_no_switches()):
        # What else never waits for the device.
        launch, remark = "universal", f"{remark}; launched as 'universal': {why_not}"
    return GraphGatherExecutor(network, launch=launch, **rule), remark


def _make_walk(network: FoldedNetwork) -> Walk:
    """The walk for the network's device.

    Raises:
        TypeError, ValueError: it does not serve this network or precision.
    """
    on_gpu = network.stem.weight.device.type == "cuda"
    return WalkHalfExecutor(network) if on_gpu else WalkExecutor(network)


def _why_no_walk_kernels(device: torch.device) -> str:
    """Empty if there are compiled kernels of the walk for the device."""
    status = extension_status()
    if not status.loaded:
        return f"the walk needs the compiled extension: {status.reason}"
    if device.type != "cuda":
        return ""
    if status.build_info.get("cuda") is None:
        reason = build_record().get("why_no_cuda") or "the extension was built without CUDA"
        return f"the walk on a GPU needs CUDA kernels: {reason}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return "the walk needs a GPU of compute capability 8.0 or newer, got {}.{}".format(
            *capability
        )
    return ""


def _find_walk(network: FoldedNetwork) -> tuple[Walk | None, str]:
    """The walk where it serves a network here, else None; and why."""
    if reason := _why_no_walk_kernels(network.stem.weight.device):
        return None, reason
    try:
        executor = _make_walk(network)
    except (TypeError, ValueError) as error:
        return None, str(error)
    if isinstance(executor, WalkHalfExecutor):
        return executor, "one kernel launch a batch; images of other sizes than 32x32 run by gather"
    return executor, "the fastest for this network on a CPU"


def compile(
    model: BlockDrop | ResNet,
    *,
    dtype: torch.dtype = torch.float32,
    strategy: Strategy = "auto",
    validate: bool = False,
    launch: Launch = "counts",
) -> Engine:
    """Freeze a model into an engine: fold batch norm, pack weights, choose how to execute.

    Args:
        model: BlockDrop, or a bare backbone. It is read in eval mode whatever its mode is, and
            stays as it is; the engine runs on the model's device.
        dtype: float32, float64, float16 or bfloat16, of weights and activations.
        strategy: "walk" carries each image along its own path (CIFAR networks, in float32 on a
            CPU, in float16 or bfloat16 on a GPU, whose logits are float32);
            "gather" runs each block on its active images; "dense" computes everything and masks;
            "auto" takes the fastest that serves the network, ``strategy_reason`` says why.
        validate: on a GPU, also check the values of images and decisions, which waits for the
            device at every call. On a CPU they always are checked.
        launch: of gather on a GPU. "counts": a call waits for K integers, how many images keep
            each block; blocks that nobody keeps are not launched, and those that all keep run at
            the vendor's speed. "universal": no call waits, and every block runs by kernels that
            read its count on the device. "conditional": the device makes the choice of "counts"
            itself, in a CUDA graph with conditional nodes; only the first call of a batch size
            waits. Without CUDA 12.8 and the extension's CUDA part it is "universal", and
            ``strategy_reason`` says so.

    Raises:
        TypeError: not a model of this package, a dtype that is not supported, or not by the walk.
        ValueError: an unknown strategy or launch, a strategy that does not support the network, or
            a model that is on several devices or on the meta device.
    """
    if not isinstance(model, (BlockDrop, ResNet)):
        raise TypeError(f"model: expected BlockDrop or ResNet, got {type(model).__name__}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected one of {DTYPES}, got {dtype}")
    if strategy not in ("auto", "walk", "gather", "dense"):
        raise ValueError(
            f"strategy: expected 'auto', 'walk', 'gather' or 'dense', got {strategy!r}"
        )
    if launch not in get_args(Launch):
        raise ValueError(f"launch: expected one of {get_args(Launch)}, got {launch!r}")
    return Engine(model, dtype, strategy, validate, launch)
