"""``blockdrop report``: a page that stands alone, tells what was found, and refuses clearly."""

import re
from html.parser import HTMLParser

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.commands import cli
from blockdrop_fast.commands import report as report_module
from blockdrop_fast.commands.outcomes import Results, collect
from blockdrop_fast.commands.report_page import Findings, Latency, page
from blockdrop_fast.data.batches import load_digits
from blockdrop_fast.data.image_sets import NO_NORMALIZATION, ImageSet
from blockdrop_fast.machine import machine_info
from blockdrop_fast.measure.evaluation import evaluate
from tests.random_networks import make_gated_model, make_look_model

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags in order, each closed; texts; addresses."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.texts, self.addresses, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def report(checkpoint, *options) -> int:
    return cli.main(["report", str(checkpoint), *map(str, options)])


@pytest.mark.slow
def test_stands_alone_and_tells_what_was_found(checkpoint, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert report(checkpoint, "--out", out, "--limit", 80, "--batches", 1, 16) == 0
    text = out.read_text()
    found = Page(text)
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert found.addresses
    # Other addresses: the charts' own clip paths.
    assert all(one.startswith(("data:image/", "#")) for one in found.addresses)
    assert not re.search(r"url\((?!#)|@import", text)
    assert found.tags.count("svg") == 6
    assert "width=device-width" in text
    texts = " ".join(found.texts)
    for name in load_digits().classes:
        assert name in texts
    for part in ("model", "digits", "80 images", "of 3 blocks", "% use these", "Most blocks"):
        assert part in texts
    assert "this model: " in texts
    assert "complete, PyTorch: " in texts
    assert str(out) in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]


def test_the_split_is_run_once(checkpoint, tmp_path, monkeypatch):
    """Batches are made once; what is found of them is what their own pass would find."""
    made, found, batches_of = [], [], report_module.batches_of

    def counted(*arguments, **options):
        made.append(arguments)
        return batches_of(*arguments, **options)

    monkeypatch.setattr(report_module, "batches_of", counted)
    monkeypatch.setattr(report_module, "page", lambda findings: found.append(findings) or "")
    options = ("--limit", 80, "--batch-size", 32, "--batches")
    assert report(checkpoint, "--out", tmp_path / "report.html", *options) == 0
    assert len(made) == 1
    (one,), model = found, bdf.load(checkpoint)
    alone = collect(bdf.compile(model), one.split, NO_NORMALIZATION, 80)
    assert torch.equal(one.results.decisions, alone.decisions)
    assert torch.equal(one.results.labels, alone.labels)
    assert torch.equal(one.results.correct, alone.correct)
    complete = collect(bdf.compile(model.backbone), one.split, NO_NORMALIZATION, 80)
    assert torch.equal(one.complete[1].bool(), complete.correct)
    assert one.evaluation.accuracy == float(alone.correct.double().mean())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["look", "halting", "exits"])
def test_other_policies(kind, tmp_path):
    model = make_look_model()[0] if kind == "look" else make_gated_model(kind)[0]
    bdf.save(model, tmp_path / "model.safetensors")
    out = tmp_path / "report.html"
    assert report(tmp_path / "model.safetensors", "--out", out, "--limit", 64) == 0
    Page(out.read_text())


@pytest.mark.slow
def test_a_cascade_is_about_networks(tmp_path):
    torch.manual_seed(0)
    cascade = bdf.Cascade([bdf.resnet_cifar(8), bdf.resnet_cifar(14)])
    cascade.set_thresholds([0.2])
    bdf.save(cascade, tmp_path / "cascade.safetensors")
    out = tmp_path / "report.html"
    assert report(tmp_path / "cascade.safetensors", "--out", out, "--limit", 64) == 0
    texts = " ".join(Page(out.read_text()).texts)
    for part in ("of 2 networks", "right with its last network", "Which networks a class uses"):
        assert part in texts
    assert "blocks" not in texts.replace("block-major", "")


def findings(decisions, classes=("cat", "dog", "<b>"), latencies=()):
    count = len(decisions)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % len(classes)
    split = ImageSet(images, labels, classes, "pets & more")
    correct = torch.arange(count) % 4 > 0
    model = make_look_model()[0]
    evaluation = evaluate(
        bdf.compile(model.backbone),
        [(torch.randn(count, 3, 8, 8, generator=generator), labels % 10)],
        lambda images: decisions[: len(images)],
    )
    complete = torch.rand(2, count, generator=generator)
    return Findings(
        "some <model>", split, (2, 1, 2), Results(decisions, labels, correct), evaluation,
        complete, latencies, machine_info(), "walk: because",
    )  # fmt: skip


def test_names_are_no_markup_and_the_page_is_a_function_of_the_findings():
    decisions = torch.rand(24, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    found = findings(decisions, latencies=(Latency(1, "this <model>", 2.5),))
    texts = Page(page(found)).texts
    assert "<b>" in texts
    assert "some <model>" in texts
    assert any(one.startswith("pets & more") for one in texts)
    assert any("this <model>: 2.5 ms" in one for one in texts)
    without_ids = [re.sub(r"[pmi][0-9a-f]{10}|image[0-9a-f]+", "", page(found)) for _ in range(2)]
    assert without_ids[0] == without_ids[1]


def test_a_static_network_is_called_one():
    decisions = torch.tensor([[1, 0, 1, 0, 1]]).bool().expand(24, -1)
    assert "this is a static network" in page(findings(decisions))


def test_many_classes_and_few_images():
    classes = tuple(f"class {n}" for n in range(30))
    decisions = torch.rand(30, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    texts = " ".join(Page(page(findings(decisions, classes))).texts)
    assert "18 more classes are not shown" in texts
    assert "none" in texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "report.pdf"], "out: expected a name that ends in .html, got 'report.pdf'"),
        (["--out", "missing/report.html"], "out: the folder 'missing' does not exist"),
        (["--out", "r.html", "--limit", "20", "--batches", "21"], "batches: expected 1 to 20"),
    ],
)
def test_bad_input(checkpoint, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert report(checkpoint, *options) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_other_classes_and_no_policy(tmp_path, capsys):
    out = tmp_path / "report.html"
    bdf.save(bdf.resnet_cifar(8, 7), tmp_path / "seven.safetensors")
    assert report(tmp_path / "seven.safetensors", "--out", out) == 1
    assert "data: digits has 10 classes, but the network" in capsys.readouterr().err
    bdf.save(bdf.resnet_cifar(8), tmp_path / "bare.safetensors")
    assert report(tmp_path / "bare.safetensors", "--out", out) == 1
    assert "holds no policy" in capsys.readouterr().err
    assert not out.exists()
