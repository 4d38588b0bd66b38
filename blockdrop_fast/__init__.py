"""BlockDrop whose dropped residual blocks leave the clock. See README.md, docs/architecture.md."""

from blockdrop_fast import heuristics
from blockdrop_fast.blockdrop import BlockDrop, Output
from blockdrop_fast.checkpoints import CheckpointError, load, load_backbone, pretrained, save
from blockdrop_fast.engine import Engine, compile
from blockdrop_fast.evaluation import Evaluation, evaluate
from blockdrop_fast.flops import flops
from blockdrop_fast.models import (
    ResNet,
    ResNetConfig,
    resnet32,
    resnet50,
    resnet101,
    resnet110,
    resnet152,
    resnet_cifar,
    resnet_imagenet,
)
from blockdrop_fast.policy import PolicyNetwork, decide, policy_resnet8, policy_resnet10

__version__ = "0.1.0"

__all__ = [
    "BlockDrop",
    "CheckpointError",
    "Engine",
    "Evaluation",
    "Output",
    "PolicyNetwork",
    "ResNet",
    "ResNetConfig",
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
    "resnet32",
    "resnet50",
    "resnet101",
    "resnet110",
    "resnet152",
    "resnet_cifar",
    "resnet_imagenet",
    "save",
]
