"""Token sequences -> compressed prefix tree in depth-first order.

The tree is found from the tokens alone: sort the sequences, take the longest common prefix (LCP) of each
neighbouring pair, and let every sequence contribute the tokens after its LCP. Sorted order *is* depth-first
preorder, so those tails, concatenated, are the layout. Cost: O(N) array work plus a few Python steps per sequence, or,
where sequences are short and many, per position; no Python object is made per token. A forest (no common first token)
is simply a tree with several roots.

Memory: 8 bytes per flat token and 40 per tree token stay; while the tree is made, the ids and their sort keys need 20
bytes per flat token besides.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, Union

import numpy as np

from dta_plugin.errors import InvalidInputError

if TYPE_CHECKING:
    import torch

TokenSequence: TypeAlias = Union[Sequence[int], "torch.Tensor", np.ndarray]

_MAX_TOKEN = 2**32 - 1
_SHORT = 64  # tokens per sequence on average: up to here, a Python step per sequence costs more than its tokens
_MANY = 1024  # sequences, from which on that matters


@dataclass(frozen=True, slots=True, eq=False)
class PrefixTree:
    """A forest of token sequences in which every shared prefix is stored once, in depth-first preorder.

    Shapes: T = tree tokens, N = flat tokens, S = sequences, M = nodes. All arrays are int64.

    Attributes:
        tokens: [T] token ids in layout order.
        parent: [T] layout index of the token before t on its path, -1 at a root.
        depth: [T] position of t in its sequence (its RoPE position id).
        exit: [T] exclusive end of t's subtree; token i sees token j iff ``j <= i < exit[j]``, or
            ``j < reach[i] and i < exit[j]``.
        multiplicity: [T] number of sequences that contain t.
        node_start: [M + 1] first token of each node, then T; a node is a maximal run of tokens without a fork.
        paths: [N] layout index of every token of every sequence, in the caller's order of sequences.
        offsets: [S + 1] sequence s owns ``paths[offsets[s]:offsets[s + 1]]``.
        order: [S] sequence indices in lexicographic, that is depth-first, order.
        reach: [T] exclusive end of the block of the layout within which t attends both ways (an image's tokens), its
            own index + 1 where it does not; None where all is causal. Blocks lie within a node, and all sequences
            through one contain the whole of it.
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
    reach: np.ndarray | None = None

    @classmethod
    def from_sequences(
        cls, sequences: Iterable[TokenSequence], identities: Sequence[np.ndarray] | None = None
    ) -> PrefixTree:
        """Merge sequences into a prefix tree (a forest where they share nothing).

        Args:
            sequences: lists of ints, or 1-D integer tensors or arrays [len], without padding. Duplicates and sequences
                that are a prefix of another are fine.
            identities: per sequence, integers [len] in [0, 2**32) that say which tokens are the same, where ids do not:
                placeholders of images stand for different content. Tokens of one identity must have one id. None: ids
                do.

        Returns:
            The tree, in the CPU's memory; its tokens are ids.

        Raises:
            InvalidInputError: an empty batch, an empty sequence, or anything that is not a 1-D row of token ids in
                [0, 2**32); identities of other lengths.
        """
        rows = token_rows(sequences)
        if not rows:
            raise InvalidInputError(
                "Got an empty batch: 0 sequences. Expected at least one token sequence; skip the call for an "
                "empty micro-batch."
            )
        if identities is None:
            return cls.from_sorted(rows, *depth_first(rows))
        if list(map(len, identities)) != list(map(len, rows)):
            raise InvalidInputError(
                f"Got identities of {list(map(len, identities))} tokens for sequences of {list(map(len, rows))}. "
                "Expected one per token."
            )
        return cls.from_sorted(rows, *depth_first(token_rows(identities)))

    @classmethod
    def from_sorted(
        cls, rows: Sequence[np.ndarray], order: np.ndarray, lcp: np.ndarray, is_compact: bool = False
    ) -> PrefixTree:
        """The tree of rows whose order is known.

        Args:
            rows: integers [len] of one dtype, at least one in each.
            order: int64 [S] row indices in lexicographic order.
            lcp: int64 [S] tokens that each of these has in common with the one before it.
            is_compact: less than half the memory, where no tensors are made of the tree: int32 arrays, if it has less
                than 2**31 tokens, and tokens as the rows have them.

        Returns:
            The tree, in the CPU's memory.
        """
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        tails = lengths[order] - lcp
        starts = np.concatenate([[0], np.cumsum(tails)])
        total = int(starts[-1])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        dtype = np.dtype(np.int32 if is_compact and offsets[-1] < 2**31 else np.int64)

        tokens = np.concatenate([rows[s][shared:] for s, shared in zip(order.tolist(), lcp.tolist(), strict=True)])
        depth = np.arange(total, dtype=dtype)
        depth -= np.repeat((starts[:-1] - lcp).astype(dtype), tails)
        found = _Paths(
            parent=np.arange(-1, total - 1, dtype=dtype),
            exit=np.full(total, total, dtype=dtype),
            multiplicity=np.ones(total, dtype=dtype),
            paths=np.empty(offsets[-1], dtype=dtype),
        )
        fill = _by_position if _are_short(rows) else _by_sequence
        fill(found, lcp, lengths[order], starts, offsets[order])
        parent, exit_ = found.parent, found.exit

        is_start = np.ones(total, dtype=bool)
        is_start[1:] = (exit_[1:] != exit_[:-1]) | (parent[1:] != np.arange(total - 1, dtype=dtype))
        node_start = np.append(np.flatnonzero(is_start), total)
        return cls(tokens, parent, depth, exit_, found.multiplicity, node_start, found.paths, offsets, order)

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
        """Query-key pairs of full attention: each token sees its path and itself, and what follows in its block."""
        return int(self.depth.sum()) + self.tree_tokens + int(self._ahead().sum())

    def flat_visible_pairs(self) -> int:
        """Query-key pairs of dense attention over the same sequences, one at a time."""
        lengths = np.diff(self.offsets)
        ahead = self._ahead()
        return int((lengths * (lengths + 1) // 2).sum()) + (int(ahead[self.paths].sum()) if len(ahead) else 0)

    def _ahead(self) -> np.ndarray:
        """[T] later tokens that each one sees; empty where all is causal."""
        return np.zeros(0, np.int64) if self.reach is None else self.reach - np.arange(1, self.tree_tokens + 1)


@dataclass(frozen=True, slots=True, eq=False)
class _Paths:
    """What a tree's paths decide, to be filled in; see PrefixTree. parent: as if every tail went on from the token
    before it. exit: as if nothing ended before the layout does."""

    parent: np.ndarray
    exit: np.ndarray
    multiplicity: np.ndarray
    paths: np.ndarray


def _by_sequence(found: _Paths, lcp: np.ndarray, lengths: np.ndarray, starts: np.ndarray, offsets: np.ndarray) -> None:
    """Fill in `found` sequence by sequence. All but starts [S + 1] are [S], in depth-first order."""
    dtype = found.paths.dtype
    path = np.empty(int(lengths.max()), dtype=dtype)  # layout indices of the current sequence
    first_rank = np.repeat(np.arange(len(lcp), dtype=dtype), np.diff(starts))
    found.multiplicity[:] = len(lcp)
    length = start = 0
    columns = (x.tolist() for x in (lcp, lengths, starts[1:], offsets))
    for rank, (shared, end, stop, offset) in enumerate(zip(*columns, strict=True)):
        closed = path[shared:length]  # the previous sequence's tokens that this one does not pass through
        found.exit[closed] = start
        found.multiplicity[closed] = rank
        length = end
        path[shared:length] = np.arange(start, stop)
        if stop > start:
            found.parent[start] = path[shared - 1] if shared else -1
        found.paths[offset : offset + length] = path[:length]
        start = stop
    found.multiplicity[:] -= first_rank


def _by_position(found: _Paths, lcp: np.ndarray, lengths: np.ndarray, starts: np.ndarray, offsets: np.ndarray) -> None:
    """The same, position by position: of the sequences that reach it, those that share a token are neighbours."""
    at = np.empty(len(lcp), dtype=np.int64)  # per sequence, layout index of its token at the position before
    reach = np.arange(len(lcp))  # the sequences that have a token at this position
    for position in range(int(lengths.max())):
        reach = reach[lengths[reach] > position]
        owners = np.flatnonzero(lcp[reach] <= position)  # the first sequence through each token
        ranks = reach[owners]
        token = starts[ranks] + position - lcp[ranks]
        begins = lcp[ranks] == position
        found.parent[token[begins]] = at[ranks[begins]] if position else -1
        last = reach[np.append(owners[1:], len(reach)) - 1]
        found.exit[token] = starts[last + 1]
        found.multiplicity[token] = last + 1 - ranks
        at[reach] = np.repeat(token, np.diff(np.append(owners, len(reach))))
        found.paths[offsets[reach] + position] = at[reach]


def token_rows(sequences: Iterable[TokenSequence]) -> list[np.ndarray]:
    """Sequences as int64 arrays. Raises InvalidInputError for what is no row of token ids."""
    rows = list(sequences)
    return _rows_of_ints(rows) or [_as_token_array(sequence, index) for index, sequence in enumerate(rows)]


def depth_first(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [S] row indices in lexicographic, that is depth-first, order; [S] tokens shared with the row before."""
    # Big-endian bytes compare like the integers they encode, and a prefix sorts before what extends it.
    if _are_short(rows):
        flat = np.concatenate(rows)
        ends = np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)))
        key, cuts = flat.astype(">u4").tobytes(), [0, *(4 * ends).tolist()]
        keys = [key[start:stop] for start, stop in pairwise(cuts)]
        order = np.array(sorted(range(len(rows)), key=keys.__getitem__), dtype=np.int64)
        return order, _common_prefixes(flat, ends, order)
    keys = [row.astype(">u4").tobytes() for row in rows]
    order = np.array(sorted(range(len(rows)), key=keys.__getitem__), dtype=np.int64)
    neighbours = zip(order[:-1].tolist(), order[1:].tolist(), strict=True)
    lcp = [0, *(_common_prefix(rows[before], rows[after]) for before, after in neighbours)]
    return order, np.array(lcp[: len(rows)], dtype=np.int64)


def _are_short(rows: Sequence[Any]) -> bool:
    """Whether there are so many rows, and so short ones, that a step per position is cheaper than one per row."""
    if len(rows) < _MANY or max(map(len, rows)) > len(rows) // 8:
        return False
    return sum(map(len, rows)) <= _SHORT * len(rows)


def _rows_of_ints(rows: list[TokenSequence]) -> list[np.ndarray] | None:
    """Many short lists as int64 arrays, converted at once; None for anything else, and for what is no token id."""
    if set(map(type, rows)) != {list} or not _are_short(rows):
        return None
    if not all(rows) or set(map(type, chain.from_iterable(rows))) != {int}:
        return None
    try:
        flat = np.fromiter(chain.from_iterable(rows), np.int64)
    except OverflowError:
        return None
    if flat.min() < 0 or flat.max() > _MAX_TOKEN:
        return None
    ends = np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows))).tolist()
    return [flat[start:stop] for start, stop in pairwise([0, *ends])]


def _is_tensor(sequence: TokenSequence) -> TypeGuard[torch.Tensor]:
    """Without torch, which whoever has a tensor has loaded."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(sequence, torch.Tensor)


def _as_token_array(sequence: TokenSequence, index: int) -> np.ndarray:
    try:
        row = sequence.detach().cpu().numpy() if _is_tensor(sequence) else np.asarray(sequence)
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


def _common_prefixes(flat: np.ndarray, ends: np.ndarray, order: np.ndarray) -> np.ndarray:
    """[S] tokens that each row of `flat` shares with the one before it in `order`, position by position."""
    begins = np.append(0, ends[:-1])
    shared = np.zeros(len(order), dtype=np.int64)
    before, after = begins[order[:-1]], begins[order[1:]]
    room = np.minimum((ends - begins)[order[:-1]], (ends - begins)[order[1:]])
    pairs = np.arange(len(order) - 1)  # alike so far
    for position in range(int(room.max(initial=0))):
        pairs = pairs[room[pairs] > position]
        pairs = pairs[flat[before[pairs] + position] == flat[after[pairs] + position]]
        if not len(pairs):
            break
        shared[pairs + 1] += 1
    return shared


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    shortest = min(len(a), len(b))
    differs = a[:shortest] != b[:shortest]
    first = int(differs.argmax())
    return first if differs[first] else shortest
