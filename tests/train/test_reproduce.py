"""``python -m train reproduce``: its graph, its tables, and that nothing is lost by a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import tyro

from blockdrop_fast.measure.evaluation import Evaluation
from train.config import Reproduce
from train.frontier.rows import Row
from train.frontier.systems import System
from train.reproduce import reproduce
from train.reproduction import tables
from train.reproduction.points import PARTS, points_of, system_of
from train.reproduction.runs import closure, runs_of, stage_of
from train.reproduction.scales import DIGITS, PAPER, QUICK, budgets
from train.stages import PRESETS, STAGES

ARCHS = ("resnet14", "resnet32", "resnet110")
SCALES = {"digits": DIGITS, "quick": QUICK, "paper": PAPER}
TINY = Reproduce(scale="quick", arch=("resnet14",), epochs=1, limit=320, threads=1)


def names_of(arch, scale, *parts):
    """The runs that the parts need."""
    runs = runs_of(arch, scale)
    shown = [one for one in points_of(arch, scale, runs) if set(parts) & set(one.parts)]
    wanted = {one.run for one in shown} | {one.k_of for one in shown if one.k_of}
    return list(closure(runs, wanted))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_every_run_takes_what_earlier_ones_leave(arch, scale, tmp_path):
    runs = runs_of(arch, scale)
    config = Reproduce(out=tmp_path)
    for number, (name, run) in enumerate(runs.items()):
        assert set(run.needs) <= set(list(runs)[:number])
        assert "teacher" not in run.takes or run.stage == "joint"
        usage = 3 if run.static_of else None
        options = stage_of(name, run, config, scale, usage).config
        for option, taken in run.takes.items():
            paths = [taken] if isinstance(taken, str) else taken
            expected = [tmp_path / path / "model.safetensors" for path in paths]
            found = getattr(options, option)
            assert (list(found) if isinstance(found, tuple) else [found]) == expected
        if run.static_of:
            assert options.static == 3
        if run.blocks:
            assert 0.6 * options.epochs * options.blocks_per_epoch >= 0.99 * run.blocks
    assert set(names_of(arch, scale, *PARTS)) == set(runs)  # none is for nothing


def test_a_part_needs_its_runs_only():
    table3 = set(names_of("resnet32", QUICK, "table3"))
    assert table3 == {"resnet32"} | {
        f"resnet32-{stage}-{one}" for stage in ("curriculum", "finetune") for one in (1, 2, 5)
    }
    table1 = set(names_of("resnet32", QUICK, "table1"))
    assert len(table1) == 3 + 4 + 5
    assert {"resnet32-finetune-2", "resnet32-random-k-4", "resnet32-greedy"} < table1
    table2 = set(names_of("resnet32", QUICK, "table2"))
    assert {"resnet32-refit", "resnet32-expert", "resnet32-sequential-joint"} < table2
    assert not {one for one in table2 if "pfec" in one or "greedy" in one}
    assert names_of("resnet32", QUICK, "fig3") == names_of("resnet32", QUICK, "times")


def test_the_paper_has_both_networks():
    runs = runs_of("resnet32", PAPER) | runs_of("resnet110", PAPER)
    for arch in PAPER.archs:
        for name, run in runs_of(arch, PAPER).items():
            assert runs[name] == run  # names that both have are the same runs
    assert len([name for name in runs if "random-k-" in name and name[-1].isdigit()]) == 10


@pytest.mark.parametrize("arch", [*ARCHS, "resnet56"])
def test_budgets_are_within_the_menu(arch):
    blocks = (int(arch[6:]) - 2) // 2
    assert all(blocks // 4 <= one <= blocks for one in budgets(arch))
    assert len(budgets(arch)) == 3


def test_commands_give_the_options(tmp_path):
    """Of every run: read again, they are what ran."""
    for scale in SCALES.values():
        for name, run in runs_of("resnet32", scale).items():
            usage = 3 if run.static_of else None
            stage = stage_of(name, run, Reproduce(out=tmp_path, limit=9), scale, usage)
            _, _, _, found, _, preset, *words = stage.command(scale.preset).split()
            assert (found, preset) == (run.stage, scale.preset)
            default = PRESETS[preset][found]
            assert tyro.cli(STAGES[found], args=words, default=default) == stage.config


def test_systems_have_names_of_their_own(tmp_path):
    runs = runs_of("resnet32", DIGITS)
    config = Reproduce(out=tmp_path)
    stages = {
        name: stage_of(name, run, config, DIGITS, 7 if run.static_of else None)
        for name, run in runs.items()
    }
    systems = [
        system_of(one, runs, stages, lambda _: 7) for one in points_of("resnet32", DIGITS, runs)
    ]
    assert len({one.name for one in systems}) == len(systems)
    by_name = {one.name: one for one in systems}
    assert by_name["RandomK 7, seed 2"].seed == 2
    assert by_name["DistributeK 7, not finetuned"].k == 7
    full, both = (DIGITS.options[one]["epochs"] for one in ("pretrain", "heuristic"))
    assert by_name["FirstK 7"].epochs == f"{full} + {both}"
    assert by_name["cascade"].epochs == ""


def row(accuracy, usage=15.0, flops=1e8, milliseconds=1.0):
    found = Evaluation(
        1000, accuracy, 0.0, usage, 1.0, 15, flops, 1e6, 1, (), (), (), effective_policies=1.0
    )
    samples = {64: [[64e-3 * milliseconds]], 1: [[64e-3 * milliseconds]]}
    return Row(System("name", "group", ""), found, True, False, "walk", samples)


def cells(text, start):
    (line,) = (one for one in text.splitlines() if one.startswith(f"| {start} "))
    return [one.strip() for one in line.split("|")[1:-1]]


def test_tables():
    rows = {"full": row(0.9), "curriculum 2": row(0.8, 9), "finetune 2": row(0.85, 7, 5e7, 0.5)}
    rows |= {"sequential": row(0.7), "joint": row(0.8), "blockdrop 7": row(0.86)}
    for when in ("before", "after"):
        for rule in ("first_k", "distribute_k", "greedy", "random_k_per_image"):
            rows[f"{when} {rule}"] = row(0.5, 7)
        rows |= {f"{when} random_k-{seed}": row(0.5 + 0.1 * seed, 7) for seed in range(3)}
    one = tables.table1("resnet32", rows, "2")
    assert cells(one, "RandomK") == [
        *("RandomK", "60.00 ± 10.00 (3 seeds)", "7.00 ± 1.00", "20.5, 10"),
        *("60.00 ± 10.00 (3 seeds)", "7.00 ± 1.00", "88.9, 7"),
    ]
    assert cells(one, "learned policy")[1:4] == ["80.00 ± 1.26", "9.00 ± 1.00", "88.6, 9.4"]
    assert cells(one, "learned policy")[4:] == ["85.00 ± 1.13", "7.00 ± 1.00", "91.3, 6.9"]
    two = tables.table2("resnet32", rows, "2")
    finetuned = cells(two, "one-shot, finetuned, γ = 2")
    assert finetuned[3:] == ["50.00 ± 1.00", "0.5000", "2.00x", "0.5000", "2.00x", "6.56"]
    assert cells(two, "sequential, joint")[-1] == "9.92"
    three = tables.table3("resnet32", rows, [2.0])
    assert cells(three, "finetuned, γ = 2")[4] == "50.0 %"
    assert cells(tables.table3("resnet14", rows, [2.0]), "all blocks")[-1] == ""
    pixels = replace(row(0.8), strategy="reference", samples={})
    times = tables.table_of_times([pixels, row(0.9)])
    assert times.splitlines()[-1].count("not executed") == 2


def test_what_is_refused(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("train.stages.Stage.run", lambda stage: started.append(stage) or 1 / 0)
    config = replace(TINY, out=tmp_path, only=("table3",))
    with pytest.raises(ZeroDivisionError):
        reproduce(config)
    for options, message in (
        ({"seed": 1}, "seed 0, not 1"),
        ({"scale": "paper"}, "preset quick, not paper"),
        ({"arch": ("resnet8",)}, r"arch \['resnet14'\], not \['resnet8'\]"),
        ({"limit": 300}, r"images \[320, 355\], not \[300, 355\]"),
        ({"epochs": 2}, "epochs 1, not 2"),
    ):
        with pytest.raises(ValueError, match=f"out: .* holds another reproduction: {message}"):
            reproduce(replace(config, **options))
    (tmp_path / "resnet14").mkdir()
    text = json.dumps({"epochs": 5, "lr": 0.1})
    state = {"epoch": 5, "config": text, "history": [], "step": 0, "model": {}}
    torch.save(state, tmp_path / "resnet14" / "state.pt")
    with pytest.raises(
        ValueError, match=r"resnet14 holds a run with other options: .*epochs 5 -> 1"
    ):
        reproduce(config)
    (tmp_path / "reproduction.json").write_text("[]")
    with pytest.raises(ValueError, match=r"reproduction\.json is no file of a reproduction"):
        reproduce(config)
    with pytest.raises(ValueError, match=r"arch: expected resnet<6n\+2>, got 'resnet33'"):
        reproduce(replace(config, out=tmp_path / "new", arch=("resnet33",)))
    assert len(started) == 1
    assert not (tmp_path / "new").exists()


# Dies where it prints a line that starts with the last of these, after one with each of the others.
DYING = """
import builtins, os, signal, sys
until = sys.argv.pop(1).split(";")
say = builtins.print
def say_and_die(*words, **options):
    say(*words, **options)
    if until[0] and str(words[0]).startswith(until[0]):
        del until[0]
        if not until:
            os.kill(os.getpid(), signal.SIGKILL)
