"""Random networks, policies, decisions and images for all tests, each made from a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from blockdrop_fast.networks.blockdrop import BlockDrop
from blockdrop_fast.networks.exits import Exits, confidence_features
from blockdrop_fast.networks.halting import HaltingPolicy
from blockdrop_fast.networks.look import LookPolicy
from blockdrop_fast.networks.menu import Menu
from blockdrop_fast.networks.policy import PolicyNetwork
from blockdrop_fast.networks.resnet import ResNet, ResNetConfig
from blockdrop_fast.networks.sequential import SequentialPolicy

IMAGES = 64  # a tolerance measured on images means something from here on

CIFAR = ResNetConfig("basic", (2, 1, 2), (16, 32, 64), "cifar", "average_pool", 10)
BOTTLENECK = ResNetConfig("bottleneck", (2, 1, 2), (4, 6, 8), "imagenet", "projection", 7)
# As ResNeXt: a wider inside, in groups.
GROUPED = replace(BOTTLENECK, block_widths=(8, 8, 12, 16, 16), groups=4)
# What the walk of CIFAR networks does not run, each with something of its own.
CUSTOM = {
    "bottleneck": BOTTLENECK,
    "basic projection": ResNetConfig("basic", (1, 2), (64, 8), "imagenet", "projection", 5),
    "imagenet average pool": ResNetConfig("basic", (2, 1), (64, 80), "imagenet", "average_pool", 3),
    "cifar bottleneck": ResNetConfig("bottleneck", (1, 2), (4, 8), "cifar", "subsample", 5),
    "one segment": ResNetConfig("basic", (3,), (8,), "cifar", "subsample", 2),
    "no new channels": ResNetConfig("basic", (1, 2), (8, 8), "cifar", "average_pool", 4),
    "no new channels, subsampled": ResNetConfig("basic", (1, 2), (8, 8), "cifar", "subsample", 4),
    "narrower blocks": ResNetConfig(
        "basic", (2, 1), (8, 16), "cifar", "average_pool", 3, (5, 8, 11)
    ),
    "grouped": GROUPED,
    "a group a channel": ResNetConfig(
        "bottleneck", (1, 2), (4, 6), "cifar", "subsample", 5, (12, 12, 24), groups=12
    ),
    "wide": replace(BOTTLENECK, block_widths=(8, 8, 12, 16, 16)),
}
NARROWER = replace(CIFAR, block_widths=(8, 16, 19, 64, 44))
# Policy logits; the sigmoid of the third is 0.5 in float32.
NEAR_ZERO = (-1.0, -1e-6, -5e-8, 0.0, 5e-8, 1.0)


def make_network(config: ResNetConfig, seed: int = 0) -> ResNet:
    """A network in eval mode whose batch norm does something, with logits of order one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ResNet(config).eval()
    randomise_batch_norm(network, seed)
    return network


def randomise_batch_norm(network: nn.Module, seed: int) -> None:
    """Make all batch norm do something."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.4, 0.9),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                tensor.data.uniform_(low, high, generator=generator)


def make_cifar_network(layers, shortcut="average_pool", num_classes=10, seed=0) -> ResNet:
    """A network that the walk runs, with this many blocks in each of its three segments."""
    config = ResNetConfig("basic", tuple(layers), (16, 32, 64), "cifar", shortcut, num_classes)
    return make_network(config, seed)


def make_policy(
    num_blocks: int, images: Tensor | None = None, seed: int = 1, pool: int = 1
) -> PolicyNetwork:
    """A policy network; given images, it keeps about half of their blocks."""
    network = make_cifar_network((1, 1, 1), num_classes=num_blocks, seed=seed)
    policy = PolicyNetwork(network, pool).eval()
    if images is not None:
        keep_half(policy, images)
    return policy


def make_menu_policy(sets: Tensor, images: Tensor, budget: float | None = 2.5) -> PolicyNetwork:
    """A policy network that is surer of later ``sets`` (M, K), and calibrated on the images."""
    menu = Menu(sets)
    network = make_cifar_network((1, 1, 1), num_classes=len(sets))
    policy = PolicyNetwork(network, menu=menu).eval()
    with torch.no_grad():
        policy.network.fc.weight.mul_(20)
        wanted = torch.linspace(-1, 2, len(sets))
        policy.network.fc.bias.sub_(policy.logits(images).mean(0) - wanted)
        menu.calibrate(policy.logits(images), budget)
    return policy


def make_look_model(
    config: ResNetConfig = CIFAR, after: int = 1, sets: Tensor | None = None, seed: int = 0
) -> tuple[BlockDrop, Tensor]:
    """A model that looks, then decides, and images; about half of the blocks behind are kept.

    With ``sets`` (M, K): surer of later ones, as ``make_menu_policy``, and calibrated.
    """
    images, backbone = make_images(config, IMAGES, seed), make_network(config, seed)
    menu = None if sets is None else Menu(sets)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = BlockDrop(backbone, LookPolicy(config, after, menu)).eval()
        randomise_batch_norm(model.policy, seed)
        head = model.policy.fc
        head.weight.mul_(20)
        logits = model.policy_logits(images)
        if menu is None:
            head.bias -= logits.quantile(0.5, 0)
        else:
            head.bias -= logits.mean(0) - torch.linspace(-1, 2, len(sets))
            menu.calibrate(model.policy_logits(images), sets.sum(1).float().mean().item())
    return model, images


GATED = ("sequential", "halting", "halting hard", "exits")


def make_gated_model(
    kind: str, config: ResNetConfig = CIFAR, seed: int = 0
) -> tuple[BlockDrop, Tensor]:
    """A model that decides on the way, of one of ``GATED``, and images that it treats unlike."""
    images, backbone = make_images(config, IMAGES, seed), make_network(config, seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        if kind == "sequential":
            policy = _sequential(backbone, images)
        elif kind == "exits":
            policy = _exits(backbone, images)
        else:
            policy = _halting(backbone, images, hard=kind == "halting hard")
    return BlockDrop(backbone, policy).eval(), images


def _sequential(backbone: ResNet, images: Tensor) -> SequentialPolicy:
    """Every gate keeps half of the images, and is not close to one."""
    policy = SequentialPolicy(backbone.config)

    def halve(k: int, logit: Tensor) -> Tensor:
        bias = logit.quantile(0.5)
        policy.gates[k].bias -= bias
        return logit >= bias

    policy.run_with(backbone, images, halve)
    return policy


def _halting(backbone: ResNet, images: Tensor, hard: bool) -> HaltingPolicy:
    """Every head halts about half of the images that reach it; others' scores are smaller."""
    policy = HaltingPolicy(backbone.config, hard).eval()
    randomise_batch_norm(policy, 0)
    for head in policy.heads:
        if isinstance(head, nn.Identity):
            continue
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        policy.run_with(backbone, images)
        hook.remove()
        nn.init.normal_(head[1].weight)
        logits = head(seen[0])
        scale = 4 / logits.std()
        head[1].weight *= scale
        head[1].bias.copy_(math.log(99) - scale * (logits - head[1].bias).median())
    return policy


