"""What Megatron-Core uses of Transformer Engine, in plain PyTorch, so that its layer spec runs on a CPU.

Names of modules and parameters, constructors and forwards are those of release 2.6; there is no argument that Megatron
does not pass. Arithmetic is what the documentation says. Nothing of its kernels is shown by what runs here.
"""

from __future__ import annotations

__version__ = "2.6.0"

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
