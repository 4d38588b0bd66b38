import pytest
import torch

from blockdrop_fast.heuristics import distribute_k, first_k, random_k

CIFAR = (5, 5, 5)
RESNET101 = (3, 4, 23, 3)


def rows(text: str, batch: int) -> torch.Tensor:
    """Decisions from a row of 1 and 0; blanks separate segments."""
    row = torch.tensor([digit == "1" for digit in text.replace(" ", "")])
    return row.expand(batch, -1)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (0, "00000 00000 00000"),
        (1, "10000 00000 00000"),
        (7, "11111 11000 00000"),
        (15, "11111 11111 11111"),
    ],
)
def test_first_k_keeps_the_first_blocks_of_the_network(keep, expected):
    assert torch.equal(first_k(keep, CIFAR, 3), rows(expected, 3))


@pytest.mark.parametrize(
    ("keep", "segments", "expected"),
    [
        (0, CIFAR, "00000 00000 00000"),
        (1, CIFAR, "10000 00000 00000"),
        (6, CIFAR, "11000 11000 11000"),
        (7, CIFAR, "11100 11000 11000"),
        (8, CIFAR, "11100 11100 11000"),
        (15, CIFAR, "11111 11111 11111"),
        (6, RESNET101, "110 1100 10000000000000000000000 100"),
        (12, RESNET101, "111 1110 11100000000000000000000 111"),
        # The third round fills segments 1 and 4, the fourth segment 2; the rest is segment 3's.
        (13, RESNET101, "111 1111 11100000000000000000000 111"),
        (16, RESNET101, "111 1111 11111100000000000000000 111"),
        (33, RESNET101, "111 1111 11111111111111111111111 111"),
        (5, (1, 1, 4), "1 1 1110"),
    ],
)
def test_distribute_k_spreads_evenly_and_passes_the_rest_on(keep, segments, expected):
    assert torch.equal(distribute_k(keep, segments, 2), rows(expected, 2))


def test_distribute_k_differs_from_equal_segments_by_at_most_one():
    for keep in range(55):
        kept = distribute_k(keep, (18, 18, 18), 1).view(3, 18).sum(1)
        assert kept.sum() == keep
        assert kept.max() - kept.min() <= 1
        assert torch.equal(kept, kept.sort(descending=True).values)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("keep", [0, 1, 16, 33])
def test_random_k_keeps_exactly_k(keep, per_image):
    decisions = random_k(keep, RESNET101, 40, seed=3, per_image=per_image)
    assert decisions.shape == (40, 33)
    assert decisions.dtype == torch.bool
    assert (decisions.sum(1) == keep).all()


def test_random_k_draws_one_set_per_seed_or_one_per_image():
    shared = random_k(8, CIFAR, 50, seed=1)
    assert torch.equal(shared, shared[:1].expand(50, -1))
    assert torch.equal(shared, random_k(8, CIFAR, 50, seed=1))
    assert (
        len(torch.cat([random_k(8, CIFAR, 1, seed=seed) for seed in range(20)]).unique(dim=0)) > 10
    )

    own = random_k(8, CIFAR, 50, seed=1, per_image=True)
    assert len(own.unique(dim=0)) > 25
    assert torch.equal(own, random_k(8, CIFAR, 50, seed=1, per_image=True))
    assert not torch.equal(own, random_k(8, CIFAR, 50, seed=2, per_image=True))


def test_random_k_is_uniform_over_blocks():
    # Binomial(4000, 0.4) has a standard deviation of 31; six of them never happen by chance.
    counts = random_k(6, CIFAR, 4000, per_image=True).sum(0)
    assert ((counts - 1600).abs() < 186).all()


@pytest.mark.parametrize("heuristic", [first_k, random_k, distribute_k])
def test_results_are_writable_bool_on_the_device(heuristic):
    decisions = heuristic(4, CIFAR, 3, device="cpu")
    assert decisions.dtype == torch.bool
    decisions[0] = True  # must not reach the other images
    assert decisions.sum(1).tolist() == [15, 4, 4]
    assert heuristic(4, CIFAR, 2, device="meta").device.type == "meta"
    assert heuristic(4, CIFAR, 0).shape == (0, 15)
    assert heuristic(700, (200, 200, 300), 1).sum() == 700


@pytest.mark.parametrize("heuristic", [first_k, random_k, distribute_k])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((16, CIFAR, 2), ValueError, "keep: expected 0 to 15 blocks, got 16"),
        ((-1, CIFAR, 2), ValueError, "keep: expected 0 or more, got -1"),
        ((2.0, CIFAR, 2), TypeError, "keep: expected an integer, got 2.0"),
        ((True, CIFAR, 2), TypeError, "keep: expected an integer"),
        ((1, 15, 2), TypeError, "segments: expected a tuple"),
        ((0, (), 2), ValueError, "segments: expected at least one"),
        ((1, (5, 0), 2), ValueError, "segments: expected at least one block"),
        ((1, (5, 1.5), 2), TypeError, "segments: expected an integer"),
        ((1, CIFAR, -2), ValueError, "batch: expected 0 or more"),
    ],
)
def test_bad_arguments_are_named(heuristic, arguments, error, message):
    with pytest.raises(error, match=message):
        heuristic(*arguments)


def test_random_k_refuses_a_negative_seed():
    with pytest.raises(ValueError, match="seed: expected 0 or more, got -1"):
        random_k(1, CIFAR, 1, seed=-1)
