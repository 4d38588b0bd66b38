"""Public calls with random arguments; `make fuzz` makes more."""

import pytest
import torch

import blockdrop_fast as bdf
from tests import fuzz
from tests.random_networks import CIFAR, GATED, make_gated_model, make_images, make_network


# A few to a test, so that one that fails says which, and others run.
@pytest.mark.parametrize("first", range(0, 200, 25))
def test_allowed_outcomes(first):
    outcomes = [fuzz.run(number) for number in range(first, first + 25)]
    assert sum(one.endswith("right") for one in outcomes) > 3


def test_wrong_logits_are_found():
    images = make_images(CIFAR, 5)
    output = bdf.compile(fuzz.model_of("policy"))(images)
    fuzz.check_logits("policy", torch.float32, images, output)
    with pytest.raises(fuzz.Wrong, match="off by"):
        fuzz.check_logits(
            "policy", torch.float32, images, output._replace(logits=output[0] * 1.001)
        )


@pytest.mark.parametrize("kind", GATED)
def test_gates_refuse_images_of_other_sizes(kind):
    model, _ = make_gated_model(kind)
    with pytest.raises(ValueError, match="multiples of 4, got 16x34"):
        model(torch.zeros(3, 3, 16, 34))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.nested.nested_tensor([torch.zeros(3, 8, 8)]), "nested"),
        (lambda: torch.quantize_per_tensor(torch.zeros(1, 3, 8, 8), 0.1, 0, torch.qint8), "qint8"),
    ],
)
def test_tensors_of_other_kinds_are_named(make, kind):
    for call in (bdf.compile(make_network(CIFAR)), make_network(CIFAR)):
        with pytest.raises(TypeError, match=f"images: expected a dense tensor, got .*{kind}"):
            call(make())


def test_labels_that_do_not_fit_are_named():
    engine, images = bdf.compile(make_network(CIFAR)), make_images(CIFAR, 5)
    with pytest.raises(TypeError, match=r"labels: expected a torch.Tensor, got NoneType"):
        bdf.evaluate(engine, [(images, None)])
    with pytest.raises(TypeError, match=r"labels: expected a tensor with values"):
        bdf.evaluate(engine, [(images, torch.zeros(5, dtype=torch.int64, device="meta"))])
    with pytest.raises(ValueError, match=r"labels: expected one of each image, got \(1,\)"):
        bdf.evaluate(engine, [(images, torch.zeros(1, dtype=torch.int64))])
