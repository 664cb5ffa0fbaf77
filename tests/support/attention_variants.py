"""Variants of the attention op and masks of token sequences. Inputs, runs and budgets are the package's own."""

from __future__ import annotations

import torch

from dta_plugin import PrefixTree, TreeLayout, TreeMask
from dta_plugin.attention.trial import Attention, Inputs, Options, Outputs, dense_in_own_dtype, relative_error
from tests.support.trees import Sequences

__all__ = ["Attention", "Inputs", "Options", "Outputs", "dense_in_own_dtype", "mask_of", "relative_error"]

OPTIONS: dict[str, Options] = {
    "plain": Options(q_heads=2),
    "grouped": Options(q_heads=6),
    "multi_query": Options(kv_heads=1),
    "window_1": Options(window=1),
    "window_5": Options(window=5),
    "window_beyond_depth": Options(window=10_000),
    "softcap": Options(softcap=2.0),
    "sinks": Options(sinks=True),
    "value_dim": Options(value_dim=6),
    "all_of_it": Options(window=3, softcap=2.0, sinks=True, value_dim=6),
    "window_and_sinks": Options(window=4, sinks=True),
}


def mask_of(sequences: Sequences, backend: str = "auto", device: torch.device | str = "cpu") -> TreeMask:
    return TreeMask.from_layout(TreeLayout.from_tree(PrefixTree.from_sequences(sequences), device), backend)
