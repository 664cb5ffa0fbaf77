"""PrefixTree -> torch tensors of the depth-first layout, and the map from scored tokens to LM-head rows.

A log-prob belongs to an *edge*: token t given its ancestors, read from the hidden state of ``parent[t]``. A fork's
last token is one LM-head row with one edge per child, and an edge shared by many sequences is computed once; its
gradient is the sum over those sequences, taken in the log-probs' own precision (float32 or float64).

Memory: a map of 8 bytes per flat token, 24 per scored tree token, and about as much again while it is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.trie import PrefixTree
from dta_plugin.upload import upload

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
        """The tree's arrays as tensors.

        Args:
            tree: a forest of T tokens.
            device: where the model computes; the copy is not waited for.

        Returns:
            The layout, all of it int64 [T].
        """
        arrays = (tree.tokens, tree.parent, tree.depth, tree.exit, tree.multiplicity)
        return cls(tree, *upload(arrays, device))


@dataclass(frozen=True, slots=True, eq=False)
class HostEdges:
    """What the CPU has to know of `ScoredEdges` while the device computes.

    target, rows, row_of_edge: as there. scored_tokens: of all sequences, however many share an edge.
    """

    target: np.ndarray
    rows: np.ndarray
    row_of_edge: np.ndarray
    scored_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class ScoredEdges:
    """Which edges the LM head must score. E = scored edges, R = distinct rows they are read from.

    target: int64 [E] layout index of each scored token, ascending.
    rows: int64 [R] layout index of the hidden states that the LM head reads, ascending.
    row_of_edge: int64 [E] position in ``rows`` of each edge's parent.
    edge_of_token: int64 [N - S] for tokens 1.. of every sequence, their edge, or E where unscored.
    lengths: per sequence, len - 1. host: in the CPU's memory.
    temperature: float64 [R] where sequences have temperatures of their own. Edges and rows are then distinct by
    temperature too: sequences of different ones share hidden states, not log-probs.
    """

    target: torch.Tensor
    rows: torch.Tensor
    row_of_edge: torch.Tensor
    edge_of_token: torch.Tensor
    lengths: list[int]
    host: HostEdges
    temperature: torch.Tensor | None = None

    @classmethod
    def from_tree(
        cls,
        tree: PrefixTree,
        scored: Scored | None,
        device: torch.device | str = "cpu",
        temperatures: Sequence[float] | None = None,
    ) -> ScoredEdges:
        """scored: per sequence a bool mask over its tokens, an int b ("tokens b.. are scored"), or None for all.

        temperatures: one per sequence, None if all have the same.
        """
        values, kind_of_token = _temperature_kinds(tree, temperatures)
        kinds = len(values)
        is_scored = _scored_mask(tree, scored)
        inner = np.ones(tree.flat_tokens, dtype=bool)
        inner[tree.offsets[:-1]] = False
        is_scored = is_scored[inner]
        keys = tree.paths[inner]  # a place in the layout and a temperature
        if kinds > 1:
            keys = keys * kinds + kind_of_token[inner]
        is_edge = np.zeros(tree.tree_tokens * kinds, dtype=bool)
        is_edge[keys if is_scored.all() else keys[is_scored]] = True
        target, kind_of_edge = _places(is_edge, kinds)
        row_of_edge = tree.parent[target]
        if kinds > 1:
            row_of_edge = row_of_edge * kinds + kind_of_edge
        is_row = np.zeros(tree.tree_tokens * kinds, dtype=bool)
        is_row[row_of_edge] = True
        rows, kind_of_row = _places(is_row, kinds)
        row_of_edge = _ranks(is_row)[row_of_edge]
        edge_of_token = _ranks(is_edge)[keys]
        edge_of_token[~is_scored] = len(target)
        temperature = (
            None if temperatures is None else upload([values[np.broadcast_to(kind_of_row, rows.shape)]], device)[0]
        )
        arrays = [x.astype(np.int64, copy=False) for x in (target, rows, row_of_edge, edge_of_token)]
        on_device = dict(zip(("target", "rows", "row_of_edge", "edge_of_token"), upload(arrays, device), strict=True))
        lengths = (np.diff(tree.offsets) - 1).tolist()
        host = HostEdges(target, rows, row_of_edge, int(is_scored.sum()))
        return cls(**on_device, lengths=lengths, host=host, temperature=temperature)

    def per_token(self, edge_values: torch.Tensor) -> torch.Tensor:
        """Edge values [E] -> flat values [N - S] of tokens 1.. of every sequence, 0 where unscored; differentiable."""
        return torch.cat([edge_values, edge_values.new_zeros(1)])[self.edge_of_token]

    def per_sequence(self, edge_values: torch.Tensor) -> list[torch.Tensor]:
        """Edge values [E] -> one tensor [len - 1] per sequence, 0 where unscored; differentiable."""
        return list(self.per_token(edge_values).split(self.lengths))


def _places(flags: np.ndarray, kinds: int) -> tuple[np.ndarray, np.ndarray | int]:
    """Layout indices and temperatures of the flags [T * kinds] that are set."""
    places = np.flatnonzero(flags)
    return np.divmod(places, kinds) if kinds > 1 else (places, 0)


def _ranks(flags: np.ndarray) -> np.ndarray:
    """Of every flag that is set, how many are set before it."""
    ranks = np.cumsum(flags)
    ranks -= 1
    return ranks


def _temperature_kinds(tree: PrefixTree, temperatures: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray]:
    """Distinct temperatures, float64, and int64 [N] which of them each token of a sequence has; empty without any."""
    if temperatures is None:
        return np.ones(1), np.zeros(0, dtype=np.int64)
    if len(temperatures) != tree.num_sequences or min(temperatures) <= 0:
        raise InvalidInputError(
            f"Got temperatures={list(temperatures)} for {tree.num_sequences} sequences. Expected one above 0 for each."
        )
    values, kind = np.unique(np.asarray(temperatures, dtype=np.float64), return_inverse=True)
    return values, np.repeat(kind, np.diff(tree.offsets))


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
