"""The engine: a frozen model ready to execute. Start reading here.

images -> policy network -> decisions -> plan -> executor (walk | gather | dense) -> logits
                                                 ^ folded, packed weights

A policy that looks at the backbone's first blocks makes the first arrow
images -> those blocks -> head, and the executor goes on behind them if it can. One that decides on
the way puts its gates into the executor: images -> executor with gates -> logits, decisions; the
walk takes a head that looks in the same way.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdrop_fast.decisions import (
    check_decisions,
    check_images,
    check_tensor,
    check_weights,
)
from blockdrop_fast.executors import crossover
from blockdrop_fast.executors.cascade import CascadeEngine
from blockdrop_fast.executors.choice import choose, choose_policy
from blockdrop_fast.executors.crossover import Crossover
from blockdrop_fast.executors.exactly import exactly
from blockdrop_fast.executors.gather import GatherExecutor
from blockdrop_fast.executors.gather_graph import Launch
from blockdrop_fast.executors.look import Look
from blockdrop_fast.executors.recording import is_capturing
from blockdrop_fast.networks.blockdrop import BlockDrop, Output
from blockdrop_fast.networks.cascade import Cascade
from blockdrop_fast.networks.fixed import FixedPolicy
from blockdrop_fast.networks.folded_gates import FoldedExits, fold_gates
from blockdrop_fast.networks.folding import fold_head, fold_network
from blockdrop_fast.networks.gated import GatedPolicy
from blockdrop_fast.networks.halting import HaltingPolicy, WeightedOutput
from blockdrop_fast.networks.look import LookPolicy
from blockdrop_fast.networks.policy import PolicyNetwork, decisions_of, probabilities_of
from blockdrop_fast.networks.resnet import ResNet, ResNetConfig

Strategy = Literal["auto", "walk", "gather", "dense"]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


Method = TypeVar("Method", bound=Callable[..., Any])


def _exactly(method: Method) -> Method:
    """``exactly``; that a caller captures the call is noted for ``refresh``."""
    method = exactly(method)

    @functools.wraps(method)
    def call(self: Engine, *args: Any, **kwargs: Any) -> Any:
        self._is_captured |= is_capturing(self.device)
        return method(self, *args, **kwargs)

    return cast(Method, call)


class Engine:
    """A snapshot of a model that runs only the blocks its decisions keep. Made by ``compile``.

    Attributes:
        model: what the engine was compiled from, and takes over at ``refresh``.
        strategy: how the backbone is executed: "walk", "gather" or "dense".
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
        compact: bool,
    ):
        self.model = model
        self.dtype = dtype
        self._asked = strategy
        self._validate = validate
        self._launch = launch
        self._compact = compact
        self._table_key: tuple[ResNetConfig, torch.dtype, torch.device] | None = None
        self._table: Crossover | None = None
        self._is_captured = False
        self._captured: list[tuple[object, ...]] = []
        self.refresh()

    def refresh(self) -> None:
        """Take over the model's present weights, batch-norm statistics and device.

        CUDA graphs that a caller has captured calls in go on with the weights of their capture,
        which the engine keeps for as long as it lives.
        """
        if self._is_captured:
            policy = (self._policy_logits, self._look, self._fixed, self._menu, self._gates)
            self._captured.append((self._choice, self._gated, *policy))
            self._is_captured = False
        self.config = self.backbone.config
        self.device = self.backbone.fc.weight.device
        _check_device(self.model, self.device)
        network = fold_network(self.backbone, self.dtype)
        policy = self.model.policy if isinstance(self.model, BlockDrop) else None
        self._always = 0 if policy is None else policy.after
        self._choice = choose(network, self._asked, self._launch, self._measured(), self._compact)
        executor = self._choice.executor
        self.strategy, self._reason = executor.strategy, self._choice.reason
        self._gates, self._gated, self._weighs = None, executor, False
        if isinstance(policy, GatedPolicy):
            if self._asked == "dense":
                raise ValueError(
                    "strategy: 'dense' runs no policy that decides on the way, expected 'auto', "
                    "'walk' or 'gather'"
                )
            self._weighs = isinstance(policy, HaltingPolicy) and not policy.hard
            self._gates = fold_gates(policy, self.dtype)
            if not executor.set_gates(self._gates):
                self._gated = GatherExecutor(network)
                self._gated.set_gates(self._gates)
                self._reason += "; gates by gather in plain PyTorch, which waits at each"
        self._menu = None if policy is None else copy.deepcopy(policy.menu)
        self._look, self._fixed, self._executor_looks = None, None, False
        self._policy_logits, self._executor_decides = None, False
        if isinstance(policy, LookPolicy):
            head = fold_head(policy, self.dtype)
            sets = None if self._menu is None else self._menu.sets
            self._look = Look(network, head)
            self._executor_looks = executor.set_look(head, sets)
            if executor.strategy == "walk" and not self._executor_looks:
                # Measured on one EPYC core, ResNet-56 at 40 % of its blocks: going on by gather
                # takes 1.7, 2.2 and 1.6 times as long at batch 1, 8 and 64.
                self._reason += f"; blocks 1 to {head.after}, which the policy looks at, run twice"
        elif isinstance(policy, FixedPolicy):
            self._fixed = copy.deepcopy(policy)
        elif isinstance(policy, PolicyNetwork):
            self._policy_pool = policy.input_pool
            policy = fold_network(policy.network, self.dtype)
            self._policy_config = policy.config
            self._policy_logits = choose_policy(policy, executor, self._compact)
            if self._menu is None:  # executors decide by thresholds
                self._executor_decides = executor.set_policy(policy, self._policy_pool)

    def _measured(self) -> Crossover | None:
        """The measured table for this network here; read again only when one of these changes."""
        key = (self.config, self.dtype, self.device)
        if self._table_key != key:
            self._table_key, self._table = key, crossover.load(*key)
        return self._table

    @property
    def strategy_reason(self) -> str:
        """Why the strategy is this one, and what has become of it since."""
        return f"{self._reason}{self._choice.executor.remark}"

    @property
    def backbone(self) -> ResNet:
        """The model's backbone."""
        return self.model.backbone if isinstance(self.model, BlockDrop) else self.model

    @_exactly
    def __call__(self, images: Tensor, budget: float | None = None) -> Output | WeightedOutput:
        """Decide and execute; a bare backbone has no policy and keeps all blocks.

        Args:
            images: (B, 3, H, W) normalised, of the engine's dtype and device; B may be 0.
            budget: mean kept blocks, of a policy network that chooses from a menu; None: its own.

        Returns:
            ``Output(logits (B, num_classes), decisions (B, K) bool)``; of a ``HaltingPolicy`` that
            is not hard, ``WeightedOutput`` with weights (B, K), float32 or float64.

        Raises:
            TypeError, ValueError: see ``blockdrop_fast.decisions.check_images``; a budget that the
                policy network cannot meet.
        """
        self._check(images)
        if self._gates is not None:
            return self._run_gates(images, budget)
        if len(images) > 0 and self._executor_decides and budget is None:
            executor = self._choice.for_batch(len(images))
            if executor is self._choice.executor:
                self._check_policy_size(images)
                return Output(*executor.run_policy(images))
        if self._looks_at(images) and (budget is None or self._menu is not None):
            price = 0.0 if self._menu is None else self._menu.price(budget)
            return Output(*self._choice.executor.run_look(images, price)[:2])
        if len(images) > 0 and self._look is not None:
            features = self._look.features(images)
            decisions = self._decisions_of(self._look.logits(features), budget)
            executor = self._choice.for_batch(len(images))
            return Output(executor.run_from(images, features, self._always, decisions), decisions)
        decisions = self._decide(images, budget)
        return Output(self._execute(images, decisions), decisions)

    @_exactly
    def decide(self, images: Tensor, budget: float | None = None) -> Tensor:
        """(B, 3, H, W) images -> (B, K) bool, the policy's decisions; all kept without a policy.

        Args and errors: as of a call.
        """
        self._check(images)
        if self._gates is not None:
            return self._run_gates(images, budget).decisions
        return self._decide(images, budget)

    @_exactly
    def probabilities(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, K), the policy's probability of keeping each block.

        Raises:
            RuntimeError: the engine was compiled from a bare backbone, or its policy decides on
                the way.
        """
        self._check(images)
        if not isinstance(self.model, BlockDrop):
            raise RuntimeError(
                "probabilities: this engine was compiled from a bare backbone, "
                "which has no policy network"
            )
        if self._gates is not None:
            raise RuntimeError(
                "probabilities: gates on the way give none before the backbone has run"
            )
        return probabilities_of(self._logits_of_policy(images), self._menu, self._always)

    @_exactly
    def run(self, images: Tensor, decisions: Tensor, weights: Tensor | None = None) -> Tensor:
        """Execute decisions from anywhere.

        With exits, these say where each image leaves: at the exit after the last block it keeps.

        Args:
            images: (B, 3, H, W) normalised, of the engine's dtype and device; B may be 0.
            decisions: (B, K) bool or 0/1 of any dtype, 1 = keep.
            weights: (B, K) of any floating-point dtype, as a ``WeightedOutput`` has them: each
                segment gives the sum of its kept blocks' outputs, each times its weight. None: it
                gives the last one.

        Returns:
            (B, num_classes) logits.

        Raises:
            TypeError, ValueError: see ``blockdrop_fast.decisions``; of exits, decisions that end at
                none of them, or weights.
        """
        self._check(images)
        decisions = self._check_decisions(images, decisions)
        exits = isinstance(self._gates, FoldedExits)
        if weights is not None:
            if exits:
                raise ValueError("weights: expected none, decisions say where images leave")
            check_weights(
                weights,
                decisions=decisions,
                device=images.device,
                values=self._validate or images.device.type == "cpu",
            )
        if len(images) == 0 or (not exits and weights is None):
            return self._execute(images, decisions)
        if exits:
            return self._gated.run_exits(images, decisions)
        executor = self._gated if self._weighs else self._choice.for_batch(len(images))
        return executor.run_weighted(images, decisions, weights)

    @_exactly
    def run_sets(self, images: Tensor, decisions: Tensor) -> Tensor:
        """Execute several decision sets of the same images, computing shared prefixes once.

        Args:
            images: (B, 3, H, W) as for ``run``.
            decisions: (S, B, K) bool or 0/1 of any dtype.

        Returns:
            (S, B, num_classes) logits: ``result[s]`` equals ``run(images, decisions[s])``.

        Raises:
            RuntimeError: the model has exits, or its halting gives weighted means: sets say too
                little there.
        """
        if self._weighs or isinstance(self._gates, FoldedExits):
            what = "weighted means of blocks" if self._weighs else "exits"
            raise RuntimeError(f"run_sets: the model has {what}, which only run replays")
        self._check(images)
        check_tensor("decisions", decisions, self.device)
        if decisions.ndim != 3 or decisions.shape[0] < 1:
            raise ValueError(
                "decisions: expected shape (S, B, K) with S at least 1, got "
                f"{tuple(decisions.shape)}"
            )
        keep = torch.stack([self._check_decisions(images, one) for one in decisions])
        if images.shape[0] == 0:
            return self._no_logits(images, len(keep), 0)
        return self._choice.executor.run_sets(images, keep)

    def _check(self, images: Tensor) -> None:
        check_images(
            images,
            channels=3,
            size_multiple=self.config.size_multiple,
            dtype=self.dtype,
            device=self.device,
        )
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

    def _decide(self, images: Tensor, budget: float | None) -> Tensor:
        bare = not isinstance(self.model, BlockDrop)
        if bare and budget is not None:
            raise ValueError(f"budget: a bare backbone has no policy network, got {budget}")
        if bare or len(images) == 0:
            shape = (len(images), self.config.num_blocks)
            return torch.ones(shape, dtype=torch.bool, device=images.device)
        return self._decisions_of(self._logits_of_policy(images), budget)

    def _run_gates(self, images: Tensor, budget: float | None) -> Output | WeightedOutput:
        if budget is not None:
            raise ValueError(f"budget: expected none, gates decide at one usage, got {budget}")
        kind = WeightedOutput if self._weighs else Output
        if len(images):
            return kind(*self._gated.run_gates(images))
        nothing = images.new_zeros(0, self.config.num_blocks)
        weights = nothing.to(torch.promote_types(self.dtype, torch.float32))
        logits = self._no_logits(images, 0).to(self._gated.logits_dtype)
        return kind(logits, nothing.bool(), *[weights] * self._weighs)

    def _decisions_of(self, logits: Tensor, budget: float | None) -> Tensor:
        return decisions_of(logits, self._menu, budget, self._always)

    def _logits_of_policy(self, images: Tensor) -> Tensor:
        if self._looks_at(images):
            return self._choice.executor.run_look(images)[2]
        if self._look is not None:
            return self._look.logits(self._look.features(images))
        if self._fixed is not None:
            return self._fixed.logits(images)
        self._check_policy_size(images)
        if self._policy_pool > 1:
            images = F.avg_pool2d(images, self._policy_pool)
        return self._policy_logits(images)

    def _looks_at(self, images: Tensor) -> bool:
        """Whether the executor runs the head of a policy that looks, on its way."""
        executor = self._choice.executor
        return (
            self._executor_looks
            and len(images) > 0
            and self._choice.for_batch(len(images)) is executor
            and executor.looks_at(images)
        )

    def _execute(self, images: Tensor, decisions: Tensor) -> Tensor:
        if len(images) == 0:
            return self._no_logits(images, 0)
        return self._choice.for_batch(len(images)).run(images, decisions)

    def _no_logits(self, images: Tensor, *shape: int) -> Tensor:
        dtype = self._choice.executor.logits_dtype
        return images.new_zeros((*shape, self.config.num_classes), dtype=dtype)

    def _check_policy_size(self, images: Tensor) -> None:
        pool, multiple = self._policy_pool, self._policy_config.size_multiple
        height, width = (size // pool for size in images.shape[2:])
        if min(height, width) < multiple or height % multiple or width % multiple:
            raise ValueError(
                "images: height and width must be positive multiples of "
                f"{multiple} for the policy network (after pooling by {pool}), "
                f"got {height}x{width}"
            )


def _check_device(model: BlockDrop | ResNet, device: torch.device) -> None:
    """Raise unless the whole model is on one device that can compute."""
    others = {tensor.device for tensor in model.state_dict().values()} - {device}
    if others:
        raise ValueError(
            f"model: expected on one device, got weights on {device} and {others.pop()}"
        )
    if device.type == "meta":
        raise ValueError("model: expected weights, those on the meta device have no values")


@overload
def compile(
    model: BlockDrop | ResNet,
    *,
    dtype: torch.dtype = ...,
    strategy: Strategy = ...,
    validate: bool = ...,
    launch: Launch = ...,
    compact: bool = ...,
) -> Engine: ...


@overload
def compile(
    model: Cascade,
    *,
    dtype: torch.dtype = ...,
    strategy: Strategy = ...,
    validate: bool = ...,
    launch: Launch = ...,
    compact: bool = ...,
) -> CascadeEngine: ...


@overload
def compile(
    model: BlockDrop | ResNet | Cascade,
    *,
    dtype: torch.dtype = ...,
    strategy: Strategy = ...,
    validate: bool = ...,
    launch: Launch = ...,
    compact: bool = ...,
) -> Engine | CascadeEngine: ...


def compile(
    model: BlockDrop | ResNet | Cascade,
    *,
    dtype: torch.dtype = torch.float32,
    strategy: Strategy = "auto",
    validate: bool = False,
    launch: Launch = "counts",
    compact: bool = False,
) -> Engine | CascadeEngine:
    """Freeze a model into an engine: fold batch norm, pack weights, choose how to execute.

    On a CPU several threads may call an engine at once. A forked process calls
    ``torch.set_num_threads(1)`` first, as for torch's own operations, whose OpenMP threads it does
    not have either; a ``DataLoader``'s workers do so by themselves.

    Calls of the engine can be captured in a CUDA graph, but for plain PyTorch's "gather", which
    waits for the device. As with all of torch's graphs, the same thread calls before with as many
    images, and the engine has to live as long as the graph.

    Args:
        model: BlockDrop, a bare backbone, or a cascade, whose networks then are compiled alike. It
            is read in eval mode whatever its mode is, and stays as it is; the engine runs on the
            model's device.
        dtype: float32, float64, float16 or bfloat16, of weights and activations.
        strategy: "walk" carries each image along its own path (CIFAR networks, and on a CPU
            ImageNet networks without groups whose shortcuts are projections; in float32 on a CPU,
            in float16 or bfloat16 on a GPU, whose logits are float32);
            "gather" runs each block on its active images; "dense" computes everything and masks,
            but for policies that decide on the way;
            "auto" takes the fastest that serves the network, ``strategy_reason`` says why.
        validate: on a GPU, also check the values of images and decisions, which waits for the
            device at every call. On a CPU they always are checked.
        launch: of gather on a GPU, in 16 bits. "counts": a call waits for K integers, how many
            images keep each block; blocks that nobody keeps are not launched, and those that all
            keep run at the vendor's speed. "universal": no call waits, and every block runs by
            kernels that read its count on the device. So do calls that somebody else captures.
        compact: the walk of ImageNet networks keeps 3x3 convolutions in their plain form, instead
            of Winograd's: packed weights of ResNet-101 take 178 MB instead of 235, and a call
            1.3 times as long.

    Raises:
        TypeError: not a model of this package, a dtype that is not supported, or not by the walk.
        ValueError: an unknown strategy or launch, a strategy that does not support the network, or
            a model that is on several devices or on the meta device.
    """
    if not isinstance(model, (BlockDrop, ResNet, Cascade)):
        raise TypeError(f"model: expected BlockDrop, ResNet or Cascade, got {type(model).__name__}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected one of {DTYPES}, got {dtype}")
    if strategy not in ("auto", "walk", "gather", "dense"):
        raise ValueError(
            f"strategy: expected 'auto', 'walk', 'gather' or 'dense', got {strategy!r}"
        )
    if launch not in get_args(Launch):
        raise ValueError(f"launch: expected one of {get_args(Launch)}, got {launch!r}")
    options = (dtype, strategy, validate, launch, compact)
    if isinstance(model, Cascade):
        return CascadeEngine(model, lambda one: Engine(one, *options))
    return Engine(model, *options)
