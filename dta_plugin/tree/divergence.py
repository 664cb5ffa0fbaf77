"""Where the sequences of a tree part ways, and how much sharing that cost.

A fork is harmless when the policy simply said something else, and expensive when the same text follows on both sides:
a timestamp in the system prompt, a `<think>` block that the next turn drops, a turn that was tokenised differently.
What tells them apart is repetition. `find_forks` orders forks by the tokens after them that occur again, in runs, in a
larger branch of the same fork: what merging there would have saved. With a tokenizer it also shows the text.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.fingerprints import Fingerprints, repeated_ids
from dta_plugin.tree.trie import PrefixTree

_SHOWN_TOKENS = 64  # decoded on either side of a fork
_SAME_TEXT = 16  # characters that two branches must begin with to be called the same text


class Decoder(Protocol):
    """Whatever turns token ids into text; every Hugging Face tokenizer does."""

    def decode(self, token_ids: list[int], /) -> str: ...


@dataclass(frozen=True, slots=True)
class Branch:
    """One way on from a fork.

    sequences: how many go this way. tree_tokens: tokens of the subtree. flat_tokens: the same, once per sequence.
    opening: up to 64 token ids with which its first sequence goes on. text: them decoded, None without a tokenizer.
    """

    sequences: int
    tree_tokens: int
    flat_tokens: int
    opening: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Repeat:
    """A run that the second branch of a fork has in common with the largest: `tokens` of them, `after` the fork.

    text: its beginning decoded, None without a tokenizer.
    """

    after: int
    tokens: int
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Fork:
    """A place where sequences part.

    depth: tokens in common before it, so the branches differ at position `depth`; 0 where trees share nothing.
    sequences: how many come through; `ended` of them end right here. branches: largest subtree first.
    apart: tokens outside the largest branch, the most that merging could save.
    repeated: those of them that a larger branch has too, in runs: what merging would have saved.
    longest_repeat: the longest such run on the second branch's longest sequence, None if it has none.
    cause: a likely reason in words, None where the branches simply differ.
    context: text before the fork, None without a tokenizer.
    """

    depth: int
    sequences: int
    ended: int
    branches: tuple[Branch, ...]
    apart: int
    repeated: int
    longest_repeat: Repeat | None = None
    cause: str | None = None
    context: str | None = None


def first_fork_depth(tree: PrefixTree) -> int | None:
    """Tokens before the first place where sequences part; None if none do. Ending early is not parting."""
    depths = [_common_tokens(tree, fork) for fork in _branches_of_forks(tree)]
    return min(depths, default=None)


def find_forks(
    tree: PrefixTree, tokenizer: Decoder | None = None, limit: int | None = None, run_length: int = 16
) -> list[Fork]:
    """The forks of a tree, most expensive first: by repeated tokens, then by tokens apart, then by depth.

    limit: only the first so many. run_length: tokens in a row that count as a repetition, a power of two; about four
    words, so 16 for subwords and 64 for bytes.
    """
    ranked = rank_forks(tree, limit, run_length)
    return [candidate.describe(tree, tokenizer, run_length) for candidate in ranked]


def rank_forks(tree: PrefixTree, limit: int | None = None, run_length: int = 16) -> list[ForkCandidate]:
    """What `find_forks` finds, in its order, not yet described."""
    if limit is not None and limit < 1:
        raise InvalidInputError(f"limit={limit}. Expected None or at least 1.")
    fingerprints = Fingerprints.from_tree(tree, run_length)
    candidates = [ForkCandidate.from_fork(tree, fork, starts) for fork, starts in _branches_of_forks(tree).items()]
    candidates.sort(key=lambda candidate: -candidate.apart)
    first = min((candidate.depth for candidate in candidates), default=0)
    repeated = repeated_ids(fingerprints.ids, tree.depth, first + run_length - 1)
    best: list[int] = []  # heap of the `limit` highest repeated counts so far
    for candidate in candidates:
        if limit is not None and len(best) == limit and candidate.apart < best[0]:
            break  # `apart` bounds `repeated` from above: nothing later can make the list
        candidate.compare(tree, fingerprints, repeated)
        heapq.heappush(best, candidate.repeated)
        if limit is not None and len(best) > limit:
            heapq.heappop(best)
    candidates.sort(key=lambda candidate: (-candidate.repeated, -candidate.apart, candidate.depth))
    return candidates[:limit]


def _branches_of_forks(tree: PrefixTree) -> dict[int, np.ndarray]:
    """Fork -> layout index of each branch's first token. Fork: layout index of the last common token, -1 for roots."""
    starts = tree.node_start[:-1]
    parents = tree.parent[starts]
    order = np.argsort(parents, kind="stable")
    forks, first = np.unique(parents[order], return_index=True)
    branches = np.split(starts[order], first[1:])
    return {int(fork): rows for fork, rows in zip(forks, branches, strict=True) if len(rows) > 1}


def _common_tokens(tree: PrefixTree, fork: int) -> int:
    return 0 if fork < 0 else int(tree.depth[fork]) + 1


