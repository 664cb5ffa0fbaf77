"""Logits of scored rows, whose vocabulary tensor-parallel ranks share, into log-probs and entropies of sequences.

Both are computed by verl's own functions, and go back in verl's layout.
"""

from __future__ import annotations

from typing import Any

import torch
from verl.utils.megatron.tensor_parallel import (
    vocab_parallel_entropy,
    vocab_parallel_entropy_with_chunking,
    vocab_parallel_log_probs_from_logits,
)

from dta_plugin.adapters.verl_plugin.jagged import JaggedRows
from dta_plugin.adapters.verl_plugin.megatron.row import TreeRow


def model_output(
    logits: torch.Tensor, row: TreeRow, rows: JaggedRows, entropy_chunk: int | None, wants_entropy: bool
) -> dict[str, torch.Tensor]:
    """What verl's losses read, jagged [S, len]: 0, or old log-probs, where none does.

    logits: [1, R, V / ranks], changed in place. entropy_chunk: rows at once, None for all.
    """
    edges = row.edges
    logits = logits / _temperatures(row, rows, logits)
    chosen = logits[0].index_select(0, edges.row_of_edge)  # a copy: what follows works in place
    output: dict[str, Any] = {}
    if wants_entropy:
        entropies = _entropies(logits, entropy_chunk)[0]
        output["entropy"] = rows.nested(edges.per_sequence(entropies.index_select(0, edges.row_of_edge)))
    log_probs = vocab_parallel_log_probs_from_logits(chosen, row.targets)
    return {"log_probs": rows.log_probs(edges.per_sequence(log_probs))} | output


def _temperatures(row: TreeRow, rows: JaggedRows, logits: torch.Tensor) -> torch.Tensor | float:
    """One for all, or [R, 1]."""
    if row.edges.temperature is not None:
        return row.edges.temperature.to(logits.dtype)[:, None]
    assert isinstance(rows.temperature, float)
    return rows.temperature


def _entropies(logits: torch.Tensor, chunk: int | None) -> torch.Tensor:
    """[1, R]"""
    if chunk is None:
        return vocab_parallel_entropy(logits)
    return vocab_parallel_entropy_with_chunking(logits, chunk_size=chunk)
