"""Stage 2, another way: a policy network that learns from examples, for every budget.

    python -m train expert --preset quick --data DIR --backbone droppable.safetensors
    python -m train expert --preset quick --data DIR --backbone droppable.safetensors --look 2

The paper trains from rewards alone, as no expert examples are available. For a menu of block sets
there are: one call of the engine says which of them the backbone is right with, for the price of an
inference. The policy network learns to predict that, and an image gets the set that is worth its
price (``blockdrop_fast/networks/menu.py``). With ``--look`` it is a small head on what the
backbone's first blocks see (``blockdrop_fast/networks/look.py``). Of a model of one set for all
images (``joint --static``), ``--model FILE --groups G`` makes one with a set for each group of
classes, and the policy learns to tell the groups (``train/upcycling.py``). Not in the paper.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import blockdrop_fast as bdf
from blockdrop_fast.data.image_sets import ImageFolder, ImageSet
from blockdrop_fast.measure.static_line import static_line
from blockdrop_fast.networks.checkpoint_files import read_torch, write_torch
from blockdrop_fast.networks.menu import Menu
from train import distributed
from train.config import Expert
from train.evaluation import evaluate_test, evaluation_metrics, static_accuracies_of
from train.groups import class_groups, confusion_of, own_blocks
from train.images import EVALUATION_BATCH, device_of, plain_batches, prepare, split
from train.loop import Run
from train.optimization import autocast, engine_dtype
from train.run_files import check_options, check_out, options_text
from train.upcycling import upcycle

EXAMPLES_FILE = "examples.pt"
GROUP_IMAGES = 5000
Policy = bdf.PolicyNetwork | bdf.LookPolicy
ROWS = 1024  # of activations that one call of the engine computes at most


def expert(config: Expert) -> None:
    """Make examples, train a policy network on them, and find the price of each budget.

    The policy has an output a set of the menu, the logit of the backbone being right with it, and
    while it trains a second last layer that tells the class. The backbone stays as it is.

    Raises:
        ValueError: options that do not fit the backbone or the data set.
    """
    check_out(config)  # before what an earlier run left there is written anew
    device, dataset = prepare(config)
    backbone, start = _load(config)
    look = (0 if start is None else start.after) if config.look is None else config.look
    backbone.to(device, memory_format=torch.channels_last)
    held_out, train = split(dataset.train, config.held_out, config.seed)
    budget = config.budget
    if isinstance(start, bdf.FixedPolicy):
        start.to(device)
        backbone, examples = _upcycled(config, bdf.BlockDrop(backbone, start), train, look)
        budget, start = float(start.keep.sum()), None
    else:
        engine = bdf.compile(backbone, dtype=engine_dtype(config, device))
        examples = _make_examples(config, engine, train, look, start)
    if budget is None:
        budget = backbone.num_blocks / 2 if start is None else start.menu.budget
    menu = Menu(examples["menu"])
    torch.manual_seed(config.seed)
    if start is not None and start.after == look:
        policy = start
    else:
        policy = _make_policy(backbone, look, menu)
    model = bdf.BlockDrop(backbone, policy)
    trained = _WithClasses(model, len(dataset.classes))
    trained.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        [*policy.parameters(), *trained.classes.parameters()],
        lr=config.lr,
        weight_decay=config.weight_decay,
    )
    steps = max(1, len(train) // config.batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=config.epochs * steps, cycle_momentum=False
    )
    run = Run(config, model, [optimizer], [scheduler, trained.classes], all_used=True)
    engine = bdf.compile(model, dtype=engine_dtype(config, device))
    right, labels = examples["right"].to(device), train.labels.to(device)

    def step(images: Tensor, numbers: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(config, device):
            value, classes = trained(images)
            classification = F.cross_entropy(classes, labels[numbers])
            regression = F.binary_cross_entropy_with_logits(value, right[numbers])
        return config.classify * classification + config.value * regression, {
            "value_loss": regression,
            "class_accuracy": (classes.argmax(1) == labels[numbers]).float().mean(),
        }

    static = None
    for epoch in run.epochs():
        policy.train()
        means = run.descend(train, epoch, step, numbered=True)
        metrics = {f"train_{name}": value for name, value in means.items().items()}
        calibrate(model, held_out, budget, config.workers)
        if run.due(epoch, config.evaluate_every):
            engine.refresh()
            if static is None:
                static = static_accuracies_of(
                    config.model or config.backbone,
                    engine,
                    dataset,
                    config.static_images,
                    config.workers,
                )
            evaluation = evaluate_test(
                engine, dataset, config.workers, None, config.routing_images, static
            )
            metrics |= evaluation_metrics(evaluation, 1.0)
        run.finish_epoch(epoch, metrics)


class _WithClasses(nn.Module):
    """A model, and a second last layer of its policy that tells the class."""

    def __init__(self, model: bdf.BlockDrop, num_classes: int):
        super().__init__()
        self.model = model
        self.classes = nn.Linear(model.policy.fc.in_features, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> (B, M) logits of being right, (B, num_classes) logits of the class."""
        features: list[Tensor] = []
        hook = self.model.policy.fc.register_forward_pre_hook(
            lambda _, inputs: features.append(inputs[0])
        )
        try:
            value = self.model.policy_logits(images)
        finally:
            hook.remove()
        return value, self.classes(features[0])


