"""The runs of a reproduction, each with what it takes from earlier ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace

from train.config import Common, Reproduce
from train.reproduction.scales import Scale, budgets, kept_blocks, num_blocks, shallower
from train.run_files import MODEL_FILE
from train.stages import PRESETS, Stage

HEURISTICS = ("greedy", "first_k", "random_k_per_image", "distribute_k")


@dataclass(frozen=True)
class Run:
    """A run, before it is known where.

    Attributes:
        kind: whose options of the scale it has.
        stage: of ``python -m train``.
        options: of its own.
        takes: options that name checkpoints -> the runs that leave them.
        static_of: run whose mean usage on test images, rounded, is the option ``static``.
        blocks: of the network, where a curriculum frees them.
    """

    kind: str
    stage: str
    options: dict = field(default_factory=dict)
    takes: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    static_of: str | None = None
    blocks: int = 0

    @property
    def needs(self) -> list[str]:
        """Runs that have to be complete before."""
        needed = [] if self.static_of is None else [self.static_of]
        for taken in self.takes.values():
            needed += [taken] if isinstance(taken, str) else taken
        return needed


def runs_of(arch: str, scale: Scale) -> dict[str, Run]:
    """The runs of one network, by name, in an order in which they can run."""
    blocks, kept = num_blocks(arch), kept_blocks(arch)
    full, small = arch, shallower(arch)
    droppable, final = f"{arch}-droppable", f"{arch}-refit"
    finetune = f"{arch}-finetune-{scale.penalty:g}"
    runs = {one: Run("pretrain", "pretrain", {"arch": one}) for one in (full, *small)}
    on_full = {"model": full}
    runs |= {
        droppable: Run("droppable", "pretrain", {"droppable": True}, {"init": full}),
        f"{arch}-expert": Run("expert", "expert", {"budget": float(kept)}, {"backbone": droppable}),
        f"{arch}-joint": Run("joint", "joint", {}, {"model": f"{arch}-expert", "teacher": full}),
        final: Run("refit", "expert", {}, {"model": f"{arch}-joint"}),
    }
    for keep in budgets(arch):
        runs[f"{arch}-static-{keep}"] = Run(
            "static", "joint", {"static": keep}, {"backbone": droppable, "teacher": full}
        )
    for one in scale.penalties:
        options = {"penalty": one}
        policy, both = f"{arch}-curriculum-{one:g}", f"{arch}-finetune-{one:g}"
        runs[policy] = Run("curriculum", "curriculum", options, {"backbone": full}, blocks=blocks)
        runs[both] = Run("finetune", "finetune", options, {"model": policy})
    for rule in HEURISTICS:
        runs[f"{arch}-{rule.replace('_', '-')}"] = Run(
            "heuristic", "joint", {"static_set": rule}, {"backbone": full}, finetune
        )
    for seed in range(scale.seeds):
        options = {"static_set": "random_k", "seed": seed}
        runs[f"{arch}-random-k-{seed}"] = Run(
            "heuristic", "joint", options, {"backbone": full}, finetune
        )
    options = {"penalty": scale.penalty}
    runs |= {
        f"{arch}-sequential": Run(
            "sequential", "sequential", options, {"backbone": full}, blocks=blocks
        ),
        f"{arch}-sequential-joint": Run(
            "sequential-joint",
            "sequential",
            options | {"joint": True},
            {"model": f"{arch}-sequential"},
        ),
        f"{arch}-act": Run("act", "halting", {}, {"backbone": full}),
        f"{arch}-act-hard": Run("act-hard", "halting", {"hard": True}, {"model": f"{arch}-act"}),
        f"{arch}-sact": Run("sact", "sact", {}, on_full),
        f"{arch}-lccl": Run("lccl", "lccl", {}, on_full),
    }
    # The paper's variants are for its networks; others lose a third of each block's filters.
    known = arch in ("resnet32", "resnet56", "resnet110")
    for variant in ("A", "B") if known else ("thirds",):
        options = {"variant": variant} if known else {"ratios": (0.3, 0.3, 0.3)}
        runs[f"{arch}-pfec-{variant}"] = Run("pfec", "pfec", options, on_full)
    runs[f"{arch}-pfec-blockdrop"] = Run("pfec-blockdrop", "pfec", options, {"model": final})
    held = f"{arch}-held"
    runs[held] = Run("held", "pretrain", {"arch": arch})
    runs[f"{arch}-exits"] = Run("exits", "exits", {"budget": float(kept)}, {"backbone": held})
    if small:
        runs[f"{small[0]}-held"] = Run("held", "pretrain", {"arch": small[0]})
        budget = num_blocks(small[0]) + blocks // 4
        runs[f"{arch}-cascade"] = Run(
            "cascade",
            "cascade",
            {"budget": float(budget)},
            {"networks": (f"{small[0]}-held", held)},
        )
    look = {"look": 1 if blocks < 15 else 2, "budget": float(kept)}
    runs[f"{arch}-look"] = Run("look", "expert", look, {"backbone": droppable})
    runs[f"{arch}-look-joint"] = Run(
        "joint", "joint", {}, {"model": f"{arch}-look", "teacher": full}
    )
    return runs


def closure(runs: dict[str, Run], wanted: Iterable[str]) -> dict[str, Run]:
    """Runs that are wanted and all that these need, in order."""
    needed, left = set(), list(wanted)
    while left:
        name = left.pop()
        if name not in needed:
            needed.add(name)
            left += runs[name].needs
    return {name: run for name, run in runs.items() if name in needed}


def stage_of(name: str, run: Run, config: Reproduce, scale: Scale, usage: int | None) -> Stage:
    """The run in its folder.

    Args:
        name, run: see ``runs_of``.
        config: of the reproduction.
        scale: its scale.
        usage: of the run ``static_of``.
    """
    names = ("data", "device", "threads", "workers", "precision", "limit")
    options = {one: getattr(config, one) for one in names}
    options |= scale.same | scale.options.get(run.kind, {}) | run.options
    options["seed"] = config.seed + run.options.get("seed", 0)
    if usage is not None:
        options["static"] = usage
    for option, taken in run.takes.items():
        paths = [
            config.out / one / MODEL_FILE for one in ([taken] if isinstance(taken, str) else taken)
        ]
        options[option] = paths[0] if isinstance(taken, str) else tuple(paths)
    preset: Common = PRESETS[scale.preset][run.stage]
    if config.epochs is not None:
        options["epochs"] = config.epochs
    if run.kind == "pretrain" and name == next(iter(scale.archs)) and config.init is not None:
        options["init"] = config.init
    known = {one.name for one in fields(preset)}
    if "blocks_per_epoch" in known:  # all blocks are free in the last 40 % of the epochs, or more
        epochs = options.get("epochs", preset.epochs)
        freed = run.blocks / (0.6 * epochs)
        options["blocks_per_epoch"] = max(preset.blocks_per_epoch, round(freed, 2))
    options = {option: value for option, value in options.items() if option in known}
    return Stage(run.stage, replace(preset, out=config.out / name, **options))


def epochs_text(name: str, runs: dict[str, Run], stages: dict[str, Stage]) -> str:
    """The epochs of a run and of those before it, "12 + 10"; teachers are not counted."""
    earlier = [one for option, one in runs[name].takes.items() if option != "teacher"]
    own = getattr(stages[name].config, "epochs", None)
    texts = [epochs_text(one, runs, stages) for one in earlier if isinstance(one, str)]
    return " + ".join([*texts, *([] if own is None else [str(own)])])
