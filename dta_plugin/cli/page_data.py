"""What the page of `dta inspect --html` is told of a file: groups, their trees, texts, forks and rewards, as columns.

A node of the page is a stretch of tokens that the same sequences pass through. The largest nodes are kept, by tokens of
their subtrees, so that a kept node's parent is kept, too; of long texts the middle is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from dta_plugin.cli.inspection import GroupSharing, Inspection
from dta_plugin.cli.rollouts import TokenizedSequence
from dta_plugin.cli.terminal import progress
from dta_plugin.tree.divergence import Decoder, Fork, rank_forks
from dta_plugin.tree.stretches import Stretches

_SEQUENCES = 100_000  # of the groups that are shown
_FORKS = 20  # listed per group
_SEARCHED = 1 << 24  # tokens of trees in which forks are looked for
_OPENING = 48  # tokens that tell a group from the others in the list
_TAIL = 4  # a quarter of a cut text is its end


@dataclass(frozen=True, slots=True)
class Limits:
    """nodes: kept of all trees together. tokens: of text, of all nodes together."""

    nodes: int
    tokens: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What the limits leave out.

    groups: that are not shown. nodes: of the others. tokens: whose text is not there. unsearched: groups whose forks
    were not looked for.
    """

    groups: int
    nodes: int
    tokens: int
    unsearched: int


@dataclass(frozen=True, slots=True, eq=False)
class _GroupTree:
    """A group's stretches and forks. tokens: ids of its tree."""

    group: GroupSharing
    stretches: Stretches
    tokens: np.ndarray
    forks: list[list[Any]] | None