@torch.no_grad()
def make_examples(
    engine: bdf.Engine, image_set: ImageSet | ImageFolder, sets: Tensor, workers: int
) -> Tensor:
    """How right the backbone is with each set, for each image as it is, without augmentation.

    Args:
        engine: of the backbone.
        image_set: N images.
        sets: (M, K) bool; nested ones share most of their work.
        workers: see ``plain_batches``.

    Returns:
        (N, M) float32 on the CPU, see ``outcomes``.
    """
    rows = max(1, ROWS // len(sets))
    engine, result = distributed.shared(engine), []
    for images, labels in plain_batches(engine.backbone, image_set, rows, workers):
        decisions = sets.to(engine.device)[:, None].expand(-1, len(images), -1)
        logits = engine.run_sets(images.to(engine.dtype), decisions).float()
        result.append(outcomes(logits, labels.expand(len(sets), -1)).T.cpu())
    return torch.cat(result)


def outcomes(logits: Tensor, labels: Tensor) -> Tensor:
    """How right predictions are, 0…1: half whether they are, half the label's probability.

    The latter tells a near miss from a far one.

    Args:
        logits: (…, C).
        labels: (…) int64.

    Returns:
        (…) float32.
    """
    logits = logits.float()
    probability = logits.softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    return ((logits.argmax(-1) == labels).float() + probability) / 2


def _make_examples(
    config: Expert,
    engine: bdf.Engine,
    train: ImageSet | ImageFolder,
    look: int,
    start: Policy | None,
) -> dict[str, Tensor]:
    """The menu and what is right with it; from the run's folder if it is there already."""
    path = config.out / EXAMPLES_FILE
    # A process that is late may find what the first one has just written.
    if config.resume and distributed.gathered(path.exists())[0]:
        examples = read_torch(path)
        if "config" in examples:  # a run killed before its first checkpoint has no other record
            check_options(examples["config"], config)
        return examples
    if start is not None:
        menu = start.menu.sets.cpu()
        right = make_examples(engine, train, menu, config.workers)
    else:
        groups = _find_groups(config, engine, train)
        menu, made_for = _find_menu(config, engine, train, look, groups)
        right = make_examples(engine, train, menu, config.workers)
        right *= torch.where(made_for[groups[train.labels]], 1.0, config.away)
    examples = {"menu": menu, "right": right}
    for kept, share in zip(menu.sum(1).tolist(), examples["right"].mean(0).tolist(), strict=True):
        print(f"examples: {kept} blocks, right {100 * share:.1f} %")
    if distributed.is_first():
        config.out.mkdir(parents=True, exist_ok=True)
        write_torch(examples | {"config": options_text(config)}, path)
    return examples


def _upcycled(
    config: Expert, model: bdf.BlockDrop, train: ImageSet | ImageFolder, look: int
) -> tuple[bdf.ResNet, dict[str, Tensor]]:
    """A backbone with a set of equal size for each group of classes; right is the group's own."""
    engine = bdf.compile(model, dtype=engine_dtype(config, device_of(model)))
    groups = _find_groups(config, engine, train)
    backbone, sets = upcycle(model.backbone, model.policy.keep.cpu(), config.groups, look)
    right = groups[train.labels][:, None] == torch.arange(config.groups)
    return backbone, {"menu": sets, "right": right.float()}


def _find_groups(config: Expert, engine: bdf.Engine, train: ImageSet | ImageFolder) -> Tensor:
    """(C,) int64: the group of each class, by what the engine takes its images for."""
    if config.groups == 1:
        return torch.zeros(engine.config.num_classes, dtype=torch.int64)
    some = train.subset(min(GROUP_IMAGES, len(train)), config.seed)
    batches = plain_batches(engine.backbone, some, EVALUATION_BATCH, config.workers)
    engine = distributed.shared(engine)
    logits = torch.cat(
        [engine(images.to(engine.dtype)).logits.float().cpu() for images, _ in batches]
    )
    groups = class_groups(confusion_of(logits, some.labels), config.groups)
    print(f"groups of classes: {groups.tolist()}")
    return groups


def _find_menu(
    config: Expert,
    engine: bdf.Engine,
    train: ImageSet | ImageFolder,
    look: int,
    groups: Tensor,
) -> tuple[Tensor, Tensor]:
    """The menu (M, K) bool, and which groups of classes its sets are for, (groups, M) bool.

    Sets are those of the static line, down to the smallest, all with what always runs; with
    groups, of each group's line, which drops first what the others have to themselves.
    """
    num_blocks = engine.config.num_blocks
    lowest = max(look, num_blocks // 4) if config.lowest is None else config.lowest
    if config.sets < 1:
        raise ValueError(f"sets: expected at least 1, got {config.sets}")
    if not look <= lowest <= num_blocks:
        raise ValueError(f"lowest: expected {look} to {num_blocks}, got {lowest}")
    looked_at = train.subset(min(config.line_images, len(train)), config.seed)
    sizes = spread_sizes(lowest, num_blocks, -(-config.sets // config.groups))
    own, runs_anyway = own_blocks(engine.config, config.groups), torch.arange(num_blocks) < look
    chains = []
    for group in range(config.groups):
        members = looked_at.take((groups[looked_at.labels] == group).nonzero().squeeze(1))
        batches = plain_batches(engine.backbone, members, EVALUATION_BATCH, config.workers)
        foreign = own.any(0) & ~own[group]
        line = static_line(
            distributed.shared(engine), list(batches), 1 + runs_anyway.int() - foreign.int()
        )
        chains.append(line.sets[sizes])
        if config.groups > 1:
            print(f"group {group}: blocks drop in the order {[k + 1 for k in line.order]}")
    menu = torch.cat(chains).unique(dim=0)
    menu = menu[menu.sum(1).argsort(stable=True)]
    return menu, torch.stack([(menu[:, None] == chain).all(2).any(1) for chain in chains])


def spread_sizes(lowest: int, highest: int, count: int) -> list[int]:
    """At most so many sizes from lowest to highest, ends included, closer together at small ones.

    What a block more is worth falls with their number.
    """
    steps = [step / max(1, count - 1) for step in range(count)]
    sizes = {round((lowest + 1) * ((highest + 1) / (lowest + 1)) ** step) - 1 for step in steps}
    return sorted(sizes)


@torch.no_grad()
def calibrate(
    model: bdf.BlockDrop, held_out: ImageSet | ImageFolder, budget: float | None, workers: int
) -> None:
    """Find the prices of budgets on images that the policy was not trained on.

    Args:
        budget: becomes the menu's own; None: it keeps the one that it has.
    """
    frozen = copy.deepcopy(model).eval()
    batches = plain_batches(model, held_out, EVALUATION_BATCH, workers)
    logits = [distributed.share(frozen.policy_logits, images) for images, _ in batches]
    model.policy.menu.calibrate(torch.cat(logits), budget)


def _load(config: Expert) -> tuple[bdf.ResNet, Policy | bdf.FixedPolicy | None]:
    """The backbone, frozen, and the policy to start from, if there is one."""
    if (config.backbone is None) == (config.model is None):
        raise ValueError("backbone and model: expected one of the two checkpoints")
    if config.model is None:
        backbone, policy = bdf.load_backbone(config.backbone), None
    else:
        if config.lowest is not None:
            raise ValueError("lowest: the menu is that of --model, expected none")
        model = bdf.load(config.model)
        backbone, policy = model.backbone, model.policy
        fixed = isinstance(policy, bdf.FixedPolicy)
        if fixed and (config.groups < 2 or config.budget is not None):
            raise ValueError(
                f"groups: {config.model} has one set for all images, expected two or more groups "
                "to have one each, and no --budget"
            )
        if not fixed and config.groups != 1:
            raise ValueError("groups: the menu is that of --model, expected none")
        if not fixed and policy.menu is None:
            raise ValueError(f"model: the policy of {config.model} has no menu to take")
    layers = backbone.config.layers[0]
    if config.look is not None and not 0 <= config.look <= layers:
        raise ValueError(
            f"look: expected 0 to {layers}, the blocks of the first segment, got {config.look}"
        )
    if config.budget is not None and not 0 <= config.budget <= backbone.num_blocks:
        raise ValueError(
            f"budget: expected from 0 to {backbone.num_blocks} blocks, got {config.budget:g}"
        )
    if isinstance(policy, Policy) and not policy.menu.sets[:, : config.look or 0].all():
        raise ValueError(f"look: the menu of {config.model} drops one of blocks 1 to {config.look}")
    return backbone.eval().requires_grad_(False), policy


def _make_policy(backbone: bdf.ResNet, look: int, menu: Menu) -> Policy:
    if look:
        return bdf.LookPolicy(backbone.config, look, menu)
    make = bdf.policy_resnet8 if backbone.config.stem == "cifar" else bdf.policy_resnet10
    plain = make(len(menu.sets))
    return bdf.PolicyNetwork(plain.network, plain.input_pool, menu)
