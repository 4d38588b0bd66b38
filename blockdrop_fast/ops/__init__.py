"""Operators: schema, readable reference and shape function of each in one module.

The walks share theirs, but for weights and precision: ``walk_network.py``.

Importing this package also tries to load the compiled kernels. Where there are none, the
references run instead, and ``blockdrop info`` says why.
"""

from blockdrop_fast._extension import load_extension
from blockdrop_fast.ops.gathered_conv import gathered_conv_, gathered_conv_reference_, pack_conv
from blockdrop_fast.ops.plan import plan, plan_reference
from blockdrop_fast.ops.walk import (
    walk,
    walk_isa,
    walk_policy,
    walk_policy_reference,
    walk_reference,
)
from blockdrop_fast.ops.walk_gates import (
    walk_exits,
    walk_exits_reference,
    walk_halting,
    walk_halting_reference,
    walk_look,
    walk_look_reference,
    walk_sequential,
    walk_sequential_reference,
    walk_weighted,
    walk_weighted_reference,
)
from blockdrop_fast.ops.walk_half import (
    walk_half,
    walk_half_policy,
    walk_half_policy_reference,
    walk_half_reference,
)
from blockdrop_fast.ops.walk_imagenet import (
    walk_imagenet,
    walk_imagenet_policy,
    walk_imagenet_policy_reference,
    walk_imagenet_reference,
)

__all__ = [
    "gathered_conv_",
    "gathered_conv_reference_",
    "pack_conv",
    "plan",
    "plan_reference",
    "walk",
    "walk_exits",
    "walk_exits_reference",
    "walk_half",
    "walk_half_policy",
    "walk_half_policy_reference",
    "walk_half_reference",
    "walk_halting",
    "walk_halting_reference",
    "walk_imagenet",
    "walk_imagenet_policy",
    "walk_imagenet_policy_reference",
    "walk_imagenet_reference",
    "walk_isa",
    "walk_look",
    "walk_look_reference",
    "walk_policy",
    "walk_policy_reference",
    "walk_reference",
    "walk_sequential",
    "walk_sequential_reference",
    "walk_weighted",
    "walk_weighted_reference",
]

load_extension()
