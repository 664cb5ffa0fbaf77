"""How a diffusion language model is asked for token predictions, whatever its family.

A masked diffusion LM reads a prompt and a partly masked completion and predicts the token at every position. Families
differ in which row of logits belongs to a token (`is_shifted`) and in what a token sees (`block_length`);
`predictions` gives entry i for token i in all of them. A model that attends causally raises UnsupportedError.

Blocks of a `block_length` family are counted from the first real token of the row, prompt included, and the completion
continues a prompt's last, unfinished block: block diffusion models (SDAR) are trained and served so.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.models.introspection import causal_lm
from dta_plugin.models.layers import layer_types


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionFamily:
    """How a diffusion LM is asked for token predictions. Raises InvalidInputError for ids and lengths that cannot be.

    mask_token_id: what stands for a token that is not known yet; never sampled. eos_token_ids: what ends a completion;
    the first one fills what follows. forbidden_token_ids: never sampled, beside the mask token.
    is_shifted: logits at i - 1 predict token i (Dream); else logits at i predict token i.
    block_length: attention is causal over blocks of so many tokens and full inside (SDAR); None: full attention.
    """

    name: str
    mask_token_id: int
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    is_shifted: bool = False
    block_length: int | None = None
    forbidden_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ids = {
            "mask_token_id": (self.mask_token_id,),
            "pad_token_id": () if self.pad_token_id is None else (self.pad_token_id,),
            "eos_token_ids": self.eos_token_ids,
            "forbidden_token_ids": self.forbidden_token_ids,
        }
        for name, values in ids.items():
            if any(not isinstance(i, int) or i < 0 for i in values):
                raise InvalidInputError(f"{name}={values}. Expected token ids of at least 0; look at the tokenizer.")
        if self.mask_token_id in self.eos_token_ids:
            raise InvalidInputError(
                f"mask_token_id={self.mask_token_id} is among eos_token_ids={self.eos_token_ids}. Expected a token of "
                "its own; reserve one for the mask."
            )
        if self.block_length is not None and self.block_length < 1:
            raise InvalidInputError(f"block_length={self.block_length}. Expected None or at least 1.")

    @property
    def never_sampled(self) -> tuple[int, ...]:
        """The mask token and the forbidden ones."""
        return (self.mask_token_id, *self.forbidden_token_ids)


def predictions(
    model: nn.Module,
    family: DiffusionFamily,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    columns: slice | None = None,
) -> torch.Tensor:
    """Logits [B, C, V] in the model's dtype; entry i predicts the token at the i-th of the columns.

    input_ids: int64 [B, S], some of them the mask token. attention_mask: [B, S], 0 at padding (left, right or both), or
    None. columns: which positions of S, step 1; None for all. Only those go through the LM head where the model takes
    `logits_to_keep`. model: a Hugging Face LM, wrapped (PEFT, DDP, FSDP) or not. Column 0 of a shifted family has no
    logits before it and gets those of column 0.

    Raises UnsupportedError if the model attends causally, or cannot take the masks of its family.
    """
    check_attention(model, family, input_ids.device)
    first, last = column_range(columns, input_ids, attention_mask)
    rows = logit_rows(family, first, last, input_ids.device)
    return _logits(model, family, input_ids, attention_mask, rows)


def column_range(
    columns: slice | None, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[int, int]:
    """First and last + 1 of the columns, checked against the shapes of a call."""
    if input_ids.ndim != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
        given = None if attention_mask is None else tuple(attention_mask.shape)
        raise InvalidInputError(
            f"input_ids of shape {tuple(input_ids.shape)} and an attention mask of shape {given}. Expected [B, S] for "
            "both: one value per token."
        )
    first, last, step = (columns or slice(None)).indices(input_ids.shape[1])
    if step != 1 or last <= first:
        raise InvalidInputError(
            f"columns={columns} of {input_ids.shape[1]} tokens. Expected a slice of step 1 with at least one token."
        )
    return first, last


def logit_rows(family: DiffusionFamily, first: int, last: int, device: torch.device) -> torch.Tensor:
    """int64 [last - first]: at which positions the logits of the tokens first .. last - 1 are found."""
    rows = torch.arange(first, last, device=device)
    return (rows - 1).clamp(min=0) if family.is_shifted else rows


def model_call(
    module: PreTrainedModel, family: DiffusionFamily, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> dict[str, Any]:
    """Keyword arguments of the forward of a model or of its decoder: masks, positions, attention in both directions."""
    call: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False, "is_causal": False}
    if attention_mask is not None:
        call["position_ids"] = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    if family.block_length is not None:
        call["attention_mask"] = explicit_mask(module, input_ids, attention_mask, family.block_length)
    accepted = inspect.signature(module.forward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        call = {name: value for name, value in call.items() if name in accepted}
    return {"input_ids": input_ids, **call}


def explicit_mask(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    block_length: int | None,
    queries: slice | None = None,
) -> torch.Tensor:
    """[B or 1, 1, Q, S]: a token sees the real tokens of its own and earlier blocks, or all. bool; eager adds it.

    queries: the columns that look; None for all. Raises UnsupportedError for a model that takes no such mask.
    """
    reason = explicit_mask_obstacle(model)
    if reason is not None:
        raise UnsupportedError(f"{reason}.")
    real = torch.ones_like(input_ids[:1]) if attention_mask is None else attention_mask.long()
    position = (real.cumsum(dim=1) - 1).clamp(min=0)
    block = torch.zeros_like(position) if block_length is None else position // block_length
    visible = ((block[:, None, :] <= block[:, queries or slice(None), None]) & real.bool()[:, None, :])[:, None]
    if model.config._attn_implementation == "sdpa":
        return visible
    return torch.zeros_like(visible, dtype=model.dtype).masked_fill_(~visible, torch.finfo(model.dtype).min)


def explicit_mask_obstacle(model: PreTrainedModel) -> str | None:
    """Why a model cannot be given the mask of `explicit_mask`."""
    kind = model.config._attn_implementation
    if kind not in ("eager", "sdpa"):
        return (
            f"{type(model).__name__} has attn_implementation={kind!r}, which takes no mask of one's own. Expected "
            "'sdpa' or 'eager'; load the model with attn_implementation='sdpa'"
        )
    other = sorted(set(layer_types(model.config.get_text_config())) - {"full_attention"})
    if other:
        return (
            f"{type(model).__name__} has {', '.join(other)} layers. Expected full attention in every layer: a mask of "
            "one's own replaces the layer's; use another model"
        )
    return None


def _logits(
    model: nn.Module,
    family: DiffusionFamily,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    rows: torch.Tensor,
) -> torch.Tensor:
    base = causal_lm(model)
    call = model_call(base, family, input_ids, attention_mask)
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        return model(**call, logits_to_keep=rows).logits
    return model(**call).logits.index_select(1, rows)


# Models whose attention has been looked at.
_checked: WeakSet[PreTrainedModel] = WeakSet()


def check_attention(model: nn.Module, family: DiffusionFamily, device: torch.device) -> None:
    """Once per model: change a token and look whether an earlier position, in the same block, notices.

    With and without padding, for which transformers has ways of their own. Four small forward passes without gradient
    (six for block attention), in the first call only. device: of token ids.
    """
    base = causal_lm(model)
    if base in _checked or family.block_length == 1:
        return
    length = 2 if family.block_length is None else family.block_length + 1
    ids = torch.arange(length, device=device)[None] % base.config.vocab_size
    padded = torch.cat([ids[:, :1], ids], dim=1)
    if not (_depends_on(model, family, ids, 1) and _depends_on(model, family, padded, 2, padding=1)):
        raise UnsupportedError(
            f"{type(base).__name__} attends causally: a position does not see the next one, though is_causal=False was "
            "asked for. Expected a model that attends in both directions; update transformers (5.5 or newer), or use "
            "a model class of its family (dta_plugin.diffusion)."
        )
    if family.block_length is not None and _depends_on(model, family, ids, length - 1):
        raise UnsupportedError(
            f"{type(base).__name__} sees tokens of later blocks, though a mask of block attention was given. Expected "
            f"a model that takes 4-D attention masks; use one, or block_length=None (given {family.block_length})."
        )
    _checked.add(base)


@torch.no_grad()
def _depends_on(model: nn.Module, family: DiffusionFamily, ids: torch.Tensor, changed: int, padding: int = 0) -> bool:
    """Whether the logits at the first real position, behind the padding, depend on the token at `changed`."""
    other = ids.clone()
    other[0, changed] = (ids[0, changed] + 1) % causal_lm(model).config.vocab_size
    mask = (torch.arange(ids.shape[1], device=ids.device)[None] >= padding).long() if padding else None
    row = torch.full_like(ids[0, :1], padding)
    both = []
    for given in (ids, other):
        with torch.random.fork_rng([ids.device] if ids.device.type == "cuda" else []):
            torch.manual_seed(0)  # the same dropout in both
            both.append(_logits(model, family, given, mask, row).float())
    before, after = both
    return bool((before - after).abs().max() > 1e-4 * before.abs().max())
