"""Cut a batch of sequences into consecutive trees of bounded size, along the sorted order."""

from __future__ import annotations

import numpy as np

from dta_plugin.tree.trie import PrefixTree


def split_by_tokens(tree: PrefixTree, budget: int) -> list[np.ndarray]:
    """Groups of sequence indices whose trees have at most `budget` tokens each; a longer sequence stands alone.

    Neighbours in sorted order share most, so cutting there repeats the fewest prefix tokens.
    """
    groups: list[list[int]] = []
    used = budget + 1
    previous = None
    for s in tree.order:
        path = tree.path(s)
        new = len(path) if previous is None else len(path) - _shared(previous, path)
        if used + new > budget:
            groups.append([])
            used, new = 0, len(path)
        groups[-1].append(int(s))
        used += new
        previous = path
    return [np.array(group) for group in groups]


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning of two paths; paths that part never meet again."""
    shortest = min(len(a), len(b))
    return int((a[:shortest] == b[:shortest]).sum())
