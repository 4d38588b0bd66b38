"""A checkpoint of your own: load it, give it a policy network, compile it, time it.

    python -m examples.own_checkpoint resnet56.th --data DIR --epochs 30
    python -m examples.own_checkpoint

A backbone, in any layout that ``bdf.load_backbone`` reads, gets a policy network from a short
curriculum; a BlockDrop checkpoint has one. The default is the one that comes with the package,
a ResNet-32 for CIFAR-10, and handwritten digits: its accuracy on them means nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import torch

import blockdrop_fast as bdf
from blockdrop_fast.data.batches import batches_of, load_dataset
from blockdrop_fast.measure.timing import interleave
from blockdrop_fast.networks.checkpoints import load_any
from train.config import Curriculum
from train.curriculum import curriculum
from train.images import normalization_of
from train.run_files import MODEL_FILE


def main(checkpoint: Path, data: Path | None, epochs: int, out: Path) -> None:
    model = load_any(checkpoint)
    if isinstance(model, bdf.ResNet):
        curriculum(
            # Batches and steps for few epochs; the defaults are the paper's, for 5,000.
            Curriculum(
                backbone=checkpoint, data=data, out=out, epochs=epochs, batch_size=64, lr=1e-3
            )
        )
        model = bdf.load(out / MODEL_FILE)
    model.eval()

    # An engine of a backbone keeps all blocks; one of a BlockDrop model asks its policy network.
    full, engine = bdf.compile(model.backbone), bdf.compile(model)
    test, normalization = load_dataset(data).test, normalization_of(model)
    for name, one in (("all blocks", full), ("policy", engine)):
        found = bdf.evaluate(one, batches_of(test, 256, normalization=normalization))
        print(f"{name}: accuracy {found.accuracy:.1%}, {found.block_usage:.1f} blocks an image")

    images, _ = next(iter(batches_of(test, 64, normalization=normalization)))
    with torch.inference_mode():
        samples = interleave(
            {
                "all blocks, PyTorch": lambda _: model.backbone(images),
                "all blocks, engine": lambda _: full(images),
                "BlockDrop, engine": lambda _: engine(images),
            },
            rounds=10,
        )
    print(f"strategy: {engine.strategy} ({engine.strategy_reason})")
    for name, seconds in samples.items():
        print(f"{name}: {1e3 * median(seconds):.2f} ms for {len(images)} images")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    packaged = Path("blockdrop32-cifar10-jpeg")
    parser.add_argument("checkpoint", type=Path, nargs="?", default=packaged)
    parser.add_argument("--data", type=Path, help="data set folder; default: digits")
    parser.add_argument("--epochs", type=int, default=30, help="of the policy network's training")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/own"), help="folder of that training"
    )
    main(**vars(parser.parse_args()))
