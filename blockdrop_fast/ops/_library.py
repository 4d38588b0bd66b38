"""The dispatcher library that all operators of the package are defined in.

An op module defines its schema on ``LIBRARY``, registers its readable reference as the kernel
of every device and its shape function for tracing. The C++ and CUDA kernels in ``csrc/``
register themselves for their device when the extension is loaded and then take precedence.
"""

import torch

LIBRARY = torch.library.Library("blockdrop_fast", "DEF")
# The dispatch key of references: it serves every device that has no kernel of its own.
REFERENCE = "CompositeExplicitAutograd"
