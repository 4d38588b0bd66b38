"""`blockdrop info`, the command line's frame, and what happens without a working extension."""

import json
import subprocess
import sys

import numpy
import pytest
import torch

import blockdrop_fast
from blockdrop_fast import _extension
from blockdrop_fast.commands import cli
from blockdrop_fast.commands.info import arch_runs_on, format_info, info
from blockdrop_fast.networks.architectures import by_name


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_info_names_what_is_here():
    found = info()
    assert found["versions"]["blockdrop_fast"] == blockdrop_fast.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["numpy"] == numpy.__version__
    assert found["parts"]["PyTorch references"]["active"]


def test_every_inactive_part_has_a_reason():
    for name, part in info()["parts"].items():
        assert part["active"] == (not part["why_not"]), name


def test_extension_built_for_this_torch():
    status = _extension.extension_status()
    if not status.loaded:
        pytest.skip(f"no compiled kernels: {status.reason}")
    assert torch.__version__.startswith(status.build_info["torch"])
    assert "portable" in status.build_info["isa_variants"]
    assert "-O3" in status.build_info["flags"]


def test_cpu_torch_is_why_there_is_no_cuda():
    if torch.version.cuda is not None or not _extension.extension_status().loaded:
        pytest.skip("needs an extension that was built for a torch without CUDA")
    part = info()["parts"]["CUDA kernels"]
    assert not part["active"]
    assert part["why_not"]
    assert part["why_not"] in format_info()


@pytest.mark.parametrize(
    ("arch", "capability", "expected"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (12, 0), True),
        ("9.0+PTX", (8, 9), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("10.0f", (10, 3), True),
        ("10.0f", (11, 0), False),
    ],
)
def test_arch_runs_on(arch, capability, expected):
    assert arch_runs_on(arch, capability) is expected


@pytest.mark.slow
def test_missing_extension_is_explained_and_survived():
    # None in sys.modules makes Python treat the module as absent.
    result = run_python(
        "import sys; sys.modules['blockdrop_fast._C'] = None\n"
        "import torch, blockdrop_fast.ops as ops\n"
        "from blockdrop_fast._extension import extension_status\n"
        "from blockdrop_fast.commands.info import info\n"
        "counts = ops.plan(torch.ones(4, 2, dtype=torch.bool))[1]\n"
        "part = info()['parts']['CPU kernels']\n"
        "print(counts.tolist(), extension_status().state, part['active'], bool(part['why_not']))\n"
    )
    assert result.stdout.strip() == "[4, 4] not built False True", result.stderr
    assert "RuntimeWarning" not in result.stderr


@pytest.mark.parametrize(("built", "reason"), [
    ({"torch": "2.8.0+cu130"}, f"2.8.0+cu130 and torch {torch.__version__}"),
    ({"torch": torch.__version__, "interface": 0}, "built from sources of another version"),
])  # fmt: skip
def test_extension_for_another_torch_or_package_is_not_imported(
    monkeypatch, tmp_path, built, reason
):
    """Where it can be imported all the same, it may compute anything."""
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"interface": _extension.INTERFACE} | built))
    monkeypatch.setattr(_extension, "BUILD_RECORD", record)
    monkeypatch.setattr(_extension.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_extension.importlib, "import_module", lambda name: pytest.fail(name))
    with pytest.warns(RuntimeWarning, match="slow reference kernels"):
        status = _extension.load_extension.__wrapped__()
    assert status.state == "failed"
    assert not status.loaded
    for part in (reason, "--no-build-isolation"):
        assert part in status.reason


def test_extension_that_does_not_load_warns(monkeypatch, tmp_path):
    record = tmp_path / "record.json"
    built = {
        "torch": torch.__version__.partition("+")[0] + "+other",
        "interface": _extension.INTERFACE,
    }
    record.write_text(json.dumps(built))
    monkeypatch.setattr(_extension, "BUILD_RECORD", record)

    def fail(name):
        raise ImportError("undefined symbol: _ZN3c105ErrorC2E")

    monkeypatch.setattr(_extension.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_extension.importlib, "import_module", fail)
    with pytest.warns(RuntimeWarning, match="slow reference kernels"):
        status = _extension.load_extension.__wrapped__()
    assert status.state == "failed"
    assert "undefined symbol" in status.reason


def test_missing_extension_without_record_says_how_to_build(monkeypatch, tmp_path):
    monkeypatch.setattr(_extension, "BUILD_RECORD", tmp_path / "absent.json")
    monkeypatch.setattr(_extension.importlib.util, "find_spec", lambda name: None)
    status = _extension.load_extension.__wrapped__()
    assert status.state == "not built"
    assert "pip install --no-build-isolation" in status.reason


def test_command_line_info(capsys):
    assert cli.main(["info"]) == 0
    assert blockdrop_fast.__version__ in capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == info()


@pytest.mark.parametrize(
    "arch", ["resnet20", pytest.param("resnext50_32x4d", marks=pytest.mark.slow)]
)
def test_an_architecture_and_what_executes_it(arch, capsys):
    assert cli.main(["info", "--arch", arch]) == 0
    text = capsys.readouterr().out
    assert arch in text
    found = info(arch)["architecture"]
    if arch == "resnet20":
        assert (found["blocks"], found["parameters"]) == (9, 269_722)
    else:
        assert (found["blocks"], found["parameters"]) == (16, 25_028_904)
        assert found["strategy"] == "gather"
    assert found["flops"] == float(blockdrop_fast.flops(by_name(arch)()))
    assert found["reason"] in text


def test_an_unknown_architecture(capsys):
    assert cli.main(["info", "--arch", "resnext20"]) == 1
    assert "arch: expected resnet18" in capsys.readouterr().err


def test_command_line_help_and_unknown_command(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    assert cli.main(["frobnicate"]) == 2
    assert "frobnicate" in capsys.readouterr().err


def test_an_interrupted_command_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("blockdrop_fast.commands.info.command", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "\nblockdrop info: interrupted\n"


@pytest.mark.parametrize(
    ("command", "missing"),
    [("info", "tyro"), ("visualize", "matplotlib.axes"), ("evaluate", "tyro")],
)
def test_command_line_names_the_extra_that_is_missing(command, missing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    for name in [name for name in sys.modules if name.startswith("blockdrop_fast.commands.")]:
        if not name.endswith(".cli"):  # others may hold what is missing now
            monkeypatch.delitem(sys.modules, name)
    assert cli.main([command, "--help"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        f"blockdrop {command}: error: {missing} is not installed; "
        "pip install 'blockdrop_fast[cli]'\n"
    )


def test_command_line_reports_bad_input_in_one_line(monkeypatch, capsys):
    def command() -> None:
        raise ValueError("images: expected 4 dimensions, got 3")

    monkeypatch.setattr("blockdrop_fast.commands.info.command", command)
    monkeypatch.delenv(cli.TRACEBACK_VARIABLE, raising=False)
    assert cli.main(["info"]) == 1
    assert (
        capsys.readouterr().err == "blockdrop info: error: images: expected 4 dimensions, got 3\n"
    )
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match="images"):
        cli.main(["info"])
