"""FirstK, RandomK and DistributeK on a backbone as it is (BlockDrop section 4.2).

    python -m train heuristics --data DIR --model model.safetensors

ResNet-32, CIFAR-10 (JPEG), 11 of 15 blocks (docs/results/cifar10-jpeg.md): FirstK 23.29 %, RandomK
12.36 % (28.07 % with a set for each image), DistributeK 46.80 %; the policy has 66.53 %.
"""

from __future__ import annotations

import torch

import blockdrop_fast as bdf
from blockdrop_fast.files import check_new_folder, write_json
from blockdrop_fast.networks.checkpoints import load_any
from train import distributed
from train.config import Heuristics
from train.evaluation import evaluate_test
from train.images import prepare


def heuristics(config: Heuristics) -> None:
    """Evaluate the three heuristics at K kept blocks, beside the model's own policy."""
    if config.model is None:
        raise ValueError("model: a BlockDrop or backbone checkpoint is required")
    check_new_folder(config.out)
    device, dataset = prepare(config)
    model = load_any(config.model)
    if isinstance(model, bdf.Cascade) or isinstance(getattr(model, "policy", None), bdf.Exits):
        raise ValueError(
            f"model: {config.model} runs until an image leaves; expected blocks to keep or drop"
        )
    try:
        engine = bdf.compile(model.to(device, memory_format=torch.channels_last))
    except TypeError as error:  # masks of pixels, which no engine runs
        raise ValueError(f"model: {config.model}: {error}") from None
    segments = engine.config.layers
    rows = {}
    keep = config.keep
    if isinstance(model, bdf.BlockDrop):
        rows["policy"] = evaluate_test(
            engine, dataset, config.workers, routing_images=config.routing_images
        )
        keep = round(rows["policy"].block_usage) if keep is None else keep
    if keep is None:
        raise ValueError("keep: required for a backbone without a policy network")
    rows["all blocks"] = evaluate_test(bdf.compile(engine.backbone), dataset, config.workers)
    contenders = {
        "FirstK": lambda batch: bdf.heuristics.first_k(keep, segments, batch),
        "RandomK": lambda batch: bdf.heuristics.random_k(keep, segments, batch, seed=config.seed),
        "RandomK, per image": lambda batch: bdf.heuristics.random_k(
            keep, segments, batch, seed=config.seed, per_image=True
        ),
        "DistributeK": lambda batch: bdf.heuristics.distribute_k(keep, segments, batch),
    }
    for name, decide in contenders.items():
        rows[name] = evaluate_test(
            engine,
            dataset,
            config.workers,
            lambda images, decide=decide: decide(len(images)).to(device),
        )
    for name, row in rows.items():
        print(f"{name:20} accuracy {100 * row.accuracy:6.2f} %  blocks {row.block_usage:5.2f}")
    if not distributed.is_first():
        return
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "heuristics.json", {name: row.to_dict() for name, row in rows.items()})