builtins.print = say_and_die
from train.__main__ import main
main()
"""


def run(out, *parts, until=""):
    """Run the command on a few digits: exit status, and what it printed."""
    options = {"arch": "resnet14", "epochs": 1, "limit": 320, "threads": 1, "rounds": 1}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-c", DYING, until, "reproduce", "--preset", "quick", *words]
    done = subprocess.run(
        [*command, "--out", str(out), "--only", *parts], capture_output=True, text=True
    )
    return done.returncode, done.stdout


def findings(out):
    """All that the tables say, but for times."""
    parts = json.loads((out / "reproduce.json").read_text())["parts"]
    return {
        (part, key): one["evaluation"]
        for part, values in parts.items()
        for own in values["systems"].values()
        for key, one in own.items()
    }


@pytest.mark.slow
def test_all_parts_killed_twice(tmp_path):
    """First between an epoch and its checkpoint, then between two evaluations."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    status, printed = run(undisturbed, *PARTS)
    assert status == 0
    for until in ("resnet14-finetune-0.5: finetune, 1 epochs;epoch 1", "3/"):
        assert run(killed, *PARTS, until=until)[0] == -signal.SIGKILL
    assert not (killed / "reproduce.json").exists()
    status, text = run(killed, *PARTS)
    assert status == 0
    assert findings(killed) == findings(undisturbed)
    runs = runs_of("resnet14", DIGITS)
    assert f"0 of {len(runs)} runs are complete, left: resnet14 resnet8 " in printed
    assert f"{len(runs)} of {len(runs)} runs are complete" in text
    assert "left:" not in text  # nothing was trained again
    page = (killed / "reproduce.md").read_text()
    for title in tables.TITLES.values():
        assert f"## {title}" in page
    assert "not executed" in page
    assert page.count("`python -m train ") == 1 + len(runs)
    assert "- resnet14-random-k-2, seed 2: `python -m train joint --preset quick " in page
    assert (killed / "fig3.png").exists()
    assert (killed / "times.png").exists()
    # A part alone leaves the others as they were.
    assert run(killed, "table3")[0] == 0
    assert findings(killed) == findings(undisturbed)
