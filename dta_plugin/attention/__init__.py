"""How shared keys are read: one op, `tree_attention`, behind several backends."""

from dta_plugin.attention.api import tree_attention
from dta_plugin.attention.mask import TreeMask

__all__ = ["TreeMask", "tree_attention"]