@dataclass(slots=True)
class ForkCandidate:
    """A fork on its way to a `Fork`. starts: first layout index of each branch, largest branch first."""

    fork: int
    depth: int
    starts: np.ndarray
    sizes: np.ndarray
    apart: int
    repeated: int = 0
    covered: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))

    @classmethod
    def from_fork(cls, tree: PrefixTree, fork: int, starts: np.ndarray) -> ForkCandidate:
        sizes = tree.exit[starts] - starts
        order = np.argsort(-sizes, kind="stable")
        return cls(fork, _common_tokens(tree, fork), starts[order], sizes[order], int(sizes.sum() - sizes.max()))

    def compare(self, tree: PrefixTree, fingerprints: Fingerprints, repeated: np.ndarray) -> None:
        """Find the tokens of every branch that occur, in runs, in a larger one.

        repeated: the tokens of the tree at which a run ends that occurs twice, in order.
        """
        if self.apart < fingerprints.length:
            return
        start = int(self.starts.min())
        stop = start + int(self.sizes.sum())
        tokens = repeated[slice(*np.searchsorted(repeated, [start, stop]))]
        tokens = tokens[tree.depth[tokens] >= self.depth + fingerprints.length - 1]  # the run lies behind the fork
        if not len(tokens):
            return
        by_place = np.argsort(self.starts)
        rank = by_place[np.searchsorted(self.starts[by_place], tokens, side="right") - 1]
        _, group = np.unique(fingerprints.ids[tokens], return_inverse=True)
        smallest = np.full(len(tokens), len(self.starts), dtype=np.int64)
        np.minimum.at(smallest, group, rank)
        self.covered = fingerprints.covered(tokens[smallest[group] < rank], start, stop)
        self.repeated = int(self.covered.sum())

    def describe(self, tree: PrefixTree, tokenizer: Decoder | None, run_length: int) -> Fork:
        branches = tuple(_described_branch(tree, int(start), tokenizer) for start in self.starts)
        through = tree.num_sequences if self.fork < 0 else int(tree.multiplicity[self.fork])
        repeats = self._repeats(tree, tokenizer)
        return Fork(
            depth=self.depth,
            sequences=through,
            ended=through - sum(branch.sequences for branch in branches),
            branches=branches,
            apart=self.apart,
            repeated=self.repeated,
            longest_repeat=max(repeats, key=lambda repeat: repeat.tokens, default=None),
            cause=_cause(branches, repeats, run_length),
            context=_decode(tokenizer, _tokens_before(tree, self.fork)),
        )

    def _repeats(self, tree: PrefixTree, tokenizer: Decoder | None) -> list[Repeat]:
        """Runs on the longest sequence of the second branch that the largest branch has too, in order."""
        if not self.repeated:
            return []
        start, size = int(self.starts[1]), int(self.sizes[1])
        deepest = start + int(tree.depth[start : start + size].argmax())
        path = start + np.flatnonzero(tree.exit[start : deepest + 1] > deepest)
        inside = np.concatenate([[False], self.covered[path - self.starts.min()], [False]])
        edges = np.flatnonzero(inside[1:] != inside[:-1]).reshape(-1, 2).tolist()
        return [
            Repeat(first, stop - first, _decode(tokenizer, tree.tokens[path[first : min(stop, first + _SHOWN_TOKENS)]]))
            for first, stop in edges
        ]


def _decode(tokenizer: Decoder | None, tokens: np.ndarray) -> str | None:
    return None if tokenizer is None else tokenizer.decode(tokens.tolist())


def _described_branch(tree: PrefixTree, start: int, tokenizer: Decoder | None) -> Branch:
    subtree = slice(start, int(tree.exit[start]))
    onward = slice(start + 1, start + _SHOWN_TOKENS)
    leaves = tree.parent[onward] != np.arange(start, start + len(tree.parent[onward]))
    opening = tree.tokens[start : start + 1 + (int(leaves.argmax()) if leaves.any() else len(leaves))]
    return Branch(
        sequences=int(tree.multiplicity[start]),
        tree_tokens=subtree.stop - start,
        flat_tokens=int(tree.multiplicity[subtree].sum()),
        opening=tuple(opening.tolist()),
        text=_decode(tokenizer, opening),
    )


def _tokens_before(tree: PrefixTree, fork: int) -> np.ndarray:
    """The last common tokens before a fork, in order."""
    path: list[int] = []
    while fork >= 0 and len(path) < _SHOWN_TOKENS:
        path.append(fork)
        fork = int(tree.parent[fork])
    return tree.tokens[path[::-1]]


def _cause(branches: Sequence[Branch], repeats: Sequence[Repeat], run_length: int) -> str | None:
    texts = [branch.text for branch in branches if branch.text is not None]
    if len(texts) > 1:
        first, second = texts[0], texts[1]
        alike = min(len(first), len(second))
        if alike >= _SAME_TEXT and first[:alike] == second[:alike]:
            return "the same text in other tokens: was a turn decoded and tokenised again?"
        thinking = [text.lstrip().startswith("<think>") for text in texts]
        if any(thinking) and not all(thinking):
            return "a <think> block in some branches only: is it removed from earlier turns?"
    if repeats and repeats[0].after <= run_length and repeats[0].tokens >= 4 * run_length:
        return "only a few tokens differ here: a date, an id or a counter in the prompt?"
    return None
