"""verl's micro-batches, TensorDicts of jagged nested tensors, as sequences; and log-probs back in verl's layout.

Where an update leaves tokens out (see `selection`), sequences here are shorter than verl's rows; what goes back is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from dta_plugin.tree.layout import Scored

WEIGHTS = "dta_weights"  # entry of a TensorDict, laid out as response_mask: a token runs if its weight is not 0
# verl divides by no less.
_LEAST_TEMPERATURE = 1e-8


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of a mini-batch or micro-batch. N = tokens of all rows, S = rows.

    sequences: int64 token ids that are to run. scored: what a loss reads of them. temperature: of all, or per row where
    they differ. begins: per row the length of its prompt; empty for SFT. ran, instead: where not all tokens are scored,
    bool [N] which are, and the log-probs [N] that stand in for others; entry t belongs to token t + 1.
    """

    sequences: list[np.ndarray]
    scored: Scored | None
    temperature: float | list[float]
    offsets: torch.Tensor  # int64 [S + 1], of all tokens, on the batch's device
    begins: list[int]
    ran: torch.Tensor | None = None
    instead: torch.Tensor | None = None

    @classmethod
    def of(cls, data: TensorDict) -> Rows:
        """What of `data` is to run: tokens up to the last one with a weight; of a row without any, its first token."""
        rows = cls.whole(data)
        if WEIGHTS not in data.keys():  # noqa: SIM118 (a TensorDict)
            return rows
        ran, instead = _in_rows(rows, padded(data[WEIGHTS]) > 0), _in_rows(rows, padded(data["old_log_probs"]))
        wanted = np.split(np.roll(ran.cpu().numpy(), 1), rows.offsets[1:-1].cpu().numpy())
        ends = [int(tokens.nonzero()[0].max(initial=0)) + 1 for tokens in wanted]
        return replace(
            rows,
            sequences=[sequence[:end] for sequence, end in zip(rows.sequences, ends, strict=True)],
            scored=[tokens[:end] for tokens, end in zip(wanted, ends, strict=True)],
            ran=ran,
            instead=instead,
        )

    @classmethod
    def whole(cls, data: TensorDict) -> Rows:
        """All of `data`."""
        ids: Any = data["input_ids"]
        sequences = _split(ids)
        begins = [max(1, int(length)) for length in _prompt_lengths(data).tolist()] if "prompts" in data else []
        return cls(sequences, begins or _scored(data, sequences), _temperature(data), ids.offsets(), begins)

    @property
    def left_out(self) -> int:
        """Tokens that do not run."""
        return int(self.offsets[-1]) - sum(map(len, self.sequences))

    def log_probs(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """As `nested`, for log-probs; of what was not scored, those it had."""
        if self.ran is None or self.instead is None:
            return self.nested(values)
        found = self._flat(values)
        return torch.nested.nested_tensor_from_jagged(
            torch.where(self.ran, found, self.instead.to(found)), self.offsets
        )

    def nested(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Values of tokens 1.. per sequence -> verl's jagged [S, len]: entry t belongs to token t + 1, 0 beyond."""
        return torch.nested.nested_tensor_from_jagged(self._flat(values), self.offsets)

    def _flat(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """[N]"""
        lengths = self.offsets.diff().tolist()
        nothing = [value.new_zeros(length - len(value)) for value, length in zip(values, lengths, strict=True)]
        return torch.cat([part for parts in zip(values, nothing, strict=True) for part in parts])


def token_rows(data: TensorDict) -> list[np.ndarray]:
    """The token ids of each row, int64."""
    return _split(data["input_ids"])


def padded(values: Any) -> torch.Tensor:
    """A response-shaped entry as [S, C], padded with 0 as verl's losses see it."""
    return values.to_padded_tensor(0) if values.is_nested else values


def _split(nested: Any) -> list[np.ndarray]:
    values, offsets = nested.values().cpu().numpy(), nested.offsets().cpu().numpy()
    return np.split(values, offsets[1:-1])


def _in_rows(rows: Rows, values: torch.Tensor) -> torch.Tensor:
    """Values of responses [S, C] -> [N], of whole rows: entry t belongs to token t + 1, 0 in prompts."""
    begins = torch.tensor(rows.begins, device=values.device)
    columns = torch.arange(values.shape[1], device=values.device)
    real = columns < (rows.offsets.diff() - begins)[:, None]
    places = (rows.offsets[:-1] + begins - 1)[:, None] + columns
    flat = values.new_zeros(int(rows.offsets[-1]))
    flat[places[real]] = values[real]
    return flat


def _scored(data: TensorDict, sequences: list[np.ndarray]) -> Scored | None:
    """SFT batches have a mask over all tokens."""
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
