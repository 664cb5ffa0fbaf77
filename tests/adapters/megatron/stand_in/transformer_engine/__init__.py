"""What Megatron-Core uses of Transformer Engine, in plain PyTorch, so that its layer spec runs on a CPU.

Names of modules, parameters and arguments are those of its source (2.14.1 was looked at), of which Megatron passes
some; it asks releases after 2.6 for more names, so that is the version here. Arithmetic is what the documentation says.
Nothing of its kernels is shown by what runs here.
"""

from __future__ import annotations

__version__ = "2.6.0"

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
