"""Which diffusion family a model belongs to, found from its config alone.

`family_of` knows the masked diffusion LMs whose code is public: which token is the mask, which logits predict which
token, and what a token sees. What the config says (`mask_token_id`, `block_size`) comes before what is known of the
family, and an argument comes before both. A model it does not know can be described by hand; a guess is never made.

Sources: the modeling and configuration files that the checkpoints ship (ML-GSAI/LLaDA, DreamLM/Dream, JetAstra/SDAR)
and ZHZisZZ/dllm for A2D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from dta_plugin.diffusion.family import DiffusionFamily
from dta_plugin.diffusion.native import family_from_config
from dta_plugin.errors import InvalidInputError, UnsupportedError

# Config entry of a native decoder that `load_diffusion_lm` made: the config of the checkpoint it was made from.
ORIGINAL_CONFIG = "original_config"

_BY_HAND = "To describe a model by hand, pass mask_token_id=..., is_shifted=... and, for blocks, block_length=...."


@dataclass(frozen=True, kw_only=True, slots=True)
class _KnownFamily:
    """What is known of a family beside its config; None: only the config or the caller can say it."""

    models: str
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    end_of_turn_id: int | None = None
    is_shifted: bool = False
    is_block_causal: bool = False


# By model type, in lower case: Dream's is "Dream".
_KNOWN: dict[str, _KnownFamily] = {
    "llada": _KnownFamily(
        models="LLaDA-8B, LLaDA-1.5", mask_token_id=126336, pad_token_id=126081, end_of_turn_id=126348
    ),
    "illada": _KnownFamily(models="iLLaDA-8B", mask_token_id=5, pad_token_id=1),
    "dream": _KnownFamily(
        models="Dream-7B, Dream-Coder-7B, DiffuCoder-7B",
        mask_token_id=151666,
        pad_token_id=151643,
        end_of_turn_id=151645,
        is_shifted=True,
    ),
    "sdar": _KnownFamily(
        models="SDAR 1.7B to 8B, TraDo",
        mask_token_id=151669,
        pad_token_id=151643,
        end_of_turn_id=151645,
        is_block_causal=True,
    ),
    "a2d-qwen3": _KnownFamily(
        models="dllm-hub/Qwen3-*-diffusion-*", mask_token_id=151669, pad_token_id=151643, end_of_turn_id=151645
    ),
    "a2d-qwen2": _KnownFamily(models="Qwen2.5 converted by dllm", pad_token_id=151643, end_of_turn_id=151645),
    "a2d-llama": _KnownFamily(models="Llama converted by dllm"),
}


def family_of(
    config: PretrainedConfig | Mapping[str, Any],
    *,
    mask_token_id: int | None = None,
    is_shifted: bool | None = None,
    block_length: int | None = None,
) -> DiffusionFamily:
    """The family of the model with this config.

    config: a config object or the entries of a config.json: those of a released checkpoint, of a model from
    `load_diffusion_lm`, or of a decoder made bidirectional (`dta_plugin.diffusion.native`). The other arguments say
    what the config does not, and win over it; with mask_token_id and is_shifted a model of an unknown type is described
    by hand.

    Raises UnsupportedError for an unknown family and for one that is no masked diffusion LM, InvalidInputError
    when neither the config nor the family says which token is the mask, or how long a block is.
    """
    entries = config_entries(config)
    if "diffusion" in entries:
        return _native_family(config, mask_token_id, is_shifted, block_length)
    kind = str(entries.get("model_type") or "").lower()
    _refuse_diffusion_gemma(kind)
    known = _KNOWN.get(kind)
    if known is None or is_mixture(entries):
        if mask_token_id is None or is_shifted is None:
            raise _unknown_family(entries)
        known = _KnownFamily(models="described by hand", is_shifted=is_shifted)
    mask = _first_given(mask_token_id, entries.get("mask_token_id"), known.mask_token_id)
    rows = vocabulary(entries)
    if mask is None or (rows is not None and mask >= rows):
        raise InvalidInputError(
            f"The config of {_label(entries)} gives mask token {mask} in a vocabulary of {rows}. Expected a token of "
            "the model; pass mask_token_id=tokenizer.mask_token_id."
        )
    return DiffusionFamily(
        name=kind or "by hand",
        mask_token_id=mask,
        pad_token_id=_first_given(entries.get("pad_token_id"), _if_in_vocabulary(known.pad_token_id, rows)),
        eos_token_ids=_end_token_ids(entries, known, rows),
        is_shifted=known.is_shifted if is_shifted is None else is_shifted,
        block_length=_block_length(entries, known, block_length),
    )


def config_entries(config: PretrainedConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a checkpoint's own config, also where a native decoder was made from it."""
    entries = dict(config) if isinstance(config, Mapping) else config.to_dict()
    return {"_name_or_path": entries.get("_name_or_path"), **entries.get(ORIGINAL_CONFIG, entries)}


