"""The systems that BlockDrop compares with, trained on the same backbones: one module a stage."""