def page_data(
    found: Inspection,
    sequences: Sequence[TokenizedSequence],
    decoder: Decoder | None,
    run_length: int,
    limits: Limits,
    only: str | None = None,
) -> tuple[dict[str, Any], LeftOut]:
    """(what the page shows, ready for JSON; what it leaves out). only: the one group to show; None: all."""
    asked = [number for number, group in enumerate(found.groups) if only is None or group.name == only]
    numbers = _first(
        [(number, found.groups[number].sharing.sequences) for number in _by_saving(found, asked)], _SEQUENCES
    )
    trees = _trees(found, numbers, decoder, run_length)
    kept = _kept([tree.stretches for tree in trees], limits.nodes)
    lengths = np.concatenate([tree.stretches.tokens[own] for tree, own in zip(trees, kept, strict=True)])
    most = _most_tokens(lengths, limits.tokens)
    left_out = LeftOut(
        groups=len(asked) - len(numbers),
        nodes=sum(len(tree.stretches) for tree in trees) - len(lengths),
        tokens=int(np.maximum(lengths - most, 0).sum()),
        unsearched=sum(tree.forks is None for tree in trees),
    )
    together = zip(trees, kept, strict=True)
    groups = [_group(tree, own, sequences, decoder, most) for tree, own in progress(together, "groups written")]
    firsts = [sequences[tree.group.rows[0]].tokens for tree in trees]
    is_small = sum(map(len, firsts)) <= _SEARCHED
    parting = _parting(firsts) if is_small else [found.common] * len(firsts)
    for group, tokens, at in zip(groups, firsts, parting, strict=True):
        start = max(at - run_length // 4, 0)
        group["opening"] = _decoded(tokens[start : start + min(_OPENING, most)], decoder)
    return {"groups": groups, "has_text": decoder is not None}, left_out


def _trees(found: Inspection, numbers: list[int], decoder: Decoder | None, run_length: int) -> list[_GroupTree]:
    """The trees of these groups. Forks are looked for in those that save most, up to a number of tokens."""
    sizes = [(number, found.groups[number].sharing.tree_tokens) for number in _by_saving(found, numbers)]
    searched = set(_first(sizes, _SEARCHED))
    trees = []
    for number in progress(numbers, "groups merged"):
        tree = found.merged(number)
        stretches = Stretches.from_tree(tree)
        forks = None
        if number in searched:
            ranked = rank_forks(tree, _FORKS, run_length)
            places = np.searchsorted(stretches.starts, [fork.fork for fork in ranked], side="right") - 1
            described = [fork.describe(tree, decoder, run_length) for fork in ranked]
            forks = [_fork(*item) for item in zip(places.tolist(), described, strict=True)]
        trees.append(_GroupTree(found.groups[number], stretches, tree.tokens, forks))
    return trees


def _fork(node: int, fork: Fork) -> list[Any]:
    repeat = fork.longest_repeat
    found = [node, fork.repeated, fork.apart, fork.cause]
    return found if repeat is None else [*found, repeat.tokens, repeat.after, repeat.text]


def _by_saving(found: Inspection, numbers: list[int]) -> list[int]:
    """Those that save most tokens first."""
    sharing = [group.sharing for group in found.groups]
    return sorted(numbers, key=lambda number: sharing[number].tree_tokens - sharing[number].flat_tokens)


def _first(sizes: list[tuple[int, int]], limit: int) -> list[int]:
    """As many of (number, size), at least one, as come to no more than the limit; in the order of their numbers."""
    numbers: list[int] = []
    total = 0
    for number, size in sizes:
        total += size
        if total > limit and numbers:
            break
        numbers.append(number)
    return sorted(numbers)


def _kept(trees: list[Stretches], limit: int) -> list[np.ndarray]:
    """Of each tree the nodes that are kept, in depth-first order; a parent's subtree is larger than its children's."""
    subtrees = np.concatenate([tree.subtree for tree in trees])
    is_kept = np.zeros(len(subtrees), dtype=bool)
    is_kept[np.argsort(-subtrees, kind="stable")[:limit]] = True
    stops = np.cumsum([len(tree) for tree in trees])
    return [np.flatnonzero(part) for part in np.split(is_kept, stops[:-1])]


def _most_tokens(lengths: np.ndarray, limit: int) -> int:
    """The largest number of tokens per node with which all nodes together have no more than the limit."""
    if lengths.sum() <= limit:
        return int(lengths.max(initial=0))
    ordered = np.sort(lengths)
    behind = len(ordered) - np.arange(len(ordered))  # nodes at least as long as each
    room = (limit - (np.cumsum(ordered) - ordered)) // behind
    return max(int(room[np.argmax(room < ordered)]), 0)


def _group(
    tree: _GroupTree, kept: np.ndarray, sequences: Sequence[TokenizedSequence], decoder: Decoder | None, most: int
) -> dict[str, Any]:
    """One group, its nodes in depth-first order; numbers of nodes are places in its own columns, -1 if left out."""
    stretches, sharing = tree.stretches, tree.group.sharing
    place = np.full(len(stretches) + 1, -1, dtype=np.int64)  # the last is that of -1
    place[kept] = np.arange(len(kept))
    starts, lengths = stretches.starts[kept].tolist(), stretches.tokens[kept].tolist()
    rows = [sequences[row] for row in tree.group.rows]
    return {
        "name": tree.group.name,
        "flat": sharing.flat_tokens,
        "tree": sharing.tree_tokens,
        "dense": sharing.dense_flops,
        "cheap": sharing.tree_flops,
        "parent": place[stretches.parent[kept]].tolist(),
        "tokens": lengths,
        "through": stretches.sequences[kept].tolist(),
        "first": tree.tokens[stretches.starts[kept]].tolist(),
        "below": _left_out_below(stretches, kept, place),
        "text": [_text(tree.tokens[a : a + n], decoder, most) for a, n in zip(starts, lengths, strict=True)],
        "ends": place[stretches.ends].tolist(),
        "reward": [row.reward for row in rows],
        "where": [row.where.rpartition("/")[2] for row in rows],
        "forks": None if tree.forks is None else _placed(tree.forks, place),
    }


def _parting(sequences: list[np.ndarray]) -> list[int]:
    """How many tokens each has in common with the one most like it: in order, that is one of its neighbours."""
    order = sorted(range(len(sequences)), key=lambda number: sequences[number].astype(">i8").tobytes())
    found = [0] * len(sequences)
    for one, other in pairwise(order):
        length = min(len(sequences[one]), len(sequences[other]))
        differs = sequences[one][:length] != sequences[other][:length]
        common = int(differs.argmax()) if differs.any() else length
        found[one], found[other] = max(found[one], common), common
    return found


def _placed(forks: list[list[Any]], place: np.ndarray) -> list[list[Any]]:
    """The forks behind nodes that are kept, and those of roots."""
    return [[int(place[node]), *rest] for node, *rest in forks if node < 0 or place[node] >= 0]


def _left_out_below(stretches: Stretches, kept: np.ndarray, place: np.ndarray) -> dict[int, list[int]]:
    """Node -> [children, tokens] that are left out right below it, and below these; -1 for roots."""
    parents = place[stretches.parent]
    missing = np.setdiff1d(np.arange(len(stretches)), kept, assume_unique=True)
    missing = missing[(parents[missing] >= 0) | (stretches.parent[missing] < 0)]
    found: dict[int, list[int]] = {}
    for parent, tokens in zip(parents[missing].tolist(), stretches.subtree[missing].tolist(), strict=True):
        counts = found.setdefault(parent, [0, 0])
        counts[0] += 1
        counts[1] += tokens
    return found


def _text(tokens: np.ndarray, decoder: Decoder | None, most: int) -> str | list[Any]:
    """The text of a node, or [its beginning, tokens left out, its end]."""
    if len(tokens) <= most:
        return _decoded(tokens, decoder)
    tail = most // _TAIL
    return [
        _decoded(tokens[: most - tail], decoder),
        len(tokens) - most,
        _decoded(tokens[len(tokens) - tail :], decoder),
    ]


def _decoded(tokens: np.ndarray, decoder: Decoder | None) -> str:
    if not len(tokens):
        return ""
    return " ".join(map(str, tokens.tolist())) if decoder is None else decoder.decode(tokens.tolist())
