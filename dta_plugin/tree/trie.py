"""Token sequences -> compressed prefix tree in depth-first order.

The tree is found from the tokens alone: sort the sequences, take the longest common prefix (LCP) of each
neighbouring pair, and let every sequence contribute the tokens after its LCP. Sorted order *is* depth-first
preorder, so those tails, concatenated, are the layout. Cost: O(N) array work plus one Python step per
sequence; no Python object is made per token. A forest (no common first token) is simply a tree with several roots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dta_plugin.errors import InvalidInputError

TokenSequence = Sequence[int] | torch.Tensor | np.ndarray

_MAX_TOKEN = 2**32 - 1


@dataclass(frozen=True, slots=True, eq=False)
class PrefixTree:
    """A forest of token sequences in which every shared prefix is stored once, in depth-first preorder.

    Shapes: T = tree tokens, N = flat tokens, S = sequences, M = nodes. All arrays are int64.

    Attributes:
        tokens: [T] token ids in layout order.
        parent: [T] layout index of the token before t on its path, -1 at a root.
        depth: [T] position of t in its sequence (its RoPE position id).
        exit: [T] exclusive end of t's subtree; token i sees token j iff ``j <= i < exit[j]``.
        multiplicity: [T] number of sequences that contain t.
        node_start: [M + 1] first token of each node, then T; a node is a maximal run of tokens without a fork.
        paths: [N] layout index of every token of every sequence, in the caller's order of sequences.
        offsets: [S + 1] sequence s owns ``paths[offsets[s]:offsets[s + 1]]``.
        order: [S] sequence indices in lexicographic, that is depth-first, order.
    """

    tokens: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    exit: np.ndarray
    multiplicity: np.ndarray
    node_start: np.ndarray
    paths: np.ndarray
    offsets: np.ndarray
    order: np.ndarray

    @classmethod
    def from_sequences(cls, sequences: Iterable[TokenSequence]) -> PrefixTree:
        """Merge sequences into a prefix tree (a forest where they share nothing).

        Args:
            sequences: lists of ints, or 1-D integer tensors or arrays [len], without padding. Duplicates and sequences
                that are a prefix of another are fine.

        Returns:
            The tree, in the CPU's memory.

        Raises:
            InvalidInputError: an empty batch, an empty sequence, or anything that is not a 1-D row of token ids in
                [0, 2**32).
        """
        rows = token_rows(sequences)
        if not rows:
            raise InvalidInputError(
                "Got an empty batch: 0 sequences. Expected at least one token sequence; skip the call for an "
                "empty micro-batch."
            )
        return cls._from_sorted(rows, *depth_first(rows))

    @classmethod
    def _from_sorted(cls, rows: list[np.ndarray], order: np.ndarray, lcp: np.ndarray) -> PrefixTree:
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths[order] - lcp)])
        total = int(starts[-1])

        tokens = np.concatenate([rows[s][lcp[rank] :] for rank, s in enumerate(order)])
        parent = np.arange(-1, total - 1, dtype=np.int64)
        depth = np.empty(total, dtype=np.int64)
        exit_ = np.full(total, total, dtype=np.int64)
        first_rank = np.repeat(np.arange(len(order)), lengths[order] - lcp)
        last_rank = np.full(total, len(order), dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        paths = np.empty(int(offsets[-1]), dtype=np.int64)

        path = np.empty(int(lengths.max()), dtype=np.int64)  # layout indices of the current sequence
        length = 0
        for rank, s in enumerate(order):
            shared, start, stop = lcp[rank], starts[rank], starts[rank + 1]
            closed = path[shared:length]  # the previous sequence's tokens that this one does not pass through
            exit_[closed] = start
            last_rank[closed] = rank
            length = lengths[s]
            path[shared:length] = np.arange(start, stop)
            depth[start:stop] = np.arange(shared, length)
            if stop > start:
                parent[start] = path[shared - 1] if shared else -1
            paths[offsets[s] : offsets[s + 1]] = path[:length]

        is_start = np.ones(total, dtype=bool)
        is_start[1:] = (exit_[1:] != exit_[:-1]) | (parent[1:] != np.arange(total - 1))
        node_start = np.append(np.flatnonzero(is_start), total)
        multiplicity = last_rank - first_rank
        return cls(tokens, parent, depth, exit_, multiplicity, node_start, paths, offsets, order)

    @property
    def num_sequences(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_nodes(self) -> int:
        return len(self.node_start) - 1

    @property
    def flat_tokens(self) -> int:
        """N: tokens of all sequences, each counted as often as it occurs."""
        return int(self.offsets[-1])

    @property
    def tree_tokens(self) -> int:
        """T: tokens that are computed, each shared token once."""
        return len(self.tokens)

    @property
    def compression_ratio(self) -> float:
        """N / T; 1.0 means that nothing is shared."""
        return self.flat_tokens / self.tree_tokens

    def path(self, sequence: int) -> np.ndarray:
        """Layout indices [len] of one sequence's tokens; ``tokens[path(s)]`` gives the sequence back."""
        return self.paths[self.offsets[sequence] : self.offsets[sequence + 1]]

    def visible_pairs(self) -> int:
        """Query-key pairs of full tree-causal attention: sum over tokens of their depth + 1."""
        return int(self.depth.sum()) + self.tree_tokens

    def flat_visible_pairs(self) -> int:
        """Query-key pairs of dense causal attention over the same sequences, one at a time."""
        lengths = np.diff(self.offsets)
        return int((lengths * (lengths + 1) // 2).sum())


def token_rows(sequences: Iterable[TokenSequence]) -> list[np.ndarray]:
    """Sequences as int64 arrays. Raises InvalidInputError for what is no row of token ids."""
    return [_as_token_array(sequence, index) for index, sequence in enumerate(sequences)]


def depth_first(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [S] row indices in lexicographic, that is depth-first, order; [S] tokens shared with the row before."""
    # Big-endian bytes compare like the integers they encode, and a prefix sorts before what extends it.
    keys = [row.astype(">u4").tobytes() for row in rows]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    lcp = np.zeros(len(rows), dtype=np.int64)
    for rank in range(1, len(order)):
        lcp[rank] = _common_prefix(rows[order[rank - 1]], rows[order[rank]])
    return np.array(order, dtype=np.int64), lcp


def _as_token_array(sequence: TokenSequence, index: int) -> np.ndarray:
    try:
        row = sequence.detach().cpu().numpy() if isinstance(sequence, torch.Tensor) else np.asarray(sequence)
    except (TypeError, ValueError) as error:  # rows of different lengths, a bfloat16 tensor
        raise InvalidInputError(
            f"Sequence {index} is a {type(sequence).__name__} that is no row of integers ({error}). Expected a 1-D row "
            "of integer token ids; pass one unpadded sequence per rollout."
        ) from error
    if row.size == 0:
        raise InvalidInputError(
            f"Sequence {index} is empty. Expected at least one token per sequence; drop empty rollouts before the call."
        )
    if row.ndim != 1 or row.dtype.kind not in "iu":
        raise InvalidInputError(
            f"Sequence {index} has shape {row.shape} and dtype {row.dtype}. Expected a 1-D row of integer token ids; "
            "pass one unpadded sequence per rollout."
        )
    if row.min() < 0 or row.max() > _MAX_TOKEN:
        raise InvalidInputError(
            f"Sequence {index} has token ids from {row.min()} to {row.max()}. Expected ids in [0, {_MAX_TOKEN}]; "
            "remove padding and ignore-index values such as -100."
        )
    return row.astype(np.int64, copy=False)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    shortest = min(len(a), len(b))
    differs = a[:shortest] != b[:shortest]
    first = int(differs.argmax())
    return first if differs[first] else shortest
