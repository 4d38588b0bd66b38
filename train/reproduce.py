"""The paper's tables and figures, and accuracy against measured time: one command.

    python -m train reproduce --preset quick --data DIR --out DIR [--only table1 fig3]

Runs what is missing for them, from where it was killed, evaluates and times what the runs leave,
and writes ``reproduce.md``, ``reproduce.json`` and figures; see docs/reproduce.md.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from blockdrop_fast.data.image_sets import Dataset
from blockdrop_fast.files import write_json, write_text
from blockdrop_fast.machine import machine_info
from blockdrop_fast.measure.tolerance import WrongLogitsError
from blockdrop_fast.networks.checkpoint_files import read_first_values
from train.config import Reproduce
from train.frontier.evaluation import evaluate_systems
from train.frontier.figure import draw_flops, draw_times
from train.frontier.rows import Row, in_order, rows_of, table
from train.frontier.systems import load_systems
from train.frontier.times import time_systems, timed_images
from train.images import prepare
from train.reproduction.points import PARTS, Point, points_of, system_of
from train.reproduction.runs import Run, closure, runs_of, stage_of
from train.reproduction.scales import DIGITS, PAPER, QUICK, Scale
from train.reproduction.tables import TITLES, table1, table2, table3, table_of_times
from train.run_files import STATE_FILE, described, same_value, shown
from train.stages import Stage

WHAT_FILE = "reproduction.json"
RESULT_FILE = "reproduce.json"
EVALUATIONS_FILE = "evaluations.json"
TIMED = {"table2", "times"}
NOTES = (
    "Accuracies are on the test split, of the last epoch, with their binomial standard error; of a "
    "rule with several seeds, mean and standard deviation over them. Blocks and FLOPs are of an "
    "image, mean and standard deviation over images; FLOPs are 2 x multiply-adds of all that runs, "
    "policies, gates and heads included. Milliseconds are medians of one interleaved run, from "
    "images to logits, policies included, after the logits were checked. No engine executes gates "
    "for every pixel (SACT, LCCL): their FLOPs are counted from the masks, and they have no time. "
    "Epochs are those of a run and of the runs that it starts from. The paper's values are those "
    "of Wu et al. 2018 on CIFAR-10, times of one NVIDIA P6000."
)
Rows = dict[str, dict[str, Row]]  # network -> key of a point -> the system's row


def reproduce(config: Reproduce) -> None:
    """Make the parts of ``only``, and what is missing for them.

    Raises:
        ValueError: options that do not fit, a folder that holds another reproduction, or a run of
            it with other options.
        RuntimeError: a system's logits are wrong.
    """
    config = replace(config, out=config.out.resolve())
    _, dataset = prepare(replace(config, device="cpu"))  # where systems are evaluated and timed
    scale = _scale(config, dataset)
    parts = config.only or PARTS
    if TIMED & set(parts):
        timed_images(dataset.test)  # too few are to be refused before hours of training
    runs: dict[str, Run] = {}
    points: dict[str, list[Point]] = {}
    for arch in scale.archs:
        own = runs_of(arch, scale)
        runs |= own
        shown = points_of(arch, scale, own)
        points[arch] = [one for one in shown if set(parts) & set(one.parts)]
    wanted = [one.run for own in points.values() for one in own]
    wanted += [one.k_of for own in points.values() for one in own if one.k_of is not None]
    runs = closure(runs, wanted)
    _claim(config, scale, dataset)
    stages = _run_all(config, scale, runs)
    rows = _measure(config, dataset, points, runs, stages, parts)
    _write(config, scale, dataset, points, stages, rows, parts)


def _scale(config: Reproduce, dataset: Dataset) -> Scale:
    quick = DIGITS if dataset.name == "digits" else QUICK
    scale = quick if config.scale == "quick" else PAPER
    return scale if config.arch is None else replace(scale, archs=config.arch)


def _claim(config: Reproduce, scale: Scale, dataset: Dataset) -> None:
    """Write down what the folder holds, or refuse it if that is something else."""
    what = {
        "preset": config.scale,
        "data": dataset.name,
        "images": [len(dataset.train), len(dataset.test)],
        "arch": list(scale.archs),
        "seed": config.seed,
        "init": config.init and described(config.init),
        "epochs": config.epochs,
    }
    path = config.out / WHAT_FILE
    if not path.exists():
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(path, what)
        return
    held = _read(path)
    differ = [
        f"{name} {shown(held.get(name))}, not {shown(value)}"
        for name, value in what.items()
        if not same_value(held.get(name), value)
    ]
    if differ:
        raise ValueError(f"out: {config.out} holds another reproduction: {'; '.join(differ)}")


def _run_all(config: Reproduce, scale: Scale, runs: dict[str, Run]) -> dict[str, Stage]:
    """Run what is not complete.

    Raises:
        ValueError: a folder holds a run with other options; before anything runs, but for runs
            whose options come from others that are not complete.
    """
    stages: dict[str, Stage] = {}
    for name, run in runs.items():
        before = run.static_of
        if before is None or (before in stages and stages[before].complete):
            stages[name] = _stage(name, run, config, scale, stages)
    left = [name for name in runs if name not in stages or not stages[name].complete]
    for number, name in enumerate(left):
        done = len(runs) - len(left) + number
        print(f"{done} of {len(runs)} runs are complete, left: {' '.join(left[number:])}")
        stages[name] = stage = _stage(name, runs[name], config, scale, stages)
        epochs = getattr(stage.config, "epochs", None)
        print(f"{name}: {stage.stage}" + (f", {epochs} epochs" if epochs else ""), flush=True)
        stage.run()
    print(f"{len(runs)} of {len(runs)} runs are complete", flush=True)
    return stages


def _stage(name: str, run: Run, config: Reproduce, scale: Scale, stages: dict[str, Stage]) -> Stage:
    usage = None if run.static_of is None else _usage(stages[run.static_of])
    stage = stage_of(name, run, config, scale, usage)
    stage.check()
    return stage


def _usage(stage: Stage) -> int:
    """Rounded mean blocks on test images, at least one, of a complete run."""
    # Not of metrics.json, in which a damaged digit would not be noticed.
    last = json.loads(read_first_values(stage.config.out / STATE_FILE)["history"])[-1]
    return max(1, round(last["test_sparsity"]))


def _measure(
    config: Reproduce,
    dataset: Dataset,
    points: dict[str, list[Point]],
    runs: dict[str, Run],
    stages: dict[str, Stage],
    parts: tuple[str, ...],
) -> Rows:
    """Evaluate all systems, and time those that a part shows with their time."""
    keys, shown, systems = [], [], []
    for arch, own in points.items():
        for point in own:
            system = system_of(point, runs, stages, lambda run: _usage(stages[run]))
            if len(points) > 1:  # lines join systems of one network
                system = replace(
                    system,
                    name=f"{arch}: {system.name}",
                    group=f"{arch}: {system.group}",
                    rival=system.rival and f"{arch}: {system.rival}",
                )
            keys.append((arch, point.key))
            shown.append(point.parts)
            systems.append(system)
    groups = {system.group for system in systems}
    systems = [one if one.rival in groups else replace(one, rival=None) for one in systems]
    loaded = load_systems(systems, dataset)
    evaluations = evaluate_systems(loaded, dataset, config.out / EVALUATIONS_FILE)
    timed = [bool(TIMED & set(parts) & set(one)) for one in shown]
    samples = [{} for _ in loaded]
    if any(timed):
        print(f"timing {sum(timed)} systems", flush=True)
        due = [one for one, is_timed in zip(loaded, timed, strict=True) if is_timed]
        try:
            found = iter(time_systems(due, dataset.test, config.rounds))
        except WrongLogitsError as error:
            raise RuntimeError(str(error)) from None
        samples = [next(found) if is_timed else {} for is_timed in timed]
    by_name = {row.system.name: row for row in rows_of(loaded, evaluations, samples)}
    rows: Rows = {arch: {} for arch in points}
    for (arch, key), system in zip(keys, systems, strict=True):
        rows[arch][key] = by_name[system.name]
    return rows


def _write(
    config: Reproduce,
    scale: Scale,
    dataset: Dataset,
    points: dict[str, list[Point]],
    stages: dict[str, Stage],
    rows: Rows,
    parts: tuple[str, ...],
) -> None:
    """The figures, JSON with the parts of this and of earlier calls, and a page of them."""
    path, machine = config.out / RESULT_FILE, machine_info()
    results = _read(path) if path.exists() else {"parts": {}, "runs": {}}
    for name, stage in stages.items():
        command = stage.command(scale.preset).replace(f"{config.out}/", "")
        results["runs"][name] = {"seed": stage.config.seed, "command": command}
    title = f"{dataset.name}, {len(dataset.test)} test images"
    for part in parts:
        shown = {
            arch: {point.key: rows[arch][point.key] for point in own if part in point.parts}
            for arch, own in points.items()
        }
        systems = {
            arch: {key: row.to_dict() for key, row in own.items()} for arch, own in shown.items()
        }
        text = _text(config, scale, part, shown, title)
        text += (
            f"\n\n{title}; {machine['cpu']}, {machine['threads']} threads, "
            f"torch {machine['torch']}, commit {machine['commit']}."
        )
        results["parts"][part] = {"machine": machine, "text": text, "systems": systems}
    command = replace(config, out=Path(config.out.name), only=())
    results["command"] = Stage("reproduce", command).command(config.scale)
    write_json(path, results)
    page = [f"# Reproduction: {dataset.name}", f"`{results['command']}`", NOTES]
    for part in PARTS:
        if part in results["parts"]:
            page += [f"## {TITLES[part]}", results["parts"][part]["text"]]
    made = [
        f"- {name}, seed {one['seed']}: `{one['command']}`" for name, one in results["runs"].items()
    ]
    page += ["## Runs", "\n".join(made)]
    text = "\n\n".join(page) + "\n"
    write_text(config.out / "reproduce.md", text)
    print(f"\n{text}\nwritten: {config.out}/reproduce.md, .json and figures")


def _read(path: Path) -> dict:
    """JSON of a file of this command.

    Raises:
        ValueError: it is of another kind.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"out: {path} is no file of a reproduction")
    return content


def _text(
    config: Reproduce, scale: Scale, part: str, shown: dict[str, dict[str, Row]], title: str
) -> str:
    """Markdown of a part, whose figure is drawn."""
    every = in_order([row for own in shown.values() for row in own.values()])
    if part == "fig3":
        draw_flops(every, title, config.out / "fig3.png")
        return f"![accuracy against FLOPs](fig3.png)\n\n{table(every)}"
    if part == "times":
        draw_times(every, title, config.out / "times.png")
        return f"![accuracy against milliseconds](times.png)\n\n{table_of_times(every)}"
    penalty = f"{scale.penalty:g}"
    tables = {
        "table1": lambda arch, rows: table1(arch, rows, penalty),
        "table2": lambda arch, rows: table2(arch, rows, penalty),
        "table3": lambda arch, rows: table3(arch, rows, scale.penalties),
    }
    return "\n\n".join(f"{arch}:\n\n{tables[part](arch, rows)}" for arch, rows in shown.items())
