"""dta-plugin: exact prefix-tree training for TRL and verl. Shared tokens of a micro-batch are computed once, both ways.

    import dta_plugin
    dta_plugin.enable()          # every trainer of TRL in this process now shares prefixes

or, without touching the script: ``python -m dta_plugin.run train.py --use_dta true``. Importing this package is
lazy: it loads none of torch, transformers, TRL, PEFT or Triton until a name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dta_plugin.activation import disable, enable
    from dta_plugin.api import sequence_logprobs, tree_attention_scope
    from dta_plugin.attention import TreeMask, tree_attention
    from dta_plugin.config import TreeConfig
    from dta_plugin.errors import InvalidInputError, UnsupportedError, VerificationError
    from dta_plugin.execution.packed import model_inputs
    from dta_plugin.execution.prepared_batch import SequenceLogProbs
    from dta_plugin.models.introspection import model_cost
    from dta_plugin.sharing.decoder_hooks import PrefixSharing, share_prefixes
    from dta_plugin.tree import PrefixTree, TreeLayout, TreeReport
    from dta_plugin.tree.cost import ModelCost

__version__ = "0.2.0"

_HOME = {
    "InvalidInputError": "dta_plugin.errors",
    "ModelCost": "dta_plugin.tree.cost",
    "PrefixSharing": "dta_plugin.sharing.decoder_hooks",
    "PrefixTree": "dta_plugin.tree",
    "SequenceLogProbs": "dta_plugin.execution.prepared_batch",
    "TreeConfig": "dta_plugin.config",
    "TreeLayout": "dta_plugin.tree",
    "TreeMask": "dta_plugin.attention",
    "TreeReport": "dta_plugin.tree",
    "UnsupportedError": "dta_plugin.errors",
    "VerificationError": "dta_plugin.errors",
    "disable": "dta_plugin.activation",
    "enable": "dta_plugin.activation",
    "model_cost": "dta_plugin.models.introspection",
    "model_inputs": "dta_plugin.execution.packed",
    "sequence_logprobs": "dta_plugin.api",
    "share_prefixes": "dta_plugin.sharing.decoder_hooks",
    "tree_attention": "dta_plugin.attention",
    "tree_attention_scope": "dta_plugin.api",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'dta_plugin' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)
