"""A subset of a micro-batch's tokens, put so that TRL's own losses see the right numbers.

TRL's losses are sums over `completion_mask` (times `tool_mask`), divided by sums of that mask or by constants. Handed
weights in place of the mask, m_t / p_t or 0, the sums are Horvitz-Thompson estimates: of policy loss, KL, entropy bonus
and metrics alike. What would be lost are the denominators. So there is one more column at the end, the balance. Its
mask is what the row's mask has lost, so that masks add up to what they did. Its log-probs, old and reference ones too,
are 0 and constant: no gradient, no KL, no entropy. What it adds to the loss, its mask times that of a ratio of 1, is
0 on average, and keeps the loss at what it would have been where ratios are 1 anyway.

Such inputs are recognised by their entry `LEFT_OUT`: a mask may be of a floating dtype for other reasons.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from dta_plugin.adapters.trl.generation_batch import PADDING, Inputs
from dta_plugin.adapters.trl.images import TOKEN_TYPES, VALUES

# Entry int64 [B]: real tokens of a row that do not run.
LEFT_OUT = "dta_left_out"
# Entries that may be as wide as completions by chance: of prompts, and of images.
_NOT_OF_COMPLETIONS = ("prompt_ids", "prompt_mask", *VALUES)


def is_weighted(inputs: Inputs) -> bool:
    return LEFT_OUT in inputs


def loss_mask(inputs: Inputs) -> torch.Tensor:
    """What TRL's loss multiplies by: [B, C], without the balance."""
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    return mask[:, :-1] if is_weighted(inputs) else mask


def reweighted(inputs: Inputs, weights: torch.Tensor) -> Inputs:
    """The inputs with weights [B, C] for the tokens of `loss_mask`, and a balance.

    Columns behind the last weight go, unless there are images, whose placeholders a dense pass needs. Entries of tokens
    that are left out become what TRL pads with: what is exponentiated there must not overflow, for the loss multiplies
    it by a weight of 0.
    """
    completion_mask = inputs["completion_mask"]
    was_weighted = is_weighted(inputs)
    total = completion_mask.sum(dim=1) if was_weighted else loss_mask(inputs).sum(dim=1)
    kept = weights != 0
    width = max(int(kept.any(dim=0).nonzero().max()) + 1 if kept.any() else 0, 1)
    width = kept.shape[1] if inputs.get("num_images") is not None else width
    balance = total.to(weights.dtype) - weights.sum(dim=1)
    result = {key: value for key, value in inputs.items() if key != "tool_mask"}  # weights are 0 there already
    for key, value in list(result.items()):
        if key in TOKEN_TYPES:  # [B, P + C]; the balance is text
            columns = value.shape[1] - completion_mask.shape[1] + width
            result[key] = F.pad(value[:, :columns], (0, 1))
            continue
        if key in _NOT_OF_COMPLETIONS or not _is_per_token(value, completion_mask):
            continue
        shape = (*kept[:, :width].shape, *[1] * (value.ndim - 2))
        entries = value[:, :width]
        if key != "completion_ids":
            entries = entries.masked_fill(~kept[:, :width].reshape(shape), PADDING.get(key, 0))
        result[key] = F.pad(entries, (*[0] * (2 * (value.ndim - 2)), 0, 1), value=PADDING.get(key, 0))
    result["completion_mask"] = torch.cat([weights[:, :width], balance[:, None]], dim=1)
    result[LEFT_OUT] = inputs.get(LEFT_OUT, 0) + _row_tokens(inputs, was_weighted) - _row_tokens(result, True)
    return result


def _row_tokens(inputs: Inputs, weighted: bool) -> torch.Tensor:
    """int64 [B]: the tokens of each row that run, a first one at least."""
    mask = inputs["completion_mask"] != 0
    if not weighted:
        return inputs["prompt_mask"].sum(dim=1) + mask.sum(dim=1)
    kept = mask[:, :-1]
    last = torch.where(kept, torch.arange(1, kept.shape[1] + 1, device=kept.device), 0).amax(dim=1)
    return torch.where(last > 0, inputs["prompt_mask"].sum(dim=1) + last, 1)


def _is_per_token(value: Any, completion_mask: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape[:2] == completion_mask.shape
