"""README.md: its snippets run, and give what the reference gives."""

import pytest

import blockdrop_fast as bdf
from tests.snippets import ROOT, check_run, run_snippets


@pytest.mark.slow
def test_snippets():
    names = run_snippets("README.md")
    assert names["logits"].shape == (64, 10)
    assert names["decisions"].shape == (64, 15)
    assert names["networks"].shape == (64, 2)
    assert len(names["runs"]) == 5
    for run in names["runs"]:
        check_run(*run)


def test_files_that_it_names_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert links
    assert not missing


def test_checkpoint_that_it_loads_is_there():
    assert isinstance(bdf.load("blockdrop32-cifar10-jpeg"), bdf.BlockDrop)
