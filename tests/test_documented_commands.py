"""The commands in the documentation: their programs have these options."""

import functools
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import tyro

from blockdrop_fast.commands import cli
from tests.snippets import ROOT
from train import __main__ as train_command

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *ROOT.glob("docs/**/*.md"),
]
# What the pages let stand for something else, as they say.
ABBREVIATIONS = {
    "$P": "python -m train",
    "$D": "--data DIR",
    "TRAIN": "python -m train",
    " S ": " 0 ",
}
TARGETS = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


def commands_of(page: Path) -> list[str]:
    """The commands of a page, each in a line, without comments; optional parts are there."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```(?:sh|bash)?\n(.*?)^```$", text, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    # In a sentence, what has no option is only a name.
    inline = re.findall(r"`((?:python -m|blockdrop) [^`]+)`", text)
    lines += [line.replace("\n", " ") for line in inline if " --" in line]
    commands = []
    for line in lines:
        command = re.sub(r"\s#.*|^for .*; do |; done$| \.\.\.|[\[\]]", "", line).strip()
        for short, long in ABBREVIATIONS.items():
            command = command.replace(short, long)
        commands.append(re.sub(r"^torchrun .*?-m|^torchrun -m", "python -m", command))
    return commands


def documented(start: str) -> list:
    found = [
        pytest.param(command[len(start) :], id=f"{page.name}:{command}")
        for page in PAGES
        for command in commands_of(page)
        if command.startswith(start)
    ]
    assert found
    return found


@pytest.mark.parametrize("command", documented("python -m train "))
def test_training_stage(command, monkeypatch):
    ran = []
    monkeypatch.setattr(train_command, "function_of", lambda stage: ran.append)
    monkeypatch.setattr(sys, "argv", ["train", *shlex.split(command)])
    train_command.main()
    assert len(ran) == 1


@pytest.mark.parametrize("command", documented("blockdrop "))
def test_command_line(command, monkeypatch):
    ran = []

    def not_run(module):
        function = cli_import(module).command
        monkeypatch.setattr(cli_import(module), "command", functools.wraps(function)(record))
        return cli_import(module)

    def record(*arguments, **options):
        ran.append(options)

    cli_import = cli.import_module
    monkeypatch.setattr(cli, "import_module", not_run)
    assert cli.main(shlex.split(command)) == 0
    assert len(ran) == 1


@pytest.mark.parametrize("command", documented("python -m benchmarks."))
def test_benchmark(command):
    module, *options = shlex.split(command)
    program = importlib.import_module(f"benchmarks.{module}")
    tyro.cli(program.Arguments, args=options)


@pytest.mark.parametrize("command", documented("make "))
def test_target(command):
    targets = [word for word in command.split() if "=" not in word]
    assert set(targets) <= set(TARGETS)


@pytest.mark.parametrize("command", documented("pytest "))
def test_path_of_tests(command):
    assert (ROOT / command.split()[0]).exists()
