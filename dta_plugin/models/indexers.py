"""Attention that chooses its keys by an index of its own: along a tree while it would choose them all.

DeepSeek Sparse Attention and its kin score all keys of a query and keep the best `index_topk`. A sequence of at most
that many tokens is full causal attention, which the tree runs; of longer ones not even the dense path is reproducible:
which keys are chosen hangs on rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.models.attention_registry import INDEXED
from dta_plugin.models.layer_calls import definer, install_around, tree_of_layer
from dta_plugin.models.layers import class_has, one_size
from dta_plugin.models.stand_in import StandIn

# What the forward of indexers uses that choose other things than single tokens.
_OTHER_CHOICES = ("index_kpool", "topk_blocks", "compress_rate", "compressor", "append_visible_tail")


def indexers(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The modules that choose single tokens, as many as their `index_topk` says."""
    if one_size(model.config.get_text_config(), "index_topk") is None:
        return
    for name, module in model.named_modules():
        is_indexer = name.endswith(".indexer") and isinstance(getattr(module, "index_topk", None), int)
        if is_indexer and not any(class_has(type(module), other) for other in _OTHER_CHOICES):
            yield module


def index_limit(model: PreTrainedModel) -> int | None:
    """The most tokens of a row of which indexers would choose all; None: it has none."""
    return min((cast(int, indexer.index_topk) for indexer in indexers(model)), default=None)


def index_length_obstacle(model: PreTrainedModel, lengths: Sequence[int]) -> str | None:
    """Why a batch of rows of these lengths cannot be exact."""
    limit = index_limit(model)
    if limit is None or max(lengths, default=0) <= limit:
        return None
    return (
        f"a row has {max(lengths)} tokens, and beyond {limit} (index_topk) attention chooses its keys by scores whose "
        f"order hangs on rounding, on the dense path, too; keep rows at {limit} tokens"
    )


def install(model: PreTrainedModel) -> None:
    """Indexers choose nothing where a call carries a tree. Idempotent."""
    found = set(indexers(model))
    if not found:
        return
    for indexer in found:
        _Indexer.install(definer(type(indexer)), "forward", model)
    INDEXED.update(type(module) for module in model.modules() if found.intersection(module.children()))
    install_around(model, found)


def uninstall(model: PreTrainedModel | None = None) -> None:
    """The model has no need of it any more; None: no model has."""
    _Indexer.uninstall(model)


class _Indexer(StandIn):
    """Along a tree, any one key: the mask that attention makes of it is passed over."""

    def __call__(self, indexer: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if tree_of_layer() is None:
            found: torch.Tensor = self.behind(indexer, hidden_states, *args, **kwargs)
            return found
        return torch.zeros(*hidden_states.shape[:2], 1, dtype=torch.int32, device=hidden_states.device)
