"""Diffusion LMs out of transformers' own decoders: a causal config told to attend in both directions.

What makes it a diffusion LM is stored in the config, so `save_pretrained` and `from_pretrained` keep it:

    config = bidirectional(Qwen3Config(...), mask_token_id=151669)
    model = AutoModelForCausalLM.from_config(config)
    family = family_from_config(model.config)
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from dta_plugin.diffusion.family import DiffusionFamily
from dta_plugin.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def bidirectional(
    config: PretrainedConfig,
    *,
    mask_token_id: int,
    is_shifted: bool = False,
    block_length: int | None = None,
    forbidden_token_ids: tuple[int, ...] = (),
) -> PretrainedConfig:
    """A copy of a decoder's config with `is_causal=False` and a `diffusion` entry, from which a family can be read.

    The other arguments are those of `DiffusionFamily`. Raises InvalidInputError for ids outside the vocabulary, and for
    layers that cannot look ahead.
    """
    own = copy.deepcopy(config)
    own.is_causal = False
    own.diffusion = {
        "mask_token_id": mask_token_id,
        "is_shifted": is_shifted,
        "block_length": block_length,
        "forbidden_token_ids": list(forbidden_token_ids),
    }
    one_way = sorted(set(getattr(own, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if one_way:
        raise InvalidInputError(
            f"{type(config).__name__} has {', '.join(one_way)} layers. Expected attention layers only: others carry a "
            "state from left to right; use another model."
        )
    family = family_from_config(own)
    outside = [i for i in family.never_sampled if i >= own.vocab_size]
    if outside:
        raise InvalidInputError(
            f"Token id(s) {outside} with a vocabulary of {own.vocab_size}. Expected ids below it; add the mask token "
            "to the tokenizer and enlarge vocab_size."
        )
    return own


def family_from_config(config: PretrainedConfig) -> DiffusionFamily:
    """The family that `bidirectional` has stored; padding and end tokens are the config's own.

    Raises InvalidInputError for a config without such an entry.
    """
    entry: dict[str, Any] | None = getattr(config, "diffusion", None)
    if entry is None:
        raise InvalidInputError(
            f"{type(config).__name__} has no `diffusion` entry. Expected a config made by "
            "dta_plugin.diffusion.bidirectional; make one, or give a DiffusionFamily."
        )
    eos = config.eos_token_id
    ends = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    fields = entry | {"forbidden_token_ids": tuple(entry["forbidden_token_ids"])}
    return DiffusionFamily(name=config.model_type, pad_token_id=config.pad_token_id, eos_token_ids=ends, **fields)
