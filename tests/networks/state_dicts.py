"""State dicts with the keys that other projects give them."""

from collections import OrderedDict

import torch


def torchvision_keys(network):
    """The state dict as torchvision and the public CIFAR implementations name it."""
    renamed = OrderedDict()
    for key, value in network.state_dict().items():
        part, *rest = key.split(".")
        if part == "segments":
            key = f"layer{int(rest[0]) + 1}." + ".".join(rest[1:])
        elif part == "shortcuts":
            number = {"conv": "0", "bn": "1"}[rest[1]]
            key = f"layer{int(rest[0]) + 1}.0.downsample.{number}.{rest[2]}"
        renamed[key] = value
    return renamed


def authors_keys(network):
    """The state dict as the BlockDrop authors' FlatResNet names it."""
    renamed = OrderedDict()
    for key, value in network.state_dict().items():
        part, *rest = key.split(".")
        if part == "segments":
            key = "blocks." + ".".join(rest)
        elif part == "shortcuts":
            key = f"ds.{rest[0]}." + {"conv": "0", "bn": "1"}[rest[1]] + f".{rest[2]}"
        renamed[key] = value
    return renamed


def authors_policy_keys(policy):
    """The state dict as the authors' policy network names it, unused heads included."""
    renamed = OrderedDict()
    for key, value in authors_keys(policy.network).items():
        renamed[key.replace("fc.", "logit.") if key.startswith("fc.") else f"features.{key}"] = (
            value
        )
    features = policy.network.fc.in_features
    renamed["vnet.weight"], renamed["vnet.bias"] = torch.randn(1, features), torch.randn(1)
    renamed["features.fc.weight"] = torch.randn(10, features)
    renamed["features.fc.bias"] = torch.randn(10)
    return renamed
