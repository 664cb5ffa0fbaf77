"""verl's micro-batches, TensorDicts of jagged nested tensors, as sequences; and log-probs back in verl's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from dta_plugin.tree.layout import Scored

# verl divides by no less.
_LEAST_TEMPERATURE = 1e-8


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of a mini-batch or micro-batch. N = tokens of all sequences, S = sequences.

    sequences: int64 token ids. scored: what a loss reads. temperature: of all, or per sequence where they differ.
    """

    sequences: list[np.ndarray]
    scored: Scored | None
    temperature: float | list[float]
    offsets: torch.Tensor  # int64 [S + 1], on the batch's device

    @classmethod
    def of(cls, data: TensorDict) -> Rows:
        ids: Any = data["input_ids"]
        sequences = _split(ids)
        return cls(sequences, _scored(data, sequences), _temperature(data), ids.offsets())

    def nested(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Values of tokens 1.., [len - 1] per sequence -> verl's jagged [S, len]: entry t belongs to token t + 1."""
        nothing = values[0].new_zeros(1)
        flat = torch.cat([part for value in values for part in (value, nothing)])
        return torch.nested.nested_tensor_from_jagged(flat, self.offsets)


def token_rows(data: TensorDict) -> list[np.ndarray]:
    """The token ids of each row, int64."""
    return _split(data["input_ids"])


def _split(nested: Any) -> list[np.ndarray]:
    values, offsets = nested.values().cpu().numpy(), nested.offsets().cpu().numpy()
    return np.split(values, offsets[1:-1])


def _scored(data: TensorDict, sequences: list[np.ndarray]) -> Scored | None:
    """RL batches say where responses begin; SFT batches have a mask over all tokens."""
    if "prompts" in data:
        return [max(1, int(length)) for length in _prompt_lengths(data).tolist()]
    mask: Any = data.get("loss_mask", None)
    if mask is not None and mask.is_nested:
        masks = _split(mask)
        if all(len(row) == len(sequence) for row, sequence in zip(masks, sequences, strict=True)):
            return [row.astype(bool) for row in masks]
    return None


def _prompt_lengths(data: TensorDict) -> torch.Tensor:
    """int64 [S]. The trainer of `trainer.use_v1=False` keeps prompts padded."""
    prompts: Any = data["prompts"]
    if prompts.is_nested:
        return prompts.offsets().diff()
    return data["attention_mask"][:, : prompts.shape[1]].sum(dim=1)


def _temperature(data: TensorDict) -> float | list[float]:
    found: Any = data["temperature"]
    if not isinstance(found, torch.Tensor):
        return max(float(found), _LEAST_TEMPERATURE)
    values = found.to(torch.float32).clamp(min=_LEAST_TEMPERATURE).flatten().tolist()
    return values[0] if len(set(values)) == 1 else values
