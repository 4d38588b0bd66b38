"""All stages of a recipe in a row, each from what the one before it left.

    python -m train recipe --preset quick --data DIR --out DIR

``paper``: pretrain, curriculum, finetune, by rewards. ``quick``: a backbone that bears dropping, a
policy that learns from examples, joint finetuning, the policy once more: a model for every budget.
``groups``: the best static set, trained, becomes one for each group of classes, and a head on the
first blocks tells the groups. Beside the latter two the control, a static set of blocks with the
same training. The command can be repeated after a kill: complete stages are not run again, and one
that was interrupted goes on where it was.
"""

from __future__ import annotations

from dataclasses import replace

import torch

import blockdrop_fast as bdf
from blockdrop_fast.data.image_sets import Dataset
from blockdrop_fast.files import write_json
from blockdrop_fast.measure.evaluation import Evaluation
from blockdrop_fast.networks.architectures import by_name
from blockdrop_fast.networks.checkpoints import load_any
from train import distributed
from train.config import RECIPES, Common, Recipe
from train.evaluation import evaluate_test, static_accuracies_of
from train.images import check_held_out, prepare
from train.stages import Stage, run_stages

RESULT_FILE = "recipe.json"
# Stage of a recipe -> which stage of the command line it is, and its options that name what earlier
# ones left, each with that stage.
WIRES: dict[str, tuple[str, dict[str, str]]] = {
    "pretrain": ("pretrain", {}),
    "droppable": ("pretrain", {"init": "pretrain"}),
    "expert": ("expert", {"backbone": "droppable"}),
    "joint": ("joint", {"model": "expert", "teacher": "pretrain"}),
    "refit": ("expert", {"model": "joint"}),
    "control": ("joint", {"backbone": "droppable", "teacher": "pretrain"}),
    "static": ("joint", {"backbone": "droppable", "teacher": "pretrain"}),
    "groups": ("expert", {"model": "static"}),
    "groups_joint": ("joint", {"model": "groups", "teacher": "pretrain"}),
    "groups_control": ("joint", {"model": "static", "teacher": "pretrain"}),
    "curriculum": ("curriculum", {"backbone": "pretrain"}),
    "finetune": ("finetune", {"model": "curriculum"}),
}


CONTROLS = ("control", "groups_control")


def recipe(config: Recipe) -> None:
    """Run the stages; say what the model is worth, and write it to ``recipe.json``.

    Raises:
        ValueError: options that contradict each other or the data set; before anything runs.
    """
    stages = stages_of(config, RECIPES[config.recipe])
    _, dataset = prepare(config)
    check_data(stages, dataset)
    run_stages(stages)
    results = evaluate_stages(config, stages, dataset)
    print("\n" + format_results(results))
    if distributed.is_first():
        values = {name: evaluation.to_dict() for name, evaluation in results.items()}
        write_json(config.out / RESULT_FILE, values)


def stages_of(config: Recipe, presets: dict[str, Common]) -> dict[str, Stage]:
    """The stages in order, by name, each wired to what those before it leave.

    Args:
        config: the recipe's options.
        presets: name -> options of the stage, but for those that the recipe sets.

    Raises:
        ValueError: an option that none of the stages takes.
    """
    _check(config, presets)
    names = ("data", "seed", "device", "threads", "workers", "precision", "limit", "routing_images")
    names += ("sync_bn",)
    common = {name: getattr(config, name) for name in names}
    first = {"init": config.init} | ({} if config.arch is None else {"arch": config.arch})
    own = {
        "pretrain": first,
        "expert": {"budget": config.budget, "look": config.look or 0},
        "control": {"static": config.budget and round(config.budget)},
        "static": {"static": config.budget and round(config.budget)},
        "groups": {} if config.look is None else {"look": config.look},
    }
    stages: dict[str, Stage] = {}
    for name, preset in presets.items():
        if name in CONTROLS and not config.control:
            continue
        stage, wires = WIRES[name]
        options = common | own.get(name, {})
        options |= {option: stages[earlier].checkpoint for option, earlier in wires.items()}
        if config.epochs is not None:
            options["epochs"] = config.epochs
        if config.held_out is not None and getattr(preset, "held_out", 0):
            options["held_out"] = config.held_out
        stages[name] = Stage(stage, replace(preset, out=config.out / name, **options))
    return stages


def check_data(stages: dict[str, Stage], dataset: Dataset) -> None:
    """Raise ValueError where a stage holds out more images than there are."""
    for stage in stages.values():
        if held_out := getattr(stage.config, "held_out", 0):
            check_held_out(held_out, len(dataset.train))


def evaluate_stages(
    config: Recipe, stages: dict[str, Stage], dataset: Dataset
) -> dict[str, Evaluation]:
    """Test results of the full network, the model, and the control where there is one."""
    control = next((stages[name] for name in CONTROLS if name in stages), None)
    model = [stage for name, stage in stages.items() if name not in CONTROLS][-1]
    results = {}
    shown = {"full network": stages["pretrain"], "BlockDrop": model, "one set for all": control}
    for name, stage in shown.items():
        if stage is None:
            continue
        engine = bdf.compile(load_any(stage.checkpoint).eval())
        static = None
        if stage is model:
            static = static_accuracies_of(
                stage.checkpoint, engine, dataset, config.static_images, config.workers
            )
        results[name] = evaluate_test(
            engine, dataset, config.workers, None, config.routing_images, static
        )
    return results


def format_results(results: dict[str, Evaluation]) -> str:
    """A table, and what the model's routing is worth, to print."""
    lines = [f"{'test split':<16} {'accuracy':>9} {'blocks':>14} {'FLOPs':>10}"]
    for name, one in results.items():
        blocks = f"{one.block_usage:.2f} ± {one.block_usage_std:.2f}"
        lines.append(f"{name:<16} {100 * one.accuracy:>7.2f} % {blocks:>14} {one.flops:>10.3e}")
    return "\n".join([*lines, "", *results["BlockDrop"].format_routing(), *format_verdict(results)])


def format_verdict(results: dict[str, Evaluation]) -> list[str]:
    """The line that says what a look at the image is worth; none without a control."""
    model, control = results["BlockDrop"], results.get("one set for all")
    if control is None:
        return []
    ahead = 100 * (model.accuracy - control.accuracy)
    return [
        f"against one set  {ahead:+.2f} points at {model.block_usage:.2f} blocks against "
        f"{control.block_usage:.0f}, trained as long"
    ]


def _check(config: Recipe, presets: dict[str, Common]) -> None:
    by_rewards = "curriculum" in presets
    if by_rewards and (config.budget is not None or config.look is not None):
        raise ValueError(
            "budget and look: this recipe's policy learns from rewards and takes neither; "
            "--preset quick does"
        )
    if config.budget is None and not by_rewards:
        raise ValueError("budget: the mean kept blocks of the model and its control are required")
    if config.budget is not None:
        blocks = _blocks(config, presets)
        if not 0 <= config.budget <= blocks:
            raise ValueError(f"budget: expected from 0 to {blocks} blocks, got {config.budget:g}")


def _blocks(config: Recipe, presets: dict[str, Common]) -> int:
    """K of the network."""
    if config.init is not None:
        return bdf.load_backbone(config.init).num_blocks
    with torch.device("meta"):
        return by_name(config.arch or presets["pretrain"].arch)(1).num_blocks
