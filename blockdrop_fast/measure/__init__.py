"""Measurements: accuracy, time, and what BlockDrop is timed against."""
