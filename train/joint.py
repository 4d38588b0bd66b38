r"""Stage 3, another way: finetuning a backbone for what a menu's policy network decides.

    python -m train joint --preset quick --data DIR --model expert.safetensors --budget 7
    python -m train joint --preset quick --data DIR --backbone droppable.safetensors --static 7
    python -m train joint --preset quick --data DIR --backbone model.safetensors --static 7 \
        --static-set first_k

The paper's finetuning undoes within an epoch what a policy network knows of the images. Here each
image runs the set that it gets at the budget, some images that of another budget, and the backbone
learns; the policy network stays, or learns from what came of the sets that ran (a regression, as in
the stage ``expert``). The second command is the control: the same training, in which every image
runs the best set of that size. Not in the paper, but for the third command: its baselines FirstK,
RandomK and DistributeK, finetuned (section 4.2).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import blockdrop_fast as bdf
from blockdrop_fast.data.image_sets import Dataset
from blockdrop_fast.networks.menu import Menu
from blockdrop_fast.networks.policy import decisions_of
from train import distributed
from train.config import Joint
from train.distillation import load_teacher, taught_loss
from train.evaluation import evaluate_test, evaluation_metrics, static_accuracies_of
from train.expert import calibrate, outcomes
from train.images import prepare, split
from train.loop import Run, sampling_generator
from train.metrics import PolicyStatistics
from train.optimization import autocast, engine_dtype, one_cycle
from train.run_files import MODEL_FILE, check_out
from train.static_sets import PER_IMAGE, static_set

PRICES = 64  # among which an image's own budget is drawn


def joint(config: Joint) -> None:
    """Train a backbone on the blocks that its images get, by SGD under a one-cycle schedule.

    Raises:
        ValueError: options that contradict each other, or do not fit the model.
    """
    check_out(config)
    device, dataset = prepare(config)
    model = _load_model(config).to(device, memory_format=torch.channels_last)
    dtype = engine_dtype(config, device)
    held_out, train = split(dataset.train, config.held_out, config.seed)
    if isinstance(model, bdf.ResNet):
        keep = _static_set(config, model, dtype, dataset)
        print("runs blocks " + " ".join(str(int(block) + 1) for block in keep.nonzero()))
        model = bdf.BlockDrop(model, bdf.FixedPolicy(keep.to(device)))
    menu = model.policy.menu
    looked_through = [] if config.policy_lr else _looked_through(model)
    for module in looked_through:
        module.requires_grad_(False)
    learning = {"backbone": (model.backbone, config.lr)}
    if config.policy_lr:
        learning["policy"] = (model.policy, config.policy_lr)
    groups = [{"params": network.parameters(), "lr": lr} for network, lr in learning.values()]
    optimizer, scheduler = one_cycle(config, groups, len(train))
    redraws = config.static is not None and config.static_set == PER_IMAGE
    saved = model.backbone if redraws else model
    run = Run(config, saved, [optimizer], [scheduler], skips_blocks=True)
    if menu is not None:  # of a resumed run: at the policy that it had come to
        calibrate(model, held_out, config.budget, config.workers)
    engine = bdf.compile(model, dtype=dtype)
    teacher = load_teacher(config.teacher, model, device, dtype)

    def step(
        images: Tensor, labels: Tensor, prices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        drawn_for = distributed.whole(len(images))
        price = distributed.own(_draw(prices, drawn_for, config.spread, generator))

        def choose(values: Tensor) -> Tensor:
            if redraws:
                return distributed.own(redraw(drawn_for))
            return _choose(menu, values, price)

        with autocast(config, device):
            logits, decisions, values = model.forward_with(images, choose)
        target = None if teacher is None else teacher(images.to(dtype)).logits.float()
        loss = taught_loss(logits.float(), labels, target, config)
        seen = {"accuracy": (logits.argmax(1) == labels).float().mean()}
        if config.policy_lr:
            ran = menu.at_price(values, price)[:, None]
            right = outcomes(logits.detach(), labels)
            regression = F.binary_cross_entropy_with_logits(
                values.float().gather(1, ran).squeeze(1), right
            )
            seen["value_loss"] = regression
            loss = loss + config.value * regression
        statistics.add(decisions)
        return loss, seen

    for epoch in run.epochs():
        statistics = PolicyStatistics()
        generator = sampling_generator(config.seed, epoch, device)
        redraw = partial(_redraw, config, model.backbone, generator)
        model.train()
        model.policy.train(bool(config.policy_lr))
        for module in looked_through:
            module.eval()
        prices = _prices(menu, config).to(device)
        means = run.descend(train, epoch, partial(step, prices=prices, generator=generator))
        metrics = {f"train_{name}": value for name, value in means.items().items()}
        metrics |= statistics.items("train")
        if config.policy_lr:
            calibrate(model, held_out, config.budget, config.workers)
        if run.due(epoch, config.evaluate_every):
            engine.refresh()
            static = None
            if epoch == config.epochs:
                static = static_accuracies_of(
                    config.out / MODEL_FILE, engine, dataset, config.static_images, config.workers
                )
            evaluation = evaluate_test(
                engine,
                dataset,
                config.workers,
                (lambda images, redraw=redraw: redraw(len(images))) if redraws else None,
                config.routing_images,
                static,
            )
            metrics |= evaluation_metrics(evaluation, 1.0)
        run.finish_epoch(epoch, metrics)


def _looked_through(model: bdf.BlockDrop) -> list[nn.Module]:
    """What a ``LookPolicy`` sees images through: if that changed, it would have to learn, too."""
    if not isinstance(model.policy, bdf.LookPolicy):
        return []
    backbone = model.backbone
    return [backbone.conv1, backbone.bn1, *backbone.segments[0][: model.policy.after]]


def _choose(menu: Menu | None, values: Tensor, price: Tensor) -> Tensor:
    """Decisions of (B, M) or (B, K) logits of the policy, at (B, 1) prices of a menu's blocks."""
    if menu is None:
        return decisions_of(values, None)
    return menu.sets[menu.at_price(values, price)]


