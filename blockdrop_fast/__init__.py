"""BlockDrop whose dropped residual blocks leave the clock. See README.md and docs/architecture.md."""

__version__ = "0.1.0"
