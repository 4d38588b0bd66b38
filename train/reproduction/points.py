"""The systems of a reproduction: what a run leaves, at a budget or under a rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from train.frontier.systems import System
from train.reproduction.runs import Run, epochs_text
from train.reproduction.scales import Scale, budgets, kept_blocks
from train.stages import Stage

PARTS = ("table1", "table2", "table3", "fig3", "times")
RULES = {
    "first_k": "FirstK",
    "random_k": "RandomK",
    "random_k_per_image": "RandomK, per image",
    "distribute_k": "DistributeK",
    "greedy": "best set (greedy)",
}


@dataclass(frozen=True)
class Point:
    """A system, before its run is complete.

    Attributes:
        key: what it is in the tables.
        label: of the figures and tables, with {k} for the blocks of ``k_of``.
        group: see ``System``.
        run: whose model it is.
        parts: where it is shown.
        options: of the ``System``, beside.
        k_of: run whose mean usage, rounded, is the option ``k``.
    """

    key: str
    label: str
    group: str
    run: str
    parts: tuple[str, ...] = ("fig3", "times")
    options: dict = field(default_factory=dict)
    k_of: str | None = None


def points_of(arch: str, scale: Scale, runs: dict[str, Run]) -> list[Point]:
    """All systems of one network.

    Args:
        arch: the network.
        scale: of the reproduction.
        runs: of the network, see ``runs_of``.
    """
    main, kept = f"{scale.penalty:g}", kept_blocks(arch)
    curriculum, finetune = f"{arch}-curriculum-{main}", f"{arch}-finetune-{main}"
    everywhere = ("table1", "table2", "table3", "fig3", "times")
    static = {"rival": "static sets"}
    points = [Point("full", f"{arch}, all blocks", "full ResNets", arch, everywhere)]
    points += [
        Point(name, name, "full ResNets", name)
        for name, run in runs.items()
        if run.kind == "pretrain" and name != arch
    ]
    points += [
        Point(f"static-{keep}", f"one set of {keep}", "static sets", f"{arch}-static-{keep}")
        for keep in budgets(arch)
    ]
    seeds = {"random_k": range(scale.seeds)}
    for rule, label in RULES.items():
        for seed in seeds.get(rule, (None,)):
            ending = "" if seed is None else f", seed {seed}"
            number = "" if seed is None else f"-{seed}"
            drawn = {} if seed is None else {"seed": seed}
            points.append(
                Point(
                    f"before {rule}{number}",
                    f"{label} {{k}}{ending}, not finetuned",
                    "heuristics",
                    arch,
                    ("table1",),
                    {"heuristic": rule} | drawn,
                    curriculum,
                )
            )
            per_image = {"heuristic": rule} if rule == "random_k_per_image" else {}
            points.append(
                Point(
                    f"after {rule}{number}",
                    f"{label} {{k}}{ending}",
                    "heuristics, finetuned",
                    f"{arch}-{rule.replace('_', '-')}{number}",
                    ("table1", "fig3", "times"),
                    per_image,
                    finetune,
                )
            )
    for one in scale.penalties:
        first = ("table1", "table2") if one == scale.penalty else ()
        # Without finetuning accuracies are so low that a figure would show nothing else.
        for stage, group, last in (
            ("curriculum", "curriculum", ()),
            ("finetune", "finetuned", ("fig3", "times")),
        ):
            name = f"{arch}-{stage}-{one:g}"
            points.append(
                Point(
                    f"{stage} {one:g}",
                    f"{group}, γ = {one:g}",
                    f"BlockDrop, {group}",
                    name,
                    (*first, "table3", *last),
                    static,
                )
            )
    points += [
        Point(
            f"blockdrop {keep}",
            f"by examples, {keep}",
            "BlockDrop by examples",
            f"{arch}-refit",
            ("table2", "fig3", "times") if keep == kept else ("fig3", "times"),
            static | {"budget": float(keep)},
        )
        for keep in budgets(arch)
    ]
    both = ("table2", "fig3", "times")
    points += [
        Point("sequential", "seq", "BlockDrop-seq", f"{arch}-sequential", ("table2",), static),
        Point("joint", "seq, joint", "BlockDrop-seq", f"{arch}-sequential-joint", both, static),
    ]
    for key, label, group in (
        ("act", "ACT", "ACT"),
        ("act-hard", "ACT-hard", "ACT-hard"),
        ("sact", "SACT", "SACT"),
        ("lccl", "LCCL", "LCCL"),
        ("pfec-A", "PFEC A", "PFEC"),
        ("pfec-B", "PFEC B", "PFEC"),
        ("pfec-thirds", "PFEC", "PFEC"),
        ("pfec-blockdrop", "PFEC + BlockDrop", "PFEC + BlockDrop"),
        ("exits", "exits", "exits"),
        ("cascade", "cascade", "cascade"),
        ("look-joint", "look", "look, then decide"),
    ):
        if (run := f"{arch}-{key}") in runs:
            rival = {} if group == "PFEC" else static
            points.append(Point(key, label, group, run, options=rival))
    return points


def system_of(
    point: Point,
    runs: dict[str, Run],
    stages: dict[str, Stage],
    usage: Callable[[str], int],
) -> System:
    """The system of a complete run.

    Args:
        point: which.
        runs, stages: all that are complete.
        usage: run -> rounded mean usage.
    """
    options, k = dict(point.options), None if point.k_of is None else usage(point.k_of)
    if "heuristic" in options:
        options["k"] = k
    stage = stages[point.run]
    options = {"seed": stage.config.seed} | options
    return System(
        name=point.label.format(k=k),
        group=point.group,
        checkpoint=str(stage.checkpoint),
        epochs=epochs_text(point.run, runs, stages),
        **options,
    )
