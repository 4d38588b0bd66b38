"""Networks: ResNets with keep/drop per image, policy networks, and what is derived from them."""
