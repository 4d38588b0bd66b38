"""One set for all images becomes one for each group, without a change of what is computed."""

import pytest
import torch

import blockdrop_fast as bdf
from tests.random_networks import make_images, make_network
from train.upcycling import upcycle

CONFIG = bdf.resnet_cifar(32).config
KEEP = torch.zeros(15).bool()
KEEP[[1, 3, 6, 10, 12]] = True


@pytest.fixture(scope="module")
def backbone():
    return make_network(CONFIG).double().eval()


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_set_computes_what_the_one_did(backbone, groups, first):
    result, sets = upcycle(backbone, KEEP, groups, first)
    images = make_images(CONFIG, 3).double()
    assert sets.sum(1).tolist() == [5] * groups
    assert len(sets.unique(dim=0)) == groups
    assert sets[:, :first].all()
    with torch.no_grad():
        expected = backbone(images, KEEP.expand(3, -1))
        for one in sets:
            torch.testing.assert_close(result(images, one.expand(3, -1)), expected)


@pytest.mark.parametrize(
    ("in_last", "groups", "apart"), [(1, 4, 1), (2, 3, 1), (2, 2, 2), (3, 2, 1)]
)
def test_as_many_blocks_are_apart_as_are_free(backbone, in_last, groups, apart):
    keep = torch.arange(15) >= 15 - in_last
    _, sets = upcycle(backbone, keep, groups)
    alone = sets.sum(0) == 1
    assert (sets & alone).sum(1).tolist() == [apart] * groups
    assert sets.all(0).sum() == in_last - apart


def test_what_does_not_fit(backbone):
    with pytest.raises(ValueError, match="groups: the set has 1 of 4 blocks"):
        upcycle(backbone, KEEP, 5)
    with pytest.raises(ValueError, match=r"look: expected at most 2, .* got 3"):
        upcycle(backbone, KEEP, 2, 3)
