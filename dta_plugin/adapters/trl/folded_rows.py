"""The rows of TRL's AsyncGRPO, which TRL has folded into trees for a kernel of its own, through this package's trees.

TRL lays a row's trie out as segments, and has each segment attend to its path by FlashAttention-3. `FoldedRow` reads
the samples back from the paths, and gives values of their tokens back at the places where TRL's loss looks for them.
TRL's trie forks one token early, so that a place has one next token; ours does not: two of TRL's may be one of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dta_plugin.errors import UnsupportedError
from dta_plugin.tree.trie import PrefixTree

# What a call of the model has for a row; the numbers are those of `flash_attn_varlen_func`.
_ROW = ("input_ids", "position_ids", "shift_labels", "tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")
_ALL = {*_ROW, "tree_max_seqlen_q", "tree_max_seqlen_k", "fused_lm_head", "output_router_logits"}


@dataclass(frozen=True, slots=True, eq=False)
class FoldedRow:
    """One row of N places. sequences: its distinct samples, int64 token ids each.

    masks: per sequence, bool over its tokens, which of them are trained, here or in a sample that shares them.
    paths: per sequence, the places of its tokens in the row.
    """

    sequences: list[np.ndarray]
    masks: list[np.ndarray]
    paths: list[np.ndarray]
    places: int

    @classmethod
    def from_call(cls, call: Mapping[str, object]) -> FoldedRow:
        """The row of a call of the model by TRL. Raises UnsupportedError for a call of another kind."""
        missing, unknown = set(_ROW) - call.keys(), {name for name, value in call.items() if value is not None} - _ALL
        faults = [f"without {name}" for name in sorted(missing)] + [f"with {name}" for name in sorted(unknown)]
        if faults:
            raise UnsupportedError(
                f"AsyncGRPO calls the model {', '.join(faults)}. Expected a row as TRL 1.16 makes it, of text."
            )
        ids, _, labels, keys, starts, key_starts = (_on_host(call[name]) for name in _ROW)
        lengths = np.diff(starts)
        segment_of_place = np.repeat(np.arange(len(lengths)), lengths)
        paths = np.split(keys, key_starts[1:-1])
        is_leaf = np.ones(len(paths), dtype=bool)
        for path, length in zip(paths, lengths, strict=True):
            if len(path) > length:
                is_leaf[segment_of_place[path[-length - 1]]] = False
        leaves = [path for path, ends in zip(paths, is_leaf, strict=True) if ends]
        masks = [np.append(False, labels[path[:-1]] != -100) for path in leaves]
        return cls([ids[path] for path in leaves], masks, leaves, len(ids))

    def at_places(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Values of tokens 1.. of each sequence -> [1, N], each at the place before its token; 0 after the last.

        Values of a token that sequences share are the same one, and its gradient is theirs together.
        """
        flat = torch.cat([*values, values[0].new_zeros(1)])
        source = np.full(self.places, len(flat) - 1)
        start = 0
        for path in self.paths:
            source[path[:-1]] = np.arange(start, start + len(path) - 1)
            start += len(path) - 1
        return flat[torch.from_numpy(source).to(flat.device)][None]

    def places_of_tokens(self, tree: PrefixTree) -> np.ndarray:
        """int64 [T]: how many places of the row each token of the sequences' tree has."""
        token = np.empty(self.places, dtype=np.int64)
        for sequence, path in enumerate(self.paths):
            token[path] = tree.path(sequence)
        return np.bincount(token, minlength=tree.tree_tokens)


def _on_host(value: object) -> np.ndarray:
    assert isinstance(value, torch.Tensor)
    return value.detach().reshape(-1).cpu().numpy().astype(np.int64)