def _prices(menu: Menu | None, config: Joint) -> Tensor:
    """(1 + PRICES,) prices of a block: at the budget itself, and at budgets of the spread."""
    if menu is None:
        return torch.zeros(1 + PRICES)
    lowest, highest = config.budgets or (menu.usages[-1], menu.usages[0])
    budgets = torch.linspace(lowest, highest, PRICES).clamp(menu.usages[-1], menu.usages[0])
    return torch.tensor([menu.price(), *(menu.price(budget) for budget in budgets.tolist())])


def _draw(prices: Tensor, batch: int, spread: float, generator: torch.Generator) -> Tensor:
    """(batch, 1) prices: the first one, but for a share ``spread`` of images any of the others."""
    device = prices.device
    other = torch.randint(1, len(prices), (batch,), generator=generator, device=device)
    differs = torch.rand(batch, generator=generator, device=device) < spread
    return prices[other * differs][:, None]


def _redraw(config: Joint, backbone: bdf.ResNet, generator: torch.Generator, batch: int) -> Tensor:
    """(batch, K) bool: RandomK's decisions, drawn anew for each image."""
    device = generator.device
    seed = int(torch.randint(2**31, (), generator=generator, device=device))
    layers = backbone.config.layers
    return bdf.heuristics.random_k(
        config.static, layers, batch, seed=seed, per_image=True, device=device
    )


def _static_set(
    config: Joint, backbone: bdf.ResNet, dtype: torch.dtype, dataset: Dataset
) -> Tensor:
    """(K,) bool: the set of so many blocks; all of them where each image has its own."""
    blocks = backbone.num_blocks
    if not 0 <= config.static <= blocks:
        raise ValueError(f"static: expected 0 to {blocks} blocks, got {config.static}")
    if config.static_set == PER_IMAGE:
        return torch.ones(blocks, dtype=torch.bool)
    engine = bdf.compile(backbone, dtype=dtype)
    return static_set(
        config.static_set, config.static, engine, config.backbone, dataset.train, config.seed
    )


def _load_model(config: Joint) -> bdf.BlockDrop | bdf.ResNet:
    budgeted = config.policy_lr or config.budget is not None or config.budgets is not None
    if config.static is not None:
        if config.backbone is None or config.model is not None:
            raise ValueError("static: expected --backbone, and no --model")
        if budgeted:
            raise ValueError("static: expected no --policy-lr, --budget or --budgets")
        return bdf.load_backbone(config.backbone)
    if config.static_set != "greedy":
        raise ValueError("static_set: expected with --static, the number of its blocks")
    if config.model is None or config.backbone is not None:
        raise ValueError("model: expected a BlockDrop checkpoint, or --backbone and --static")
    model = bdf.load(config.model)
    if isinstance(model.policy, bdf.FixedPolicy):
        if budgeted:
            raise ValueError(
                f"model: {config.model} has one set for all images, expected no --policy-lr, "
                "--budget or --budgets"
            )
        return model.requires_grad_(True)
    if model.policy.menu is None:
        raise ValueError(
            f"model: the policy network of {config.model} decides block by block; expected one "
            "with a menu, of the stage expert"
        )
    if not 0 <= config.spread <= 1:
        raise ValueError(f"spread: expected 0 to 1, got {config.spread}")
    return model.requires_grad_(True)
