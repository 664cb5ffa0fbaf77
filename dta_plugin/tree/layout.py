"""PrefixTree -> torch tensors of the depth-first layout, and the map from scored tokens to LM-head rows.

A log-prob belongs to an *edge*: token t given its ancestors, read from the hidden state of ``parent[t]``. A fork's
last token is one LM-head row with one edge per child, and an edge shared by many sequences is computed once; its
gradient is the sum over those sequences, taken in the log-probs' own precision (float32 or float64).

Memory: a map of 8 bytes per flat token, 24 per scored tree token; while it is made, 1 per flat and 6 per tree token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.trie import PrefixTree
from dta_plugin.upload import upload

_BLOCK = 1 << 16  # tokens, or a sequence, that are gone through at once: what is on the way stays in the cache

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
    reach: torch.Tensor | None = None  # [T]

    @classmethod
    def from_tree(cls, tree: PrefixTree, device: torch.device | str = "cpu") -> TreeLayout:
        """The tree's arrays as tensors.

        Args:
            tree: a forest of T tokens.
            device: where the model computes; the copy is not waited for.

        Returns:
            The layout, all of it int64 [T].
        """
        arrays = [tree.tokens, tree.parent, tree.depth, tree.exit, tree.multiplicity]
        arrays += [] if tree.reach is None else [tree.reach]
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
        values, kind = _temperature_kinds(tree, temperatures)
        kinds, is_scored = len(values), _scored_mask(tree, scored)
        is_edge = np.zeros(tree.tree_tokens * kinds, dtype=bool)
        scored_tokens = 0
        for part in _parts(tree, is_scored, kind):
            edges = part.keys[part.is_scored]
            is_edge[edges] = True
            scored_tokens += len(edges)
        target, kind_of_edge = _places(is_edge, kinds)
        row_of_edge = np.empty(len(target), dtype=np.int64)
        for block in _blocks(len(target)):
            parents = tree.parent[target[block]]
            row_of_edge[block] = parents if kinds == 1 else parents * kinds + kind_of_edge[block]
        is_row = np.zeros(tree.tree_tokens * kinds, dtype=bool)
        is_row[row_of_edge] = True
        rows, kind_of_row = _places(is_row, kinds)
        ranks = np.empty(len(is_edge), dtype=np.int32 if len(is_edge) < 2**31 else np.int64)
        _rank(is_row, ranks)
        for block in _blocks(len(target)):
            row_of_edge[block] = ranks[row_of_edge[block]]
        _rank(is_edge, ranks)
        edge_of_token = np.empty(tree.flat_tokens - tree.num_sequences, dtype=np.int64)
        for part in _parts(tree, is_scored, kind):
            edge_of_token[part.place] = np.where(part.is_scored, ranks[part.keys], len(target))
        temperature = None if temperatures is None else upload([values[kind_of_row]], device)[0]
        arrays = (target, rows, row_of_edge, edge_of_token)
        on_device = dict(zip(("target", "rows", "row_of_edge", "edge_of_token"), upload(arrays, device), strict=True))
        lengths = (np.diff(tree.offsets) - 1).tolist()
        host = HostEdges(target, rows, row_of_edge, scored_tokens)
        return cls(**on_device, lengths=lengths, host=host, temperature=temperature)

    def per_token(self, edge_values: torch.Tensor) -> torch.Tensor:
        """Edge values [E] -> flat values [N - S] of tokens 1.. of every sequence, 0 where unscored; differentiable."""
        return torch.cat([edge_values, edge_values.new_zeros(1)])[self.edge_of_token]

    def per_sequence(self, edge_values: torch.Tensor) -> list[torch.Tensor]:
        """Edge values [E] -> one tensor [len - 1] per sequence, 0 where unscored; differentiable."""
        return list(self.per_token(edge_values).split(self.lengths))


class _Part(NamedTuple):
    """Tokens 1.. of some sequences: where they are among all such [N - S], their place in the layout and, where there
    are several temperatures, of these [n], and which are scored [n]."""

    place: slice
    keys: np.ndarray
    is_scored: np.ndarray


def _parts(tree: PrefixTree, is_scored: np.ndarray, kind: np.ndarray | None) -> Iterator[_Part]:
    """All tokens 1.., a cache's worth of sequences at a time. is_scored: bool [N]. kind: int64 [S] of temperature."""
    starts = tree.offsets[:-1]
    cuts = np.flatnonzero(np.diff(starts // _BLOCK, prepend=-1)).tolist()
    for first, stop in pairwise([*cuts, tree.num_sequences]):
        start, end = int(tree.offsets[first]), int(tree.offsets[stop])
        inner = np.ones(end - start, dtype=bool)
        inner[starts[first:stop] - start] = False
        keys = tree.paths[start:end][inner]
        if kind is not None:
            lengths = np.diff(tree.offsets[first : stop + 1]) - 1
            keys = keys * (int(kind.max()) + 1) + np.repeat(kind[first:stop], lengths)
        yield _Part(slice(start - first, end - stop), keys, is_scored[start:end][inner])


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _BLOCK):
        yield slice(start, start + _BLOCK)


def _places(flags: np.ndarray, kinds: int) -> tuple[np.ndarray, np.ndarray]:
    """Layout indices of the flags [T * kinds] that are set, and their temperatures, for a single one as a view."""
    places = np.flatnonzero(flags)
    return np.divmod(places, kinds) if kinds > 1 else (places, np.broadcast_to(0, places.shape))


def _rank(flags: np.ndarray, ranks: np.ndarray) -> None:
    """Set `ranks`, for every flag that is set, to how many are set before it."""
    np.cumsum(flags, dtype=ranks.dtype, out=ranks)
    ranks -= 1


def _temperature_kinds(tree: PrefixTree, temperatures: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Distinct temperatures, float64, and int64 [S] which of them each sequence has; None if all have the same."""
    if temperatures is None:
        return np.ones(1), None
    if len(temperatures) != tree.num_sequences or not all(0 < t < np.inf for t in temperatures):
        raise InvalidInputError(
            f"Got temperatures={list(temperatures)} for {tree.num_sequences} sequences. Expected a finite one above 0 "
            "for each."
        )
    values, kind = np.unique(np.asarray(temperatures, dtype=np.float64), return_inverse=True)
    return values, kind if len(values) > 1 else None


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
