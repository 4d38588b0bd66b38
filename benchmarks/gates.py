"""``python -m benchmarks.gates``: what does deciding on the way cost?

For each kind of gate a ResNet with random weights gets gates whose biases keep about 17 of 54
blocks. Interleaved: the walk that decides on the way, the walk at those same decisions, all blocks,
and the same gates block-major, where the batch is compacted at each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

import blockdrop_fast as bdf
from blockdrop_fast.engine import Engine
from blockdrop_fast.files import write_json
from blockdrop_fast.machine import machine_info
from blockdrop_fast.measure import timing
from blockdrop_fast.measure.tolerance import CHECKED_IMAGES, make_output_reference
from blockdrop_fast.networks.architectures import resnet_cifar
from blockdrop_fast.networks.blockdrop import BlockDrop
from blockdrop_fast.networks.exits import Exits, confidence_features
from blockdrop_fast.networks.gated import Output
from blockdrop_fast.networks.halting import HaltingPolicy
from blockdrop_fast.networks.look import LookPolicy
from blockdrop_fast.networks.resnet import ResNet
from blockdrop_fast.networks.sequential import SequentialPolicy

KEEP = 0.315  # the share of images that keep a block
# Scores of which about 6 make a segment halt, and how much their logits differ between images.
HALTING_LOGIT, HALTING_SPREAD = -2.5, 3.0
# Blocks of 54 behind which there are exits, and the share of the images that arrive which leave.
EXITS = ((10, 0.15), (14, 0.3), (17, 0.4), (21, 0.6), (25, 1.0))


@dataclass(frozen=True)
class Arguments:
    """What to measure, and where to write it."""

    depth: int = 110
    kinds: tuple[str, ...] = ("sequential", "halting", "halting-hard", "exits", "look")
    batches: tuple[int, ...] = (1, 8, 64)
    rounds: int = 30
    """Timed rounds, at least."""
    min_seconds: float = 3.0
    """Of each kind and batch size."""
    out: Path = Path("gates.json")


def make_model(kind: str, backbone: ResNet, images: Tensor) -> BlockDrop:
    """A model that decides on the way, its biases set on these images.

    Raises:
        ValueError: no such kind.
    """
    makers: dict[str, Callable[[], torch.nn.Module]] = {
        "sequential": lambda: _sequential(backbone, images),
        "halting": lambda: _halting(backbone, images, hard=False),
        "halting-hard": lambda: _halting(backbone, images, hard=True),
        "exits": lambda: _exits(backbone, images),
        "look": lambda: _look(backbone, images),
    }
    if kind not in makers:
        raise ValueError(f"kinds: expected some of {', '.join(makers)}, got {kind!r}")
    with torch.no_grad():
        return BlockDrop(backbone, makers[kind]().eval()).eval()


def _threshold(logits: Tensor, keep: float) -> Tensor:
    """Between the images of which a share is above, and the others."""
    margin = logits.std() + 1
    ends = torch.stack([logits.min() - margin, *logits.sort().values, logits.max() + margin])
    below = round((1 - keep) * len(logits))
    return (ends[below] + ends[below + 1]) / 2


def _sequential(backbone: ResNet, images: Tensor) -> SequentialPolicy:
    policy = SequentialPolicy(backbone.config)

    def choose(k: int, logit: Tensor) -> Tensor:
        threshold = _threshold(logit, KEEP)
        policy.gates[k].bias -= threshold
        return logit >= threshold

    policy.run_with(backbone, images, choose)
    return policy


def _halting(backbone: ResNet, images: Tensor, hard: bool) -> HaltingPolicy:
    policy = HaltingPolicy(backbone.config, hard).eval()

    def standardise(head: torch.nn.Sequential, inputs: tuple[Tensor]) -> None:
        norm, linear = head
        torch.nn.init.normal_(linear.weight)
        logits = linear(norm(inputs[0]))
        linear.weight *= HALTING_SPREAD / logits.std()
        linear.bias += HALTING_LOGIT - linear(norm(inputs[0])).mean()

    hooks = [
        head.register_forward_pre_hook(standardise)
        for head in policy.heads
        if isinstance(head, torch.nn.Sequential)
    ]
    policy.run_with(backbone, images)
    for hook in hooks:
        hook.remove()
    return policy


def _exits(backbone: ResNet, images: Tensor) -> Exits:
    depth = backbone.config.num_blocks / 54
    exits = {max(1, round(after * depth)): share for after, share in EXITS}
    policy = Exits(backbone.config, sorted(exits))
    logits, rules = policy.logits_of(backbone, images), []
    going = torch.ones(len(images), dtype=torch.bool)
    for head, one, share in zip(policy.heads, logits[:-1], exits.values(), strict=True):
        # Random features are large: without this every exit is as sure as can be.
        scale = 1 / one.std()
        head.weight *= scale
        head.bias *= scale
        one = one * scale
        confidence = confidence_features(one)[:, 0]
        threshold = _threshold(confidence[going], share) if going.any() else torch.tensor(0.0)
        rules.append([1.0, 0.0, 0.0, 0.0, 0.0, -float(threshold)])
        going &= confidence < threshold
    policy.set_rules(torch.tensor(rules))
    return policy


def _look(backbone: ResNet, images: Tensor) -> LookPolicy:
    policy = LookPolicy(backbone.config, after=min(2, backbone.config.layers[0])).eval()
    logits = BlockDrop(backbone, policy).eval().policy_logits(images)
    for k in range(policy.num_blocks):
        policy.fc.bias[k] -= _threshold(logits[:, k], KEEP)
    return policy


def replay(engine: Engine, images: Tensor, output: Output) -> Tensor:
    """The logits of an engine at what a model has decided."""
    weights = getattr(output, "weights", None)
    if weights is None:
        return engine.run(images, output.decisions)
    return engine.run(images, output.decisions, weights=weights)


def measure(kind: str, arguments: Arguments) -> dict:
    """Seconds by batch size and contender, after all logits were checked."""
    torch.manual_seed(0)
    count = max(CHECKED_IMAGES, *arguments.batches)
    images = torch.randn(count, 3, 32, 32)
    model = make_model(kind, resnet_cifar(arguments.depth).eval(), images)
    walk, complete = (
        bdf.compile(model, strategy="walk"),
        bdf.compile(model.backbone, strategy="walk"),
    )
    gather = bdf.compile(model, strategy="gather")
    decided = walk(images)
    reference = make_output_reference(model, images, decided, torch.float32)
    reference.check(f"{kind}, on the way", decided.logits)
    reference.check(f"{kind}, replayed", replay(walk, images, decided))
    same = (gather(images).decisions == decided.decisions).all(1).double().mean()
    usage = decided.decisions.sum(1).double()
    all_blocks = torch.ones_like(decided.decisions)
    saved = float(bdf.flops(model.backbone) / bdf.flops(model, decided.decisions).double().mean())
    result = {
        "strategy_reason": walk.strategy_reason,
        "kept": [float(usage.mean()), float(usage.std())],
        "same_decisions_block_major": float(same),
        "flops_bound": saved,
        "batches": {},
    }
    for batch in arguments.batches:
        rows = [slice(start, start + batch) for start in range(0, count - batch + 1, batch)]
        outputs = [walk(images[one]) for one in rows]

        def of(call: Callable, rows=rows) -> Callable[[int], object]:
            return lambda index: call(index % len(rows))

        options = {
            "rounds": max(arguments.rounds, len(rows)),
            "min_seconds": arguments.min_seconds,
        }
        samples = timing.interleave(
            {
                "on the way": of(lambda i, rows=rows: walk(images[rows[i]])),
                "given": of(lambda i, rows=rows, o=outputs: replay(walk, images[rows[i]], o[i])),
                "complete": of(lambda i, r=rows: complete.run(images[r[i]], all_blocks[r[i]])),
            },
            **options,
        )
        # By itself: who runs behind it finds other threads awake and cold caches.
        block_major = {"block-major": of(lambda i, rows=rows: gather(images[rows[i]]))}
        samples |= timing.interleave(block_major, **options)
        result["batches"][batch] = {"samples": samples, **compare(samples, saved)}
    return result


def compare(samples: dict[str, list[float]], bound: float) -> dict[str, float]:
    """Ratios of medians."""
    median = {name: timing.median(values) for name, values in samples.items()}
    speedup = median["complete"] / median["on the way"]
    return {
        "over_given": median["on the way"] / median["given"],
        "speedup": speedup,
        "of_bound": speedup / bound,
        "block_major_over_complete": median["block-major"] / median["complete"],
        "milliseconds": {name: 1e3 * value for name, value in median.items()},
    }


def main(arguments: Arguments) -> None:
    """Measure, print a line a kind and batch size, write the file after each kind."""
    result: dict = {"depth": arguments.depth, "machine": machine_info(), "kinds": {}}
    for kind in arguments.kinds:
        with torch.no_grad():
            result["kinds"][kind] = found = measure(kind, arguments)
        print(
            "{}: {:.1f} ± {:.1f} blocks, bound {:.2f}".format(
                kind, *found["kept"], found["flops_bound"]
            )
        )
        for batch, one in found["batches"].items():
            print(
                f"  batch {batch}: {one['over_given']:.3f} x given decisions, {one['speedup']:.2f} "
                f"times as fast as all blocks ({one['of_bound']:.2f} of the bound), block-major "
                f"{one['block_major_over_complete']:.2f} x all blocks",
                flush=True,
            )
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out, result)


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.gates"))
