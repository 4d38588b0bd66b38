"""The training procedure of BlockDrop: ``python -m train STAGE``. Run from the clone."""
