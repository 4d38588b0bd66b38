"""Data sets: reading them, and batches of normalised images."""
