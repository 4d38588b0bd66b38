"""Public calls with random arguments; `make fuzz` makes more."""

import pytest
import torch

import blockdrop_fast as bdf
from blockdrop_fast.networks.menu import Menu
from tests.fuzz.arguments import model_of
from tests.fuzz.cases import run
from tests.fuzz.right import Wrong, check_logits
from tests.random_networks import CIFAR, GATED, make_gated_model, make_images, make_network


# A few to a test, so that one that fails says which, and others run.
@pytest.mark.parametrize("first", range(0, 200, 25))
def test_allowed_outcomes(first):
    outcomes = [run(number) for number in range(first, first + 25)]
    assert sum(one.endswith("right") for one in outcomes) > 3


def test_wrong_logits_are_found():
    images = make_images(CIFAR, 5)
    output = bdf.compile(model_of("policy"))(images)
    check_logits("policy", torch.float32, images, output)
    with pytest.raises(Wrong, match="off by"):
        check_logits("policy", torch.float32, images, output._replace(logits=output[0] * 1.001))


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


def _forward_from(features):
    return make_network(CIFAR).forward_from(features, 1)


def _look(features):
    return model_of("look").policy(features)


def _fixed(images):
    return model_of("fixed")(images)


@pytest.mark.parametrize(("call", "argument", "error", "message"), [
    (bdf.decide, torch.ones(2, 3).to_sparse(), TypeError, "probabilities: expected a dense tensor"),
    (bdf.decide, torch.ones(2, 3).cfloat(), TypeError, "probabilities: expected a floating-point"),
    (_fixed, None, TypeError, r"images: expected a torch.Tensor, got NoneType"),
    (_forward_from, None, TypeError, r"features: expected a torch.Tensor, got NoneType"),
    (_forward_from, torch.zeros(2, 8, 4, 4), ValueError, r"features: expected shape \(B, 16, H, W"),
    (_forward_from, torch.zeros(2, 16, 4, 6), ValueError, r"features: .* multiples of 4, got 4x6"),
    (_look, torch.zeros(2, 16, 4, 0), ValueError, r"features: expected shape \(B, 16, H, W\)"),
    (Menu, int, TypeError, r"sets: expected a torch.Tensor, got type"),
    (Menu, torch.zeros(3, 0).bool(), ValueError, r"sets: expected shape \(M, K\) bool, got \(3, 0"),
    (bdf.ResNet, {}, TypeError, "config: expected a ResNetConfig, got dict"),
    (bdf.SequentialPolicy, None, TypeError, "backbone: expected a ResNetConfig, got NoneType"),
    (bdf.PolicyNetwork, None, TypeError, "network: expected a ResNet, got NoneType"),
    (make_network(CIFAR), torch.zeros(1, 3, 2**16, 2**16, device="meta"), ValueError, "at most"),
])  # fmt: skip
def test_what_else_is_named(call, argument, error, message):
    with pytest.raises(error, match=message):
        call(argument)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float64])
def test_autocast_takes_what_it_casts(dtype):
    """PyTorch's autocast leaves other dtypes as they are, and then a convolution fails."""
    network = make_network(CIFAR)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(torch.zeros(1, 3, 8, 8, dtype=torch.float16)).isfinite().all()
        with pytest.raises(TypeError, match=r"images: expected dtype torch\.float32"):
            network(torch.zeros(1, 3, 8, 8, dtype=dtype))


def test_parts_that_do_not_fit_are_named():
    with pytest.raises(TypeError, match="policy: expected one of this package, got NoneType"):
        bdf.BlockDrop(make_network(CIFAR), None)
    with pytest.raises(TypeError, match="backbone: expected a ResNet, got NoneType"):
        bdf.BlockDrop(None, bdf.policy_resnet8(5))
    with pytest.raises(TypeError, match="engine: expected one of compile, got NoneType"):
        bdf.evaluate(None, [])
    with pytest.raises(ValueError, match="device: expected one of torch's, got 'x'"):
        bdf.heuristics.first_k(1, (2,), 3, device="x")
    with pytest.raises(ValueError, match="after: expected from 0 to 5, got 6"):
        make_network(CIFAR).features(torch.zeros(1, 3, 8, 8), 6)


@pytest.mark.parametrize("name", ["halting", "exits", "cascade"])
def test_decisions_given_again_are_checked(name):
    model, images = model_of(name), make_images(CIFAR, 3)
    output = model(images)
    replay = model.replay if name == "cascade" else model.policy.replay
    given = (images,) if name == "cascade" else (model.backbone, images)
    assert torch.equal(replay(*given, output), replay(*given, output))
    with pytest.raises(ValueError, match="decisions: expected shape"):
        replay(*given, output._replace(decisions=output.decisions[1:]))
