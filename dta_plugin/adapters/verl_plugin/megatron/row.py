"""A micro-batch as one packed row of a prefix tree, and what of it travels through Megatron's model to every layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from dta_plugin.adapters.verl_plugin.jagged import JaggedRows
from dta_plugin.attention import TreeMask
from dta_plugin.tree.layout import ScoredEdges
from dta_plugin.tree.trie import PrefixTree
from dta_plugin.upload import upload


@dataclass
class TreePackedSeqParams(PackedSeqParams):
    """The layout of one micro-batch. Megatron hands it to every layer, and recomputation keeps it in its closures.

    So pipeline stages may have several micro-batches in flight. To Megatron it is one packed sequence of T tokens.
    mask: who sees whom. depth: int64 [T] position of each token. rows: int64 [R] hidden states that the head reads.
    """

    mask: TreeMask = field(kw_only=True)
    depth: torch.Tensor = field(kw_only=True)
    rows: torch.Tensor = field(kw_only=True)


@dataclass(frozen=True, slots=True, eq=False)
class TreeRow:
    """input_ids: int64 [1, T], padded behind the tree's tokens. targets: int64 [E] token ids of scored edges."""

    tree: PrefixTree
    edges: ScoredEdges
    input_ids: torch.Tensor
    targets: torch.Tensor
    params: TreePackedSeqParams

    @classmethod
    def from_rows(cls, rows: JaggedRows, backend: str, multiple: int, device: torch.device) -> TreeRow:
        """The tree of what of `rows` is to run. multiple: of which T has to be one; padding sees itself alone."""
        runs = rows.runs
        temperatures = rows.temperature if isinstance(rows.temperature, list) else None
        tree = PrefixTree.from_sequences(runs.sequences)
        edges = ScoredEdges.from_tree(tree, runs.scored, device, temperatures)
        size, pad = tree.tree_tokens, -tree.tree_tokens % multiple
        exits = np.concatenate([tree.exit, np.arange(size, size + pad) + 1])
        depths, ids = (np.concatenate([values, np.zeros(pad, np.int64)]) for values in (tree.depth, tree.tokens))
        input_ids, depth, exit = upload([ids, depths, exits], device)
        ends = torch.tensor([0, size + pad], dtype=torch.int32, device=device)
        longest = int(depths.max()) + 1
        params = TreePackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            cu_seqlens_q_padded=ends,
            cu_seqlens_kv_padded=ends,
            max_seqlen_q=longest,  # of rotary tables, which are gathered by depth
            max_seqlen_kv=longest,
            mask=TreeMask(exit, depth, backend, (exits, depths)),
            depth=depth,
            rows=edges.rows,
        )
        return cls(tree, edges, input_ids[None], input_ids[edges.target], params)
