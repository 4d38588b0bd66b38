"""Ways to execute a folded network. Each takes images and a plan, and returns logits."""
