"""Monte-Carlo ELBO terms of completions under a masked diffusion LM: the likelihood that RL objectives are made of.

One sample masks some completion tokens, runs the model once, and weighs the log-probs of the masked tokens:
l = weight * sum over masked i of log p(y_i | noised y, x). Its mean over samples is an unbiased estimate of a lower
bound of log p(y | x) (BGPO, arXiv 2510.11683; LLaDA, arXiv 2502.09992).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.diffusion.family import (
    DiffusionFamily,
    check_attention,
    column_range,
    logit_rows,
    model_call,
    predictions,
)
from dta_plugin.diffusion.masks import MaskDraws
from dta_plugin.diffusion.prompt_sharing import PromptSharing
from dta_plugin.errors import InvalidInputError
from dta_plugin.execution.packed import check_every_layer_hit, score
from dta_plugin.models.introspection import causal_lm, decoder_of, lm_head, tree_forward

NORMS = ("none", "length", "max_length")


def masked_log_probs(
    model: nn.Module,
    family: DiffusionFamily,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    mask: torch.Tensor,
    prompt_mask: torch.Tensor | None = None,
    waiting: torch.Tensor | None = None,
    sharing: PromptSharing | None = None,
) -> torch.Tensor:
    """Log-probs [B, C] of the masked completion tokens, from one forward of the noised copy; exactly 0 elsewhere.

    input_ids: int64 [B, P + C], clean: prompts and completions side by side. attention_mask: [B, P + C], 0 at padding,
    or None. mask: bool [B, C], True where a completion token is hidden from the model and scored. prompt_mask: bool
    [B, P], prompt tokens to hide as well; they are not scored. waiting: bool [B, C], the same for completion tokens.
    sharing: where what rows have in common is computed once; None: nowhere.

    float32 (float64 for float64 models), differentiable in the parameters of `model`, wrapped or not. The LM head runs
    on the masked positions only and its softmax tile by tile (`models/lm_head.py`); a model without a decoder of its
    own below the head gives full logits of the completion columns.
    """
    columns = slice(input_ids.shape[1] - mask.shape[1], None)
    first, last = column_range(columns, input_ids, attention_mask)
    if mask.shape != (input_ids.shape[0], last - first):
        raise InvalidInputError(
            f"A mask of shape {tuple(mask.shape)} for input_ids of shape {tuple(input_ids.shape)}. Expected [B, C] "
            "with the same B: one value per completion token, at the end of the row."
        )
    check_attention(model, family, input_ids.device)
    hidden = torch.zeros_like(input_ids, dtype=torch.bool)
    hidden[:, first:] = mask if waiting is None else mask | waiting
    if prompt_mask is not None:
        hidden[:, :first] = prompt_mask
    noised = input_ids.masked_fill(hidden, family.mask_token_id)

    row, column = mask.nonzero(as_tuple=True)
    targets = input_ids[row, first + column]
    base = causal_lm(model)
    if decoder_of(base) is base or base.get_output_embeddings() is None:
        logits = predictions(model, family, noised, attention_mask, columns)[row, column]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        values = logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
    else:
        place = logit_rows(family, first, last, input_ids.device)[column]
        values = _fused_log_probs(model, family, noised, attention_mask, (row, place), targets, sharing)
    return values.new_zeros(mask.shape).index_put((row, column), values)


def _fused_log_probs(
    model: nn.Module,
    family: DiffusionFamily,
    noised: torch.Tensor,
    attention_mask: torch.Tensor | None,
    place: tuple[torch.Tensor, torch.Tensor],
    targets: torch.Tensor,
    sharing: PromptSharing | None,
) -> torch.Tensor:
    """Log-probs [M] of the targets at these rows and columns of the hidden states, without logits of the batch."""
    base = causal_lm(model)
    decoder, head = decoder_of(base), lm_head(base)
    packed = None if sharing is None else sharing.packed(model, family, noised, attention_mask, place)
    call = model_call(decoder, family, noised, attention_mask) if packed is None else packed.call

    def forward(_: PreTrainedModel, dta_call: dict[str, Any], **__: Any) -> dict[str, torch.Tensor]:
        states = decoder(**dta_call).last_hidden_state
        rows = states[place] if packed is None else states[0][packed.index]
        edges = torch.arange(len(rows), device=rows.device)
        on_both = edges, np.arange(len(rows))
        logprobs, _entropies = score(rows, head, targets, *on_both, temperature=1.0, return_entropy=False)
        return {"logprobs": logprobs}

    with tree_forward(base, forward):
        found: torch.Tensor = model(dta_call=call)["logprobs"]
    if packed is not None:
        check_every_layer_hit(base, packed.mask)
    return found


def elbo_term(log_probs: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """ELBO terms [B] of one sample: the sum of the masked log-probs [B, C] times the sample's weight [B]."""
    return log_probs.masked_fill(~mask, 0.0).sum(dim=1) * weight.to(log_probs.dtype)


def sample_term(
    model: nn.Module,
    family: DiffusionFamily,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    draws: MaskDraws,
    sample: int,
    completion_length: int,
    rows: torch.Tensor | None = None,
    sharing: PromptSharing | None = None,
) -> torch.Tensor:
    """ELBO terms [b] of one sample: one forward of these rows (int64 [b]; None for all), noised as `draws` says.

    completion_length: C, the completions' width at the end of input_ids [B, P + C]; other arguments as in
    `masked_log_probs`.
    """
    mask = draws.mask(sample, completion_length, rows)
    weight = draws.weights[:, sample]
    if rows is not None:
        input_ids, weight = input_ids[rows], weight[rows]
        attention_mask = None if attention_mask is None else attention_mask[rows]
    return elbo_term(masked_log_probs(model, family, input_ids, attention_mask, mask, sharing=sharing), mask, weight)


def length_scale(norm: str, lengths: torch.Tensor, max_length: int) -> torch.Tensor:
    """What ELBO differences are multiplied by, float32 [B]: 1 for "none", 1 / L for "length", 1 / max_length.

    Without it a difference grows with the length and its exponential overflows. lengths: int64 [B]. The bound and the
    equality on-policy hold for any fixed positive scale; ESPO divides by L, the DARE port of BGPO by the padded width.
    """
    if norm not in NORMS:
        raise InvalidInputError(f"length_norm={norm!r}. Expected one of {', '.join(NORMS)}.")
    if norm == "none":
        return torch.ones_like(lengths, dtype=torch.float32)
    divisor = lengths if norm == "length" else torch.full_like(lengths, max_length)
    return 1.0 / divisor.clamp(min=1).float()
