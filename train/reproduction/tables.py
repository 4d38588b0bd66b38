"""The paper's tables, with our rows and its own values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from train.frontier.rows import Row, markdown
from train.reproduction.points import RULES

# Wu et al. 2018, CIFAR-10. Table 1: accuracy and K, before and after joint finetuning; table 2:
# milliseconds an image at batch 1, NVIDIA P6000; table 3: accuracy, blocks, FLOPs.
TABLE1 = {
    "resnet32": {
        "first_k": ("16.6, 10", "84.3, 7"),
        "random_k": ("20.5, 10", "88.9, 7"),
        "distribute_k": ("23.4, 10", "90.2, 7"),
        "ours": ("88.6, 9.4", "91.3, 6.9"),
        "full": ("92.3, 15", "92.3, 15"),
    },
    "resnet110": {
        "first_k": ("13.3, 21", "71.3, 17"),
        "random_k": ("14.5, 21", "90.1, 17"),
        "distribute_k": ("13.0, 21", "92.7, 17"),
        "ours": ("75.4, 20.1", "93.6, 16.9"),
        "full": ("93.2, 54", "93.2, 54"),
    },
}
TABLE2 = {
    "resnet32": {"full": "7.71", "finetune": "6.56", "joint": "9.92"},
    "resnet110": {"full": "24.1", "finetune": "10.9", "joint": "29.1"},
}
TABLE3 = {
    "resnet32": {
        "full": "92.3, 15, 1.38e8",
        "5": "91.3, 6.9 ± 1.6, 8.66e7 ± 1.40e7",
    },
    "resnet110": {
        "full": "93.2, 54, 5.06e8",
        "2": "91.9, 10.3 ± 2.7, 1.18e8 ± 2.46e7",
        "5": "93.0, 13.8 ± 3.5, 1.51e8 ± 3.24e7",
        "10": "93.6, 16.9 ± 3.7, 1.81e8 ± 3.43e7",
    },
}
TITLES = {
    "table1": "Table 1: heuristics against the learned policy, before and after finetuning",
    "table2": "Table 2: one-shot policy, sequential policy, complete network",
    "table3": "Table 3: γ, what a wrong prediction costs",
    "fig3": "Figure 3: accuracy against FLOPs",
    "times": "Accuracy against measured milliseconds",
}


def accuracy(row: Row) -> str:
    """Per cent, with its standard error."""
    return f"{100 * row.evaluation.accuracy:.2f} ± {100 * row.standard_error:.2f}"


def blocks(row: Row) -> str:
    """Mean and standard deviation over images."""
    return f"{row.evaluation.block_usage:.2f} ± {row.evaluation.block_usage_std:.2f}"


def megaflops(row: Row) -> str:
    """Mean and standard deviation over images."""
    return f"{row.evaluation.flops / 1e6:.2f} ± {row.evaluation.flops_std / 1e6:.2f}"


def table1(arch: str, rows: dict[str, Row], penalty: str) -> str:
    """Args: rows by their points' keys; ``penalty``: gamma of the policies."""
    paper = TABLE1.get(arch, {})
    head = ["system", "accuracy, %", "blocks", "paper: accuracy, K"]
    lines = [[*head, "finetuned: accuracy, %", "blocks", "paper: accuracy, K"]]
    for rule, label in RULES.items():
        of_rule = paper.get(rule, ("", ""))
        before, after = (_of_seeds(rows, f"{when} {rule}") for when in ("before", "after"))
        lines.append([label, *before, of_rule[0], *after, of_rule[1]])
    for label, before, after, of_paper in (
        ("learned policy", f"curriculum {penalty}", f"finetune {penalty}", "ours"),
        ("all blocks", "full", "full", "full"),
    ):
        published = paper.get(of_paper, ("", ""))
        lines.append(
            [label, accuracy(rows[before]), blocks(rows[before]), published[0]]
            + [accuracy(rows[after]), blocks(rows[after]), published[1]]
        )
    return markdown(lines)


def _of_seeds(rows: dict[str, Row], key: str) -> list[str]:
    """A rule's accuracy and blocks: over its seeds, if there are several."""
    if key in rows:
        return [accuracy(rows[key]), blocks(rows[key])]
    own = [row for name, row in rows.items() if name.rpartition("-")[0] == key]
    values = [100 * row.evaluation.accuracy for row in own]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return [f"{statistics.mean(values):.2f} ± {spread:.2f} ({len(own)} seeds)", blocks(own[0])]


def table2(arch: str, rows: dict[str, Row], penalty: str) -> str:
    """Args: as of ``table1``; the rows with times."""
    paper, full = TABLE2.get(arch, {}), rows["full"]
    timed = sorted(full.milliseconds)
    head = ["system", "accuracy, %", "blocks", "MFLOPs"]
    for batch in timed:
        head += [f"ms an image, batch {batch}", "speed-up"]
    lines = [[*head, "paper: ms an image"]]
    labels = {
        "full": "all blocks",
        f"curriculum {penalty}": f"one-shot, curriculum, γ = {penalty}",
        f"finetune {penalty}": f"one-shot, finetuned, γ = {penalty}",
        "blockdrop": "one-shot, by examples",
        "sequential": "sequential, curriculum",
        "joint": "sequential, joint",
    }
    for key, label in labels.items():
        (row,) = (one for name, one in rows.items() if name == key or name.split()[0] == key)
        line = [label, accuracy(row), blocks(row), megaflops(row)]
        for batch in timed:
            own, of_full = row.milliseconds[batch], full.milliseconds[batch]
            line += [f"{own / batch:.4f}", f"{of_full / own:.2f}x"]
        lines.append([*line, paper.get(key.split()[0], "")])
    return markdown(lines)


def table3(arch: str, rows: dict[str, Row], penalties: Sequence[float]) -> str:
    """Args: as of ``table1``; ``penalties``: the gammas."""
    paper, full = TABLE3.get(arch, {}), rows["full"]
    names = ["network", "accuracy, %", "blocks", "MFLOPs", "fewer FLOPs"]
    lines = [[*names, "paper: accuracy, blocks, FLOPs"]]

    def line(label: str, row: Row, published: str) -> list[str]:
        fewer = 100 * (1 - row.evaluation.flops / full.evaluation.flops)
        return [label, accuracy(row), blocks(row), megaflops(row), f"{fewer:.1f} %", published]

    lines.append(line("all blocks", full, paper.get("full", "")))
    for stage, label in (("curriculum", "curriculum"), ("finetune", "finetuned")):
        for one in penalties:
            published = paper.get(f"{one:g}", "") if stage == "finetune" else ""
            lines.append(line(f"{label}, γ = {one:g}", rows[f"{stage} {one:g}"], published))
    return markdown(lines)


def table_of_times(rows: Sequence[Row]) -> str:
    """Systems from fast to slow at the largest batch, those without times last."""
    timed = sorted({batch for row in rows for batch in row.milliseconds})
    head = ["system", "accuracy, %", "MFLOPs", *(f"ms an image, batch {b}" for b in timed)]
    lines = [[*head, "executed by"]]
    for row in sorted(rows, key=lambda row: row.milliseconds.get(timed[-1], math.inf)):
        times = [
            f"{row.milliseconds[batch] / batch:.4f}"
            if batch in row.milliseconds
            else "not executed"
            for batch in timed
        ]
        lines.append([row.system.name, accuracy(row), megaflops(row), *times, row.strategy])
    return markdown(lines)
