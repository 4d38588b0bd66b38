"""Walk execution: image-major, each image along its own path, as one operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blockdrop_fast.executors.packed_walk import PackedWalk
from blockdrop_fast.networks.folded_gates import (
    FoldedGates,
    FoldedHalting,
    FoldedLinear,
    FoldedSequential,
)
from blockdrop_fast.networks.folding import FoldedHead, FoldedNetwork
from blockdrop_fast.ops.walk import pack_classifier, pack_conv, walk, walk_policy
from blockdrop_fast.ops.walk_gates import (
    LOOK_CONVS,
    look_serves,
    pack_gates,
    pack_heads,
    pack_look,
    walk_exits,
    walk_halting,
    walk_look,
    walk_sequential,
    walk_weighted,
)
from blockdrop_fast.ops.walk_network import signature


class WalkExecutor(PackedWalk):
    """Runs a CIFAR network of float32 on the CPU by the walk.

    Arguments and errors are those of ``PackedWalk``; images are float32, their height and width
    multiples of 4.
    """

    _pack_conv = staticmethod(pack_conv)
    _pack_classifier = staticmethod(pack_classifier)

    @classmethod
    def pack(cls, network: FoldedNetwork) -> Tensor:
        config = network.config
        mark = signature(config.num_classes, config.shortcut == "subsample", *config.layers)
        packed = super().pack(network)
        return torch.cat([packed, packed.new_tensor([mark])])

    def run(self, images: Tensor, decisions: Tensor) -> Tensor:
        return walk(images, decisions, *self._network)

    run_sets = run

    def run_weighted(self, images: Tensor, decisions: Tensor, weights: Tensor) -> Tensor:
        return walk_weighted(images, decisions, weights.float(), *self._network)

    def set_gates(self, gates: FoldedGates) -> bool:
        if isinstance(gates, FoldedSequential):
            packed = _pack_gates(gates.gates)
            self._run_gated = lambda images: walk_sequential(images, *self._network, packed)
        elif isinstance(gates, FoldedHalting):
            packed, outputs = _pack_gates(gates.heads), 2 if gates.hard else 3
            self._run_gated = lambda images: walk_halting(
                images, *self._network, packed, gates.epsilon, gates.hard
            )[:outputs]
        else:
            heads = pack_heads(
                [head.weight for head in gates.heads], [head.bias for head in gates.heads]
            )
            self._exits = (gates.after, heads, gates.rules)
            self._run_gated = lambda images: walk_exits(images, *self._network, *self._exits)
        return True

    def run_gates(self, images: Tensor) -> tuple[Tensor, ...]:
        return self._run_gated(images)

    def run_exits(self, images: Tensor, decisions: Tensor) -> Tensor:
        return walk_exits(images, *self._network, *self._exits, decisions)[0]

    def set_look(self, head: FoldedHead, sets: Tensor | None) -> bool:
        """See ``Executor``; a head of the usual widths."""
        shapes = [conv.weight.shape[:2] for conv in head.convs]
        if shapes != [(c_out, c_in) for c_in, c_out in LOOK_CONVS]:
            return False
        convs = [(conv.weight, conv.bias) for conv in head.convs]
        packed = pack_look(convs, head.fc_weight, head.fc_bias)
        self._look = (head.after, packed, len(head.fc_bias))
        self._sets = None if sets is None else sets.clone()
        return True

    def looks_at(self, images: Tensor) -> bool:
        return look_serves(*images.shape[2:])

    def run_look(self, images: Tensor, price: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        costs = None if self._sets is None else price * self._sets.sum(1)
        return walk_look(images, *self._network, *self._look, self._sets, costs)

    def _run_policy(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return walk_policy(images, *self._network, *self._policy)[:2]

    @staticmethod
    def _check_weight(weight: Tensor) -> None:
        if weight.dtype != torch.float32:
            raise TypeError(f"network: the walk supports torch.float32 only, got {weight.dtype}")
        if weight.device.type != "cpu":
            raise ValueError(f"network: this walk runs on the CPU only, got {weight.device}")


def _pack_gates(gates: Sequence[FoldedLinear | None]) -> Tensor:
    """K gates of one output, None where there is none -> (K, 65)."""
    none = FoldedLinear(torch.zeros(1, 1), torch.zeros(1))
    gates = [none if gate is None else gate for gate in gates]
    return pack_gates([gate.weight[0] for gate in gates], [gate.bias[0] for gate in gates])
