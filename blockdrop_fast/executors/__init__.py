"""Ways to execute a folded network, all alike to the engine:

``run(images, decisions (B, K)) -> logits (B, C)`` and
``run_sets(images, decisions (S, B, K)) -> logits (S, B, C)``.

Their constructors take a ``FoldedNetwork`` and say why where they do not support it.
"""
