"""Accuracy against cost of many systems: who is compared, evaluated, timed, and how it is shown."""