def _exits(backbone: ResNet, images: Tensor) -> Exits:
    """A third of the images leaves at each exit, by thresholds and by rules of all features."""
    num_blocks = backbone.num_blocks
    policy = Exits(backbone.config, sorted({1, num_blocks // 2, num_blocks - 1} - {0}))
    for head in policy.heads:
        nn.init.normal_(head.weight, std=1.0)
    logits, rules = policy.logits_of(backbone, images), torch.randn(len(policy.exits), 6)
    rules[0, :5] = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    staying = torch.ones(len(images), dtype=torch.bool)
    for rule, one in zip(rules, logits, strict=False):
        score = confidence_features(one) @ rule[:5]
        rule[5] = -score[staying].quantile(2 / 3)
        staying &= score + rule[5] < 0
    policy.set_rules(rules)
    return policy


def make_policy_of_logits(logits: Sequence[float]) -> PolicyNetwork:
    """A policy network that gives these logits to every image."""
    policy = make_policy(len(logits))
    with torch.no_grad():
        policy.network.fc.weight.zero_()
        policy.network.fc.bias.copy_(torch.tensor(logits))
    return policy


def keep_half(policy: PolicyNetwork, images: Tensor) -> None:
    """Change the policy so that of an even number of images half keep each block.

    The threshold lies between two images: one right on it would keep or drop by its last bit.
    """
    with torch.no_grad():
        policy.network.fc.bias -= policy.logits(images.float()).quantile(0.5, 0)


def make_model(config: ResNetConfig = CIFAR, seed: int = 0) -> tuple[BlockDrop, Tensor]:
    """A BlockDrop model and images that it keeps about half of its blocks for."""
    images = make_images(config, IMAGES, seed)
    backbone = make_network(config, seed)
    return BlockDrop(backbone, make_policy(backbone.num_blocks, images)), images


def make_images(
    config: ResNetConfig, count: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Small images for a network, wider than high."""
    size = (24, 32) if config.stem == "imagenet" else (8, 12)
    return random_images(count, dtype, size, seed)


def random_images(
    count: int,
    dtype: torch.dtype = torch.bfloat16,
    size: int | tuple[int, int] = 32,
    seed: int = 0,
    device: str = "cpu",
) -> Tensor:
    """Normalized images; a single ``size`` is height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, height, width, generator=generator).to(device, dtype)


def random_decisions(generator: torch.Generator, *shape: int) -> Tensor:
    """Decisions with every block usage from none to all."""
    usage = torch.rand(*shape[:-1], 1, generator=generator) * 1.4 - 0.2
    return torch.rand(*shape, generator=generator) < usage


def make_decisions(kind: str, count: int, num_blocks: int, seed: int = 0) -> Tensor:
    """Decisions: all kept, all dropped, of one image only, or random."""
    if kind == "one image":
        decisions = torch.zeros(count, num_blocks, dtype=torch.bool)
        decisions[seed % count] = True
        return decisions
    if kind == "random":
        return random_decisions(torch.Generator().manual_seed(seed), count, num_blocks)
    return torch.full((count, num_blocks), kind == "all kept")
