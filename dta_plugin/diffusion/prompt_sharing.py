"""Rows of a micro-batch as one prefix tree, where attention is causal over blocks: siblings compute their prompt once.

A token sees its own block and earlier ones. The states of a block therefore follow from the row up to the block's end,
and are the same in all rows that are alike up to there: the finished blocks of a group's prompt, forward and backward.
Rows part at the border before the first block in which they differ, because every token of that block sees all of it,
and whole rows that are alike are one. Log-probs and gradients are those of the rows side by side.

With full attention a prompt's states depend on the completion, and on its noise: nothing is shared.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from dta_plugin.attention import TreeMask
from dta_plugin.diffusion.family import DiffusionFamily, explicit_mask_obstacle
from dta_plugin.execution.packed import model_inputs
from dta_plugin.models.dispatch import install
from dta_plugin.models.introspection import causal_lm, decoder_of
from dta_plugin.models.support import tree_obstacle
from dta_plugin.tree.layout import TreeLayout
from dta_plugin.tree.trie import PrefixTree, depth_first

SHARING = ("auto", "never")
log = logging.getLogger("dta_plugin")


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """Rows of one micro-batch as one. call: keyword arguments of the decoder's forward. mask: who sees whom.

    index: int64 [M], where in the packed row the asked places are.
    """

    call: dict[str, Any]
    mask: TreeMask
    index: torch.Tensor


@dataclass(slots=True, eq=False)
class PromptSharing:
    """Whether rows share their prompts, and what that has saved.

    kind: "auto", wherever attention is causal over blocks, or "never". flat_tokens: of all rows that ran since
    `restart`. tree_tokens: of them, what was computed, padding aside.
    """

    kind: str = "auto"
    flat_tokens: int = 0
    tree_tokens: int = 0
    _said: set[str] = field(default_factory=set)

    def is_on(self, family: DiffusionFamily) -> bool:
        return self.kind == "auto" and family.block_length is not None

    def packed(
        self,
        model: nn.Module,
        family: DiffusionFamily,
        noised: torch.Tensor,
        attention_mask: torch.Tensor | None,
        place: tuple[torch.Tensor, torch.Tensor],
    ) -> PackedRows | None:
        """The tree of these rows; None where they run side by side, because nothing is alike or a tree is not exact.

        noised: int64 [B, S]. attention_mask: [B, S], 0 at padding, or None. place: rows and columns, int64 [M] each,
        whose hidden states are asked for.
        """
        if not self.is_on(family) or self._has_obstacle(model):
            return None
        real = np.ones(noised.shape, bool) if attention_mask is None else attention_mask.cpu().numpy().astype(bool)
        row, column = (each.cpu().numpy() for each in place)
        count = int(real.sum())
        self.flat_tokens += count
        self.tree_tokens += count
        if not (real.any(axis=1).all() and real[row, column].all()):  # states of padding, which no tree has
            return None
        rows = [ids[own] for ids, own in zip(noised.cpu().numpy(), real, strict=True)]
        tree = block_tree(rows, family.block_length or 1)
        if tree.tree_tokens == count:
            return None
        self.tree_tokens += tree.tree_tokens - count
        position = real.cumsum(axis=1) - 1
        index = tree.paths[tree.offsets[row] + position[row, column]]
        install(causal_lm(model))
        layout = TreeLayout.from_tree(tree, noised.device)
        mask = TreeMask.from_layout(layout, rule="whole")
        return PackedRows(model_inputs(layout, mask), mask, torch.from_numpy(index).to(noised.device))

    def restart(self) -> None:
        """Count anew."""
        self.flat_tokens = self.tree_tokens = 0

    def counts(self, family: DiffusionFamily) -> dict[str, int]:
        """For metrics; nothing where nothing can be shared."""
        return {"flat_tokens": self.flat_tokens, "tree_tokens": self.tree_tokens} if self.is_on(family) else {}

    def _has_obstacle(self, model: nn.Module) -> bool:
        """Whether a tree would not be exact for this model; said once."""
        base = causal_lm(model)
        accepted = inspect.signature(decoder_of(base).forward).parameters.values()
        reason = explicit_mask_obstacle(base) or tree_obstacle(model, both_ways=True)
        if reason is None and not any(p.kind is p.VAR_KEYWORD for p in accepted):
            reason = f"{type(base).__name__} takes no keywords that its layers could get; use a decoder of transformers"
        if reason is not None and reason not in self._said:
            self._said.add(reason)
            log.warning("dta: siblings do not share their prompts in training: %s", reason)
        return reason is not None


def block_tree(rows: Sequence[np.ndarray], block_length: int) -> PrefixTree:
    """The tree of rows whose tokens attend both ways within blocks of so many, counted from each row's beginning.

    rows: integers [len], at least one in each. A row's last block may be shorter.
    """
    order, lcp = depth_first(list(rows))
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))[order]
    before = np.concatenate([[-1], lengths[:-1]])
    are_alike = (lcp == lengths) & (lcp == before)
    shared = np.where(are_alike, lcp, lcp // block_length * block_length)
    tree = PrefixTree.from_sorted(rows, order, shared)
    end_of_row = np.repeat(lengths, lengths - shared)
    end_of_block = np.minimum((tree.depth // block_length + 1) * block_length, end_of_row)
    return replace(tree, reach=np.arange(tree.tree_tokens) - tree.depth + end_of_block)
