"""BlockDrop whose dropped residual blocks leave the clock. See README.md, docs/architecture.md."""

from blockdrop_fast import heuristics
from blockdrop_fast.engine import Engine, compile
from blockdrop_fast.measure.evaluation import Evaluation, evaluate
from blockdrop_fast.networks.architectures import (
    resnet18,
    resnet32,
    resnet34,
    resnet50,
    resnet101,
    resnet110,
    resnet152,
    resnet_cifar,
    resnet_imagenet,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from blockdrop_fast.networks.blockdrop import BlockDrop, Output
from blockdrop_fast.networks.cascade import Cascade
from blockdrop_fast.networks.checkpoints import (
    CheckpointError,
    load,
    load_backbone,
    pretrained,
    save,
)
from blockdrop_fast.networks.exits import Exits
from blockdrop_fast.networks.fixed import FixedPolicy
from blockdrop_fast.networks.flops import flops
from blockdrop_fast.networks.halting import HaltingPolicy, WeightedOutput
from blockdrop_fast.networks.look import LookPolicy
from blockdrop_fast.networks.low_cost import LowCostMasks
from blockdrop_fast.networks.policy import PolicyNetwork, decide, policy_resnet8, policy_resnet10
from blockdrop_fast.networks.resnet import ResNet, ResNetConfig
from blockdrop_fast.networks.sequential import SequentialPolicy
from blockdrop_fast.networks.spatial_halting import SpatialHaltingPolicy

__version__ = "0.2.0"

__all__ = [
    "BlockDrop",
    "Cascade",
    "CheckpointError",
    "Engine",
    "Evaluation",
    "Exits",
    "FixedPolicy",
    "HaltingPolicy",
    "LookPolicy",
    "LowCostMasks",
    "Output",
    "PolicyNetwork",
    "ResNet",
    "ResNetConfig",
    "SequentialPolicy",
    "SpatialHaltingPolicy",
    "WeightedOutput",
    "compile",
    "decide",
    "evaluate",
    "flops",
    "heuristics",
    "load",
    "load_backbone",
    "policy_resnet8",
    "policy_resnet10",
    "pretrained",
    "resnet18",
    "resnet32",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet110",
    "resnet152",
    "resnet_cifar",
    "resnet_imagenet",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "save",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
