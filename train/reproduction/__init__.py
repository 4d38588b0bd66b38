"""The parts of ``python -m train reproduce``: its runs, the systems they make, tables of these."""