def is_mixture(entries: Mapping[str, Any]) -> bool:
    """Whether this is a mixture of experts: LLaDA-MoE has the model type of the dense LLaDA."""
    return any("moe" in str(name).lower() for name in entries.get("architectures") or ())


def vocabulary(entries: Mapping[str, Any]) -> int | None:
    """Rows of the embedding; LLaDA pads it to `embedding_size`."""
    return entries.get("embedding_size") or entries.get("vocab_size")


def known_families() -> str:
    """One line per family, for messages."""
    return "; ".join(f"{kind} ({known.models})" for kind, known in _KNOWN.items())


def _native_family(
    config: PretrainedConfig | Mapping[str, Any],
    mask_token_id: int | None,
    is_shifted: bool | None,
    block_length: int | None,
) -> DiffusionFamily:
    family = family_from_config(AutoConfig.for_model(**config) if isinstance(config, Mapping) else config)
    return replace(
        family,
        mask_token_id=_first_given(mask_token_id, family.mask_token_id),
        is_shifted=_first_given(is_shifted, family.is_shifted),
        block_length=_first_given(block_length, family.block_length),
    )


def _block_length(entries: Mapping[str, Any], known: _KnownFamily, given: int | None) -> int | None:
    block_length = _first_given(given, entries.get("block_size") if known.is_block_causal else None)
    needs_one = known.is_block_causal or "bd3lm" in str(entries.get("_name_or_path")).lower()
    if block_length is None and needs_one:
        raise InvalidInputError(
            f"{_label(entries)} attends causally over blocks, and its config has no block_size. Expected the length it "
            "was trained with; pass block_length=4 for SDAR-*-Chat and TraDo, the number in the name for SDAR-*-b16 "
            "and the like, 32 for dllm-hub's bd3lm models."
        )
    return block_length


def _end_token_ids(entries: Mapping[str, Any], known: _KnownFamily, rows: int | None) -> tuple[int, ...]:
    eos = entries.get("eos_token_id")
    ends = list(eos) if isinstance(eos, list | tuple) else [eos]
    ends.append(_if_in_vocabulary(known.end_of_turn_id, rows))
    return tuple(dict.fromkeys(end for end in ends if end is not None))


def _if_in_vocabulary(token: int | None, rows: int | None) -> int | None:
    """A special token that is known of a family, where the vocabulary has it (tiny models have not)."""
    return token if token is None or rows is None or token < rows else None


def _first_given(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _label(entries: Mapping[str, Any]) -> str:
    return str(entries.get("_name_or_path") or f"model type {entries.get('model_type')!r}")


def _refuse_diffusion_gemma(kind: str) -> None:
    if kind.startswith("diffusion_gemma"):
        raise UnsupportedError(
            "DiffusionGemma is not a masked diffusion LM: its canvas starts from random tokens instead of masks, its "
            "prompt goes through a causal encoder, and each step is conditioned on the last one's predictions, so that "
            f"the likelihood of a masked canvas is not defined for it. Supported: {known_families()}."
        )


def _unknown_family(entries: Mapping[str, Any]) -> UnsupportedError:
    kind, architectures = entries.get("model_type"), entries.get("architectures")
    return UnsupportedError(
        f"Model type {kind!r} (architectures {architectures}) is not a diffusion family that is known here. Known: "
        f"{known_families()}. {_BY_HAND} Mixtures of experts (LLaDA-MoE, LLaDA2, SDAR-30B) run with their own code "
        "and transformers 4.57.1."
    )
