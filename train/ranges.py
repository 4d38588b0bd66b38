"""Ranges of options that do not depend on a network or a data set, whichever stage has them."""

from __future__ import annotations

from dataclasses import fields

from train.config import Common

AT_LEAST = {
    **dict.fromkeys(("epochs", "batch_size", "limit", "threads", "rounds", "batches"), 1),
    **dict.fromkeys(("checkpoint_every", "evaluate_every", "chain_every"), 1),
    **dict.fromkeys(("chain_images", "line_images"), 1),
    **dict.fromkeys(("seed", "workers", "held_out", "routing_images", "static_images"), 0),
    **dict.fromkeys(("statistics_images", "policy_frozen", "free_epochs"), 0),
    **dict.fromkeys(("lr", "policy_lr", "head_lr", "weight_decay", "usage_rate"), 0),
    **dict.fromkeys(("classify", "value", "tau", "sparsity"), 0),
}
ABOVE_0 = ("timeout", "temperature", "blocks_per_epoch")
SHARES = ("momentum", "drop_rate", "alpha", "spread", "away")


def check_ranges(config: Common) -> None:
    """Raise ValueError, naming it, where an option is out of its range; NaN is out of any."""
    for name in (one.name for one in fields(config)):
        value = getattr(config, name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is None:
                continue
            if name in AT_LEAST and not one >= AT_LEAST[name]:
                raise ValueError(f"{name}: expected at least {AT_LEAST[name]}, got {value}")
            if name in ABOVE_0 and not one > 0:
                raise ValueError(f"{name}: expected more than 0, got {value}")
            if name in SHARES and not 0 <= one <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {value}")
