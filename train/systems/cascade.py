"""Adaptive Neural Networks, network selection: which network of a cascade an image needs.

    python -m train cascade --data DIR --networks small.safetensors large.safetensors --budget 12

Nothing is trained but the rules by which an image stays at a network, as those of ``exits``: on
held-out images, which ``pretrain --held-out`` has left aside. metrics.json has the sweeps.
"""

from __future__ import annotations

from itertools import accumulate

import torch

import blockdrop_fast as bdf
from blockdrop_fast.data.image_sets import ImageFolder, ImageSet
from blockdrop_fast.files import check_new_folder, write_json
from blockdrop_fast.networks.cascade import blocks_of
from blockdrop_fast.networks.checkpoint_files import write_torch
from blockdrop_fast.networks.checkpoints import load_any
from train import distributed
from train.images import EVALUATION_BATCH, plain_batches, prepare, split
from train.optimization import engine_dtype
from train.run_files import METRICS_FILE, MODEL_FILE, STATE_FILE, options_text
from train.systems.config import Cascade
from train.systems.rules import Stops, budget_of, fit, summary


def cascade(config: Cascade) -> None:
    """Fit the rules of a cascade of trained networks, and save it.

    Raises:
        ValueError: no such networks, or a budget that they cannot meet.
    """
    if (config.out / MODEL_FILE).exists() and not config.resume:
        raise FileExistsError(f"out: {config.out} holds a model already; name another folder")
    model = bdf.Cascade([load_any(path) for path in config.networks]).eval()
    sizes = [blocks_of(network) for network in model.networks]
    if sizes != sorted(sizes):
        raise ValueError(f"networks: expected from small to large, got {sizes} blocks")
    budget = budget_of(config.budget, [*accumulate(sizes)], sizes[-1])
    check_new_folder(config.out)
    device, dataset = prepare(config)
    model.to(device, memory_format=torch.channels_last)
    dtype = engine_dtype(config, device)
    held_out, _ = split(dataset.train, config.held_out, config.seed)
    found = [stops_of(model, images, config.workers, dtype) for images in (held_out, dataset.test)]
    rules, report = fit(*found, budget, config.rules)
    model.set_rules(rules)
    metrics = summary(report)
    print(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    if not distributed.is_first():
        return
    config.out.mkdir(parents=True, exist_ok=True)
    names = [str(path) for path in config.networks]
    shipped = set(names) <= set(bdf.pretrained())
    bdf.save(model, config.out / MODEL_FILE, networks=names if shipped else None)
    write_json(config.out / METRICS_FILE, [metrics | report])
    # Last: the run is complete.
    write_torch({"epoch": 0, "config": options_text(config)}, config.out / STATE_FILE)


def stops_of(
    model: bdf.Cascade, image_set: ImageSet | ImageFolder, workers: int, dtype: torch.dtype
) -> Stops:
    """What each network of a cascade says of a split, each on all of its images."""
    logits, labels, size = [], torch.empty(0), None
    for network in model.networks:
        engine = distributed.shared(bdf.compile(network, dtype=dtype))
        of_network, of_labels = [], []
        for images, batch_labels in plain_batches(network, image_set, EVALUATION_BATCH, workers):
            of_network.append(engine(images.to(dtype)).logits.float().cpu())
            of_labels.append(batch_labels.cpu())
            size = tuple(images.shape[2:])
        logits.append(torch.cat(of_network))
        labels = torch.cat(of_labels)
    blocks = torch.tensor([blocks_of(network) for network in model.networks]).double()
    ran = torch.ones(len(blocks), len(blocks)).tril()
    flops = bdf.flops(model, ran, image_size=size)
    return Stops(torch.stack(logits), labels, blocks.cumsum(0), flops)
