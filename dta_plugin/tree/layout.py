"""PrefixTree -> torch tensors of the depth-first layout, and the map from scored tokens to LM-head rows.

A log-prob belongs to an *edge*: token t given its ancestors, read from the hidden state of ``parent[t]``. A fork's
last token is one LM-head row with one edge per child, and an edge shared by many sequences is computed once; its
gradient is the sum over those sequences, taken in the log-probs' own precision (float32 or float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.trie import PrefixTree

Scored = Sequence[int | Sequence[bool] | torch.Tensor | np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class TreeLayout:
    """The tree as int64 tensors on one device; T = tree tokens. See PrefixTree for each field's meaning."""

    tree: PrefixTree
    input_ids: torch.Tensor  # [T]
    parent: torch.Tensor  # [T]
    depth: torch.Tensor  # [T]
    exit: torch.Tensor  # [T]
    multiplicity: torch.Tensor  # [T]

    @classmethod
    def from_tree(cls, tree: PrefixTree, device: torch.device | str = "cpu") -> TreeLayout:
        arrays = (tree.tokens, tree.parent, tree.depth, tree.exit, tree.multiplicity)
        return cls(tree, *(torch.from_numpy(array).to(device) for array in arrays))


@dataclass(frozen=True, slots=True, eq=False)
class ScoredEdges:
    """Which edges the LM head must score. E = scored edges, R = distinct rows they are read from.

    target: int64 [E] layout index of each scored token, ascending.
    rows: int64 [R] layout index of the hidden states that the LM head reads, ascending.
    row_of_edge: int64 [E] position in ``rows`` of each edge's parent.
    edge_of_token: int64 [N - S] for tokens 1.. of every sequence, their edge, or E where unscored.
    lengths: per sequence, len - 1.
    """

    target: torch.Tensor
    rows: torch.Tensor
    row_of_edge: torch.Tensor
    edge_of_token: torch.Tensor
    lengths: list[int]

    @classmethod
    def from_tree(cls, tree: PrefixTree, scored: Scored | None, device: torch.device | str = "cpu") -> ScoredEdges:
        """scored: per sequence a bool mask over its tokens, an int b ("tokens b.. are scored"), or None for all."""
        wanted = _scored_mask(tree, scored)
        is_first = np.zeros(tree.flat_tokens, dtype=bool)
        is_first[tree.offsets[:-1]] = True
        wanted &= ~is_first

        is_edge = np.zeros(tree.tree_tokens, dtype=bool)
        is_edge[tree.paths[wanted]] = True
        target = np.flatnonzero(is_edge)
        rows, row_of_edge = np.unique(tree.parent[target], return_inverse=True)
        edge_of_layout = np.cumsum(is_edge) - 1
        edge_of_token = np.where(wanted, edge_of_layout[tree.paths], len(target))[~is_first]

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array.astype(np.int64, copy=False)).to(device)

        lengths = (np.diff(tree.offsets) - 1).tolist()
        return cls(tensor(target), tensor(rows), tensor(row_of_edge), tensor(edge_of_token), lengths)

    def per_token(self, edge_values: torch.Tensor) -> torch.Tensor:
        """Edge values [E] -> flat values [N - S] of tokens 1.. of every sequence, 0 where unscored; differentiable."""
        return torch.cat([edge_values, edge_values.new_zeros(1)])[self.edge_of_token]

    def per_sequence(self, edge_values: torch.Tensor) -> list[torch.Tensor]:
        """Edge values [E] -> one tensor [len - 1] per sequence, 0 where unscored; differentiable."""
        return list(self.per_token(edge_values).split(self.lengths))


def _scored_mask(tree: PrefixTree, scored: Scored | None) -> np.ndarray:
    """Bool [N]: which tokens of which sequences are scored."""
    if scored is None:
        return np.ones(tree.flat_tokens, dtype=bool)
    if len(scored) != tree.num_sequences:
        raise InvalidInputError(
            f"`scored` has {len(scored)} entries for {tree.num_sequences} sequences. Expected one int or bool mask per "
            "sequence."
        )
    mask = np.zeros(tree.flat_tokens, dtype=bool)
    for index, entry in enumerate(scored):
        row = mask[tree.offsets[index] : tree.offsets[index + 1]]
        if isinstance(entry, (int, np.integer)) and not isinstance(entry, bool):
            if entry < 1:
                raise InvalidInputError(
                    f"scored[{index}] is {entry}. Expected a first scored token >= 1: token 0 has no log-prob."
                )
            row[entry:] = True
            continue
        values = entry.detach().cpu().numpy() if isinstance(entry, torch.Tensor) else np.asarray(entry)
        if values.dtype != bool or values.shape != row.shape:
            raise InvalidInputError(
                f"scored[{index}] has shape {values.shape} and dtype {values.dtype}. Expected a bool mask of shape "
                f"{row.shape}, one entry per token of sequence {index}, or an int: the first scored token."
            )
        row[:] = values
    return mask
