"""Groups of classes, and the blocks that each has to itself."""

import pytest
import torch

import blockdrop_fast as bdf
from train.groups import class_groups, confusion_of, own_blocks


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_classes_that_are_mistaken_for_each_other_stay_together(groups):
    """Three pairs, two of which are closer to each other than to the third."""
    confusion = torch.full((6, 6), 0.01)
    confusion[:4, :4] = 0.05
    for first in (0, 2, 4):
        confusion[first : first + 2, first : first + 2] = 0.3
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    found = class_groups(confusion[order][:, order], groups)
    named = torch.empty(6, dtype=torch.int64)
    named[order] = found
    together = [[0, 1, 2, 3, 4, 5]], [[0, 1, 2, 3], [4, 5]], [[0, 1], [2, 3], [4, 5]]
    expected = together[groups - 1] if groups < 4 else [[k] for k in range(6)]
    assert found[0] == 0
    assert sorted((named == g).nonzero().squeeze(1).tolist() for g in range(groups)) == expected


def test_confusion_is_the_mean_probability_of_each_class():
    logits = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    confusion = confusion_of(logits, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(confusion, torch.tensor([[0.75, 0.25], [0.0, 1.0]]).double())


def test_blocks_of_the_last_segment_are_dealt_out():
    config = bdf.resnet_cifar(32).config
    own = own_blocks(config, 2)
    assert own.nonzero().tolist() == [[0, 10], [0, 12], [0, 14], [1, 11], [1, 13]]
    assert not own_blocks(config, 1).any()


def test_bad_numbers_of_groups():
    with pytest.raises(ValueError, match="groups: expected 1 to 3, got 4"):
        class_groups(torch.eye(3), 4)
    with pytest.raises(ValueError, match="groups: expected at most 5"):
        own_blocks(bdf.resnet_cifar(32).config, 6)
