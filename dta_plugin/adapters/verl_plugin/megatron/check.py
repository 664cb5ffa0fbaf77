"""A mini-batch by verl's own path and as trees, forward only: log-probs have to agree within what rounding explains.

That is measured on the same rows, as everywhere in the plugin (execution/probing/rounding_noise.py): verl's own path
runs once more with embeddings that are moved by half a rounding step. It works for every way to share a model among
ranks, since all of it is forward passes as verl makes them. Gradients are not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import distributed
from verl.utils import tensordict_utils as tu
from verl.utils.megatron_utils import unwrap_model

from dta_plugin.adapters.verl_plugin.jagged import JaggedRows, clear_weights
from dta_plugin.adapters.verl_plugin.micro_batches import agreed, clear_plan
from dta_plugin.execution.probing.forest import forest_rows
from dta_plugin.execution.probing.rounding_noise import Gap, half_steps, logprob_floor

# Of the longest row of a probe: tokens, at least and at most, and those beyond the attention window.
_SHORTEST, _LONGEST, _BEYOND = 32, 320, 16
# How often to look at what rounding does; where it reroutes tokens to other experts, each look finds others.
_LOOKS, _LOOKS_AT_EXPERTS = 2, 4

# A forward pass over a mini-batch; log-probs [S, len], jagged, or None on ranks that have none.
Pass = Callable[[TensorDict], torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Log-probs of a mini-batch, tree against verl's own path, in nats. noise: what rounding explains of the gap."""

    gap: Gap
    noise: Gap
    floor: float

    @property
    def is_given(self) -> bool:
        return self.gap.is_within(self.noise, self.floor)

    def __str__(self) -> str:
        return (
            f"{self.gap.mean:.1e} nats on average and {self.gap.most:.1e} at most, where rounding explains "
            f"{self.noise.mean:.1e} and {self.noise.most:.1e}"
        )


def agreement(own: Pass, tree: Pass, data: TensorDict, chunks: Sequence[Any], config: Any) -> Agreement:
    """How far trees are from verl's own path, of all ranks that have log-probs the worst; all of them must call it.

    chunks: of the model, as verl has them. config: Megatron's TransformerConfig.
    """
    routed, unit = bool(config.num_moe_experts), _rounding_unit(config)
    longest = max(agreed(int(data["input_ids"].offsets().diff().max()), distributed.group.WORLD))
    expected, found = own(_plain(data, longest)), tree(_plain(data, longest))
    noises = []
    for seed in range(_LOOKS_AT_EXPERTS if routed else _LOOKS):
        with _moved(chunks, unit, seed):
            moved = own(_plain(data, longest))
        if expected is not None and moved is not None:
            noises.append(Gap.from_differences(_read(data, moved) - _read(data, expected), routed))
    mine = None
    if expected is not None and found is not None:
        values = _read(data, expected)
        gap = Gap.from_differences(_read(data, found) - values, routed)
        mine = Agreement(gap, Gap.largest(noises), logprob_floor(values, unit))
    ranks = [rank for rank in agreed(mine, distributed.group.WORLD) if rank is not None]
    return min(ranks, key=lambda rank: (rank.is_given, -rank.gap.most))


def probe_data(config: Any, vocabulary: int, device: torch.device, multiple: int = 1) -> TensorDict:
    """A small mini-batch with forks at several depths, branches of one token and an end inside the tree.

    multiple: of which a pipeline's number of micro-batches has to be one; there are as many rows, repeated if need be.
    """
    window = config.window_size[0] + _BEYOND if config.window_size else 0
    rows = forest_rows(min(_LONGEST, max(_SHORTEST, window)), np.arange(vocabulary))
    rows *= -(-multiple // len(rows))
    ids = [torch.tensor(row, device=device) for row in rows]
    tensors = {
        "input_ids": _jagged(ids),
        "position_ids": _jagged([torch.arange(len(row), device=device) for row in ids]),
        "loss_mask": _jagged([torch.arange(len(row), device=device).clamp(max=1) for row in ids]),
    }
    data = TensorDict(tensors, batch_size=[len(rows)])
    total = sum(map(len, rows))
    tu.assign_non_tensor(data, temperature=1.0, use_dynamic_bsz=True, max_token_len_per_gpu=total)
    return data


def _plain(data: TensorDict, longest: int) -> TensorDict:
    """A copy for a forward pass over all of its tokens, which verl may cut as it does. longest: row, of all ranks."""
    plain = data.copy()
    clear_plan(plain)
    clear_weights(plain)
    tu.assign_non_tensor(plain, calculate_entropy=False)
    budget = tu.get_non_tensor_data(data, "max_token_len_per_gpu", None)
    if budget is not None:  # verl's own path wants it to hold the longest row, and to be the same on all ranks
        tu.assign_non_tensor(plain, max_token_len_per_gpu=max(int(budget), longest))
    return plain


def _read(data: TensorDict, log_probs: Any) -> torch.Tensor:
    """Of log-probs [S, len], jagged, those that belong to tokens that are scored, flat."""
    masks = JaggedRows.whole(data).runs.scored_masks()
    mask = np.concatenate([np.append(row[1:], False) for row in masks])
    return log_probs.values()[torch.from_numpy(mask).to(log_probs.device)].float()


@contextmanager
def _moved(chunks: Sequence[Any], unit: float, seed: int) -> Iterator[None]:
    stages = [stage for stage in map(unwrap_model, chunks) if stage.pre_process]
    handles = [stage.embedding.register_forward_hook(half_steps(unit, seed)) for stage in stages]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounding_unit(config: Any) -> float:
    return max(torch.finfo(config.params_dtype).eps, torch.finfo(torch.float32).eps)


def _jagged(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)
