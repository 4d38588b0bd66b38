"""docs/other-methods.md: its snippets run, and every run in it is the reference's."""

import pytest
import torch
import torch.nn.functional as F

import blockdrop_fast as bdf
from blockdrop_fast.measure.tolerance import make_reference
from tests.snippets import check_run, run_snippets


@pytest.fixture(scope="module")
def page():
    """The names that the page's snippets leave behind, and each engine run in them."""
    return run_snippets("docs/other-methods.md")


@pytest.mark.slow
def test_every_run_is_the_reference_s(page):
    shapes = [tuple(decisions.shape) for _, _, *given, _ in page["runs"] for decisions in given]
    assert len(page["runs"]) == 7
    assert len(shapes) == 6  # one keeps all blocks
    for run in page["runs"]:
        check_run(*run)


def test_survival_falls_to_one_half(page):
    assert page["keep"][0] == pytest.approx(1 - 0.5 / 15)
    assert page["keep"][-1] == 0.5
    assert (page["one_draw"] == page["one_draw"][0]).all()
    assert len(page["a_draw_each"].unique(dim=0)) > 32


@torch.no_grad()
def test_scaled_batch_norm_is_the_test_rule(page):
    """H_l = relu(p_l F_l(x) + shortcut(x)), by hand."""
    backbone = page["backbone"]
    x = backbone.stem(page["images"])
    for probability, (block, shortcut) in zip(page["keep"], backbone.blocks(), strict=True):
        x = F.relu(shortcut(x) + probability * block(x))
    difference = (page["expected"] - backbone.classifier(x)).abs().max()
    assert difference < 1e-4 * page["expected"].abs().max()


@torch.no_grad()
def test_relu_after_a_dropped_block_changes_nothing_without_projections(page):
    """Stochastic depth and ConvNet-AIG: relu(shortcut(x) + z F(x))."""

    def multiplied(backbone, images, decisions):
        x = backbone.stem(images)
        for (block, shortcut), z in zip(backbone.blocks(), decisions.float().T, strict=True):
            x = F.relu(shortcut(x) + z[:, None, None, None] * block(x))
        return backbone.classifier(x)

    images, decisions = page["images"], page["a_draw_each"]
    for backbone in (page["backbone"], page["pooling"]):
        ours, theirs = backbone(images, decisions), multiplied(backbone, images, decisions)
        assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    projections = bdf.ResNet(
        bdf.ResNetConfig("basic", (2, 2), (8, 16), "cifar", "projection", 10)
    ).eval()
    dropped = torch.tensor([[1, 1, 0, 1]]).expand(len(images), -1)
    ours, theirs = (run(projections, images, dropped) for run in (bdf.ResNet.forward, multiplied))
    assert (ours - theirs).abs().max() > 0.01 * ours.abs().max()


@torch.no_grad()
def test_features_are_those_of_the_exits(page):
    pooling, choice = page["pooling"], page["choice"]
    x, at_exit = pooling.stem(page["images"]), {}
    for number, (block, shortcut) in enumerate(pooling.blocks(), start=1):
        x = F.relu(shortcut(x) + block(x))
        at_exit[number] = x.mean((2, 3))
    assert choice.unique().tolist() == [0, 1, 2]
    for index, (number, head) in enumerate(zip(page["exits"].tolist(), page["heads"], strict=True)):
        rows = choice == index
        features, expected = page["features"][rows], at_exit[number][rows]
        width = expected.shape[1]
        assert (features[:, width:] == 0).all()
        assert (features[:, :width] - expected).abs().max() < 1e-4 * expected.abs().max()
        scale = float(head(expected).abs().max())
        torch.testing.assert_close(page["logits"][rows], head(expected), rtol=0, atol=1e-4 * scale)


def test_decisions_of_exits_are_suffixes_of_zeros(page):
    decisions = page["exit_after"](torch.tensor([0, 2, 4]), 4)
    assert decisions.int().tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


def test_gates_are_recorded_and_replayed(page):
    decisions = page["decisions"]
    assert len(decisions.unique(dim=0)) > 4
    assert 0.2 < decisions.float().mean() < 0.8
    reference = make_reference(page["backbone"], page["images"], decisions, torch.float32)
    reference.check("recorded", page["recorded"])
    reference.check("replayed", page["replayed"])
