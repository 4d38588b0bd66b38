"""What makes networks, policies, engines and decisions."""

from __future__ import annotations

import copy
import random
import re

import torch

import blockdrop_fast as bdf
from blockdrop_fast.networks import architectures
from blockdrop_fast.networks.menu import Menu
from tests.fuzz.arguments import MODELS, SETS, VALUES, config_of, model_of, pick, strange, valued
from tests.fuzz.right import Wrong, check_logits
from tests.random_networks import make_images

NAMED = [one for one in bdf.__all__ if re.match(r"(wide_)?resne[x]?t\d|policy_resnet", one)]


def fuzz_heuristics(rng: random.Random, about: list) -> None:
    name = rng.choice(["first_k", "random_k", "distribute_k"])
    segments = tuple(rng.randint(1, 6) for _ in range(rng.randint(1, 4)))
    keep = rng.randint(0, sum(segments))
    args = [pick(rng, keep), pick(rng, segments), pick(rng, rng.randint(0, 5))]
    # As many images as fit a terabyte are no question of what is allowed.
    args[2] = 7 if isinstance(args[2], int) and args[2] > 1000 else args[2]
    options = {}
    if name == "random_k":
        options = {"seed": pick(rng, rng.randrange(9)), "per_image": rng.random() < 0.5}
    if rng.random() < 0.2:
        options["device"] = rng.choice(["cpu", torch.device("cpu"), "meta", "x", 1.5])
    about += [name, args, options]
    found = getattr(bdf.heuristics, name)(*args, **options)
    if found.shape != (int(args[2]), sum(args[1])) or found.dtype != torch.bool:
        raise Wrong(f"decisions {tuple(found.shape)} {found.dtype}")
    if not found.is_meta and (found.sum(1) != args[0]).any():
        raise Wrong("another number of blocks")


def fuzz_configs(rng: random.Random, about: list) -> None:
    """Architectures, and networks and policies of them."""
    right = {
        "block": "basic", "layers": (1, 2), "widths": (4, 8), "stem": "cifar",
        "shortcut": "subsample", "num_classes": 3,
    }  # fmt: skip
    options = {key: pick(rng, value, 0.15) for key, value in right.items()}
    if rng.random() < 0.2:
        options["block_widths"] = pick(rng, (4, 5, 6), 0.5)
    about.append(options)
    config = bdf.ResNetConfig(**options)
    if sum(config.layers) > 50 or max(config.widths) > 512 or config.num_classes > 10**6:
        return
    kind = rng.choice(["network", "look", "fixed", "sequential", "halting", "exits", "pixels"])
    value, config = rng.choice(VALUES), pick(rng, config, 0.1)
    about += [kind, value]
    if kind == "network":
        with torch.device("meta"):
            bdf.ResNet(config)
    elif kind == "look":
        bdf.LookPolicy(config, value)
    elif kind == "fixed":
        bdf.FixedPolicy(value if rng.random() < 0.5 else torch.tensor([True] * rng.randint(0, 3)))
    elif kind == "sequential":
        bdf.SequentialPolicy(config)
    elif kind == "halting":
        rng.choice([bdf.HaltingPolicy, bdf.SpatialHaltingPolicy])(config, epsilon=value)
    elif kind == "pixels":
        bdf.LowCostMasks(config)
    else:
        bdf.Exits(config, value)


def fuzz_models(rng: random.Random, about: list) -> None:
    """What is made of networks and policies, such as fit each other and such as do not."""
    names = rng.sample(list(MODELS), 3)
    models = [pick(rng, model_of(name), 0.1) for name in names]
    what = rng.choice(["blockdrop", "cascade", "policy", "rules", "thresholds", "menu"])
    about += [what, names, [type(one).__name__ for one in models]]
    backbones = [getattr(one, "backbone", one) for one in models]
    policies = [getattr(one, "policy", one) for one in models]
    if what == "blockdrop":
        model = bdf.BlockDrop(backbones[0], policies[rng.choice([0, 1])])
        if model.policy.num_blocks != model.backbone.num_blocks:
            raise Wrong("a policy for other blocks")
    elif what == "cascade":
        bdf.Cascade(pick(rng, models[: rng.choice([0, 1, 2, 3])], 0.1))
    elif what == "policy":
        menu = rng.choice([None, Menu(SETS), rng.choice(VALUES)])
        bdf.PolicyNetwork(backbones[0], pick(rng, rng.choice([0, 1, 2]), 0.3), menu)
    elif what == "menu":
        Menu(strange(rng, SETS) if rng.random() < 0.5 else rng.choice(VALUES))
    else:
        model = copy.deepcopy(model_of(rng.choice(["exits", "cascade"])))
        taker = model if isinstance(model, bdf.Cascade) else model.policy
        count = len(taker.rules)
        if what == "rules":
            rules = valued(rng, torch.randn(count, 6))
            taker.set_rules(strange(rng, rules) if rng.random() < 0.5 else rules)
        else:
            taker.set_thresholds(pick(rng, [rng.choice([0, 0.5, 1, 2, -1, "x"])] * count))
        if not taker.rules.isfinite().all():
            raise Wrong("rules that are not finite")


def fuzz_depths(rng: random.Random, about: list) -> None:
    """Named architectures."""
    name = rng.choice(["resnet_cifar", "resnet_imagenet", *NAMED])
    value = rng.choice([one for one in VALUES if one not in ((5, 5, 5), [2, 1, 2], 2**31)])
    about += [name, value]
    with torch.device("meta"):
        if rng.random() < 0.2:
            architectures.by_name(value if rng.random() < 0.5 else name)(rng.choice([5, value]))
            return
        getattr(bdf, name)(value)


def fuzz_compile(rng: random.Random, about: list) -> None:
    name = rng.choice(list(MODELS))
    options = {
        "dtype": pick(rng, rng.choice([torch.float32, torch.float64, torch.int8]), 0.2),
        "strategy": pick(rng, rng.choice(["auto", "walk", "gather", "dense"]), 0.2),
        "launch": pick(rng, rng.choice(["counts", "universal"]), 0.2),
        "validate": rng.random() < 0.5,
        "compact": rng.random() < 0.5,
    }
    model = pick(rng, model_of(name), 0.1)
    if rng.random() < 0.1:
        model = copy.deepcopy(model_of(name)).to("meta")
    about += [name, options]
    engine = bdf.compile(model, **options)
    images = make_images(config_of(name), 2).to(options["dtype"])
    check_logits(name, options["dtype"], images, engine(images))
