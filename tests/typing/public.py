"""What a user's program may write. Nothing runs it, ``make types`` checks it."""

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import assert_type

import blockdrop_fast as bdf
from blockdrop_fast.executors.cascade import CascadeEngine

images = torch.rand(4, 3, 32, 32)

backbone = assert_type(bdf.resnet110(num_classes=10), bdf.ResNet)
policy = assert_type(bdf.policy_resnet8(num_blocks=54), bdf.PolicyNetwork)
model = bdf.BlockDrop(backbone, policy)
engine = assert_type(bdf.compile(model, dtype=torch.float32, strategy="gather"), bdf.Engine)
output = engine(images, budget=None)
assert_type(output, bdf.Output | bdf.WeightedOutput)
assert_type(output.logits, Tensor)
assert_type(engine.run(images, output.decisions), Tensor)
assert_type(engine.run_sets(images, output.decisions[None]), Tensor)
assert_type(engine.decide(images), Tensor)
assert_type(engine.probabilities(images), Tensor)
assert_type(engine.strategy, Literal["walk", "gather", "dense"])
assert_type(engine.strategy_reason, str)
assert_type(engine.refresh(), None)
assert_type(engine.config, bdf.ResNetConfig)
if isinstance(output, bdf.WeightedOutput):
    engine.run(images, output.decisions, output.weights)

cascade = bdf.Cascade([bdf.resnet_cifar(20), backbone])
cascade.set_thresholds([0.9])
assert_type(bdf.compile(cascade), CascadeEngine)
logits, networks = bdf.compile(cascade)(images)
assert_type(logits, Tensor)

loaded = assert_type(bdf.load("model.safetensors"), bdf.BlockDrop | bdf.Cascade)
assert_type(bdf.load_backbone("resnet56.th"), bdf.ResNet)
assert_type(bdf.pretrained(), tuple[str, ...])
bdf.save(loaded, "copy.safetensors")
assert_type(bdf.compile(loaded), bdf.Engine | CascadeEngine)

config = backbone.config
for gated in (bdf.SequentialPolicy(config), bdf.HaltingPolicy(config), bdf.Exits(config, [5, 10])):
    bdf.compile(bdf.BlockDrop(backbone, gated))
bdf.BlockDrop(backbone, bdf.FixedPolicy(torch.ones(54, dtype=torch.bool)))

assert_type(bdf.flops(model, output.decisions), Tensor)
assert_type(bdf.decide(torch.rand(4, 54)), Tensor)
assert_type(bdf.heuristics.first_k(7, config.layers, 4), Tensor)
found = assert_type(bdf.evaluate(engine, [(images, torch.zeros(4).long())]), bdf.Evaluation)
assert_type(found.accuracy, float)

# A checker has to find these: --warn-unused-ignores says so if it does not.
bdf.compile(backbone, strategy="fast")  # type: ignore[call-overload]
engine.run(images)  # type: ignore[call-arg]
bdf.resnet110(classes=10)  # type: ignore[call-arg]
