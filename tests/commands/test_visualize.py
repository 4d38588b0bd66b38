"""``blockdrop visualize``: the figure's contents, its files, and clear refusals."""

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

import blockdrop_fast as bdf
from blockdrop_fast.commands import cli
from blockdrop_fast.commands.outcomes import Results, choose_examples
from blockdrop_fast.commands.visualize import draw
from blockdrop_fast.data.image_sets import ImageFolder, ImageSet
from tests.random_networks import make_gated_model, make_look_model


def make_results(usages: list[int], correct: list[bool], num_blocks: int = 6) -> Results:
    decisions = torch.arange(num_blocks) < torch.tensor(usages)[:, None]
    return Results(decisions, torch.arange(len(usages)) % 3, torch.tensor(correct))


def make_split(count: int, size: int = 8) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 3, ("cat", "dog", "a" * 40), "pets")


def visualize(checkpoint, *options) -> int:
    return cli.main(["visualize", str(checkpoint), *map(str, options)])


def test_writes_a_picture(checkpoint, tmp_path, capsys):
    out = tmp_path / "figure.png"
    assert visualize(checkpoint, "--out", out, "--limit", 60) == 0
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
    printed = capsys.readouterr().out
    assert "digits: " in printed
    assert "of 3 blocks" in printed
    assert str(out) in printed
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("make", [make_look_model, lambda: make_gated_model("exits")])
def test_policies_in_the_backbone(make, tmp_path, capsys):
    bdf.save(make()[0], tmp_path / "model.safetensors")
    out = tmp_path / "figure.png"
    assert visualize(tmp_path / "model.safetensors", "--out", out, "--limit", 60) == 0
    assert "of 5 blocks" in capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "start"), [("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_other_formats(suffix, start, tmp_path, checkpoint):
    out = tmp_path / f"figure.{suffix}"
    assert visualize(checkpoint, "--out", out, "--limit", 20) == 0
    assert out.read_bytes().startswith(start)


@pytest.mark.slow
def test_needs_no_display(checkpoint, tmp_path):
    """In a process of its own, whose backend would need a display."""
    environment = os.environ | {"MPLBACKEND": "TkAgg"}
    environment.pop("DISPLAY", None)
    arguments = ["visualize", str(checkpoint), "--out", "figure.png", "--limit", "10"]
    subprocess.run(
        [sys.executable, "-m", "blockdrop_fast.commands.cli", *arguments],
        cwd=tmp_path, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_figure_shows_the_results():
    usages = [1, 1, 2, 3, 3, 3, 5, 6]
    correct = [True, False, True, True, False, True, True, True]
    figure = draw(make_results(usages, correct), make_split(8), (2, 4))
    rates, usage, accuracy, *examples = figure.axes
    # Decisions keep the first blocks, so block k is kept where the usage is at least k.
    heights = [bar.get_height() for bar in rates.patches]
    assert heights == pytest.approx([sum(u >= k for u in usages) / 8 for k in range(1, 7)])
    colors = {bar.get_facecolor() for bar in rates.patches[:2]}
    assert len(colors) == 1
    assert colors.isdisjoint({bar.get_facecolor() for bar in rates.patches[2:]})
    labels = [text.get_text() for text in rates.get_legend().get_texts()]
    assert labels == ["segment 1: 1.8 of 2 blocks", "segment 2: 1.2 of 4 blocks"]

    shares = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in usage.patches}
    assert shares == pytest.approx({1: 2 / 8, 2: 1 / 8, 3: 3 / 8, 5: 1 / 8, 6: 1 / 8})
    points = dict(accuracy.collections[1].get_offsets().tolist())
    assert points == pytest.approx({1: 0.5, 2: 1, 3: 2 / 3, 5: 1, 6: 1})

    shown = [axes for axes in examples if axes.images]
    assert [axes.get_title() for axes in shown] == [
        *("1 block", "2 blocks", "3 blocks"),
        *("6 blocks", "5 blocks", "3 blocks"),
    ]
    # Images 0 (a cat), 2 and 7 (a dog) with their pixels.
    pixels = make_split(8).images.permute(0, 2, 3, 1) / 255
    for axes, index, name in zip(shown, (0, 2), ("cat", "a" * 15 + "…"), strict=False):
        assert torch.equal(torch.as_tensor(axes.images[0].get_array()), pixels[index])
        assert axes.get_xlabel() == name
    assert torch.equal(torch.as_tensor(shown[3].images[0].get_array()), pixels[7])


def test_figure_without_right_images(tmp_path):
    figure = draw(make_results([0, 2], [False, False]), make_split(2), (6,))
    figure.savefig(tmp_path / "figure.png")
    assert len(figure.axes) == 3
    assert "none to show" in figure.subfigs[2].get_suptitle()


def test_examples():
    generator = torch.Generator().manual_seed(1)
    usages = torch.randint(0, 7, (200,), generator=generator)
    correct = torch.rand(200, generator=generator) < 0.7
    results = make_results(usages.tolist(), correct.tolist())
    fewest, most = choose_examples(results, 8)
    assert correct[fewest + most].all()
    assert len({*fewest, *most}) == 16
    in_order = usages[correct].sort().values.tolist()
    assert usages[fewest].tolist() == in_order[:8]
    assert usages[most].tolist() == in_order[::-1][:8]
    assert choose_examples(results, 8) == (fewest, most)
    # Few right ones are shown once each.
    few = make_results([1, 2, 3], [True, True, True])
    assert choose_examples(few, 8) == ([0], [2])


def test_large_images_from_files(tmp_path):
    paths = []
    for index in range(4):
        paths.append(str(tmp_path / f"{index}.png"))
        Image.new("RGB", (100, 80), (60 * index, 0, 0)).save(paths[-1])
    split = ImageFolder(tuple(paths), torch.arange(4), tuple("abcd"), "photographs")
    figure = draw(Results(torch.eye(4) > 2, torch.arange(4), torch.tensor([True] * 4)), split, (4,))
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 4
    for axes in shown:
        assert axes.images[0].get_array().shape == (224, 224, 3)
        red = float(axes.images[0].get_array()[0, 0, 0])
        assert red == pytest.approx("abcd".index(axes.get_xlabel()) * 60 / 255)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("figure.docx", "out: expected a name that ends in .png, .pdf or .svg, got"),
        ("figure", "out: expected a name that ends in .png, .pdf or .svg, got"),
        ("absent/figure.png", "absent' does not exist"),
    ],
)
def test_refuses_outputs(out, message, checkpoint, tmp_path, capsys):
    assert visualize(checkpoint, "--out", tmp_path / out) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_refuses_backbones_and_other_classes(checkpoint, tmp_path, capsys):
    path, out = tmp_path / "model.safetensors", tmp_path / "figure.png"
    bdf.save(bdf.resnet_cifar(8), path)
    assert visualize(path, "--out", out) == 1
    assert "holds no policy that keeps blocks" in capsys.readouterr().err
    bdf.save(bdf.BlockDrop(bdf.resnet_cifar(8, 7), bdf.policy_resnet8(3)), path)
    assert visualize(path, "--out", out) == 1
    assert "digits has 10 classes, but the network of" in capsys.readouterr().err
    assert not out.exists()
