"""verl's micro-batches, TensorDicts of jagged nested tensors, as sequences; and log-probs back in verl's layout.

Where an update leaves tokens out (see `tokens`), sequences here are shorter than verl's rows; what goes back is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from transformers import PreTrainedModel

from dta_plugin.adapters.verl_plugin.images import row_images
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.models.vision.units import ImageInputs
from dta_plugin.training.batch import RowBatch
from dta_plugin.training.image_rows import ImageRows

WEIGHTS = "dta_weights"  # entry of a TensorDict, laid out as response_mask: a token runs if its weight is not 0
# verl divides by no less.
_LEAST_TEMPERATURE = 1e-8


@dataclass(frozen=True, slots=True, eq=False)
class JaggedRows:
    """The rows of a mini-batch or micro-batch. N = tokens of all rows, S = rows.

    runs: what of them is to run. images: per row, those of the tokens that run, None where no row has any. temperature:
    of all, or per row where they differ. read, old_log_probs: where not all tokens are scored, bool [N] which are, and
    the log-probs [N] of the others; entry t belongs to token t + 1.
    """

    runs: RowBatch
    temperature: float | list[float]
    offsets: torch.Tensor  # int64 [S + 1], of all tokens, on the batch's device
    images: list[ImageInputs | None] | None = None
    read: torch.Tensor | None = None
    old_log_probs: torch.Tensor | None = None

    @classmethod
    def from_data(cls, data: TensorDict, model: PreTrainedModel | None) -> JaggedRows:
        """What of `data` is to run: tokens up to the last one with a weight; of a row without any, its first token.

        An image that the last token is in runs whole. model: the causal LM, which says which tokens are of which image;
        None for text.
        """
        whole = cls.whole(data)
        if WEIGHTS not in data.keys():  # noqa: SIM118 (a TensorDict)
            return whole
        read, old = whole.from_responses(padded(data[WEIGHTS]) > 0), whole.from_responses(padded(data["old_log_probs"]))
        masks = np.split(np.roll(read.cpu().numpy(), 1), whole.offsets[1:-1].cpu().numpy())
        runs, images = whole.runs.up_to_last_read(masks), whole.images
        if images is not None:
            assert model is not None
            sequences = whole.runs.sequences
            in_rows = ImageRows.of_whole(model, sequences, images)
            ends, images = in_rows.up_to(sequences, list(map(len, runs.sequences)))
            runs = whole.runs.up_to(ends, masks)
        return replace(whole, runs=runs, images=images, read=read, old_log_probs=old)

    @classmethod
    def whole(cls, data: TensorDict) -> JaggedRows:
        """All of `data`."""
        ids: Any = data["input_ids"]
        sequences = token_rows(data)
        if "prompts" in data:
            rows = RowBatch(sequences, [max(1, int(length)) for length in _prompt_lengths(data).tolist()])
        else:
            rows = RowBatch(sequences, [1] * len(sequences), _loss_masks(data, sequences))
        return cls(rows, _temperature(data), ids.offsets(), row_images(data))

    @property
    def left_out(self) -> int:
        """Tokens that do not run."""
        return int(self.offsets[-1]) - self.runs.tokens

    def by_content(self, model: PreTrainedModel) -> RowBatch:
        """What runs, with what images show in place of their placeholders: rows are alike as far as they agree in it.

        Rows whose images the core refuses, which is said elsewhere, are told by their ids.
        """
        if self.images is None:
            return self.runs
        sequences = self.runs.sequences
        try:
            return replace(self.runs, sequences=ImageRows.of_whole(model, sequences, self.images).by_content(sequences))
        except (InvalidInputError, UnsupportedError):
            return self.runs

    @property
    def response_tokens(self) -> int:
        """Tokens that run, without prompts."""
        return self.runs.tokens - sum(self.runs.prompt_lengths)

    def log_probs(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """As `nested`, for log-probs; of what was not scored, those it had."""
        if self.read is None or self.old_log_probs is None:
            return self.nested(values)
        found = torch.where(self.read, self._flat(values), self.old_log_probs.to(values[0]))
        return torch.nested.nested_tensor_from_jagged(found, self.offsets)

    def nested(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Values of tokens 1.. per sequence -> verl's jagged [S, len]: entry t belongs to token t + 1, 0 beyond."""
        return torch.nested.nested_tensor_from_jagged(self._flat(values), self.offsets)

    def from_responses(self, values: torch.Tensor) -> torch.Tensor:
        """Values of responses [S, C] -> [N], of whole rows: entry t belongs to token t + 1, 0 in prompts."""
        begins = torch.tensor(self.runs.prompt_lengths, device=values.device)
        columns = torch.arange(values.shape[1], device=values.device)
        real = columns < (self.offsets.diff() - begins)[:, None]
        places = (self.offsets[:-1] + begins - 1)[:, None] + columns
        flat = values.new_zeros(int(self.offsets[-1]))
        flat[places[real]] = values[real]
        return flat

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


def set_weights(data: TensorDict, weights: torch.Tensor) -> None:
    """Have `data` run with these weights [S, C], 0 beyond a response's end."""
    mask: Any = data["response_mask"]
    values = weights.to(mask.device, torch.float32)
    if mask.is_nested:
        offsets = mask.offsets()
        real = torch.arange(values.shape[1], device=mask.device) < offsets.diff()[:, None]
        values = torch.nested.nested_tensor_from_jagged(values[real], offsets)
    data[WEIGHTS] = values


def clear_weights(data: TensorDict) -> None:
    """As `data` was before `set_weights`."""
    if WEIGHTS in data.keys():  # noqa: SIM118 (a TensorDict)
        del data[WEIGHTS]


def _split(nested: Any) -> list[np.ndarray]:
    values, offsets = nested.values().cpu().numpy(), nested.offsets().cpu().numpy()
    return np.split(values, offsets[1:-1])


def _loss_masks(data: TensorDict, sequences: list[np.ndarray]) -> list[np.ndarray] | None:
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
