"""How the checkpoints of diffusion families translate into decoders that transformers has: configs and parameter names.

The code that LLaDA, Dream and SDAR ship does not load with transformers 5, but their architectures are known decoders
that attend in both directions: LLaDA and iLLaDA are Llama, Dream is Qwen2, SDAR is Qwen3, A2D models are what their
name says. Only LLaDA has parameter names of its own. A setting that the decoder cannot reproduce exactly raises
UnsupportedError and names the release of transformers with which the original code works.

Sources: the configuration_*.py and modeling_*.py files of GSAI-ML/LLaDA-8B-Instruct, GSAI-ML/iLLaDA-8B-Base,
Dream-org/Dream-v0-Instruct-7B, JetLM/SDAR-1.7B-Chat, and dllm/pipelines/a2d of ZHZisZZ/dllm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from dta_plugin.diffusion.families import ORIGINAL_CONFIG, is_mixture, known_families, vocabulary
from dta_plugin.errors import InvalidInputError, UnsupportedError

_TOP_NAMES = {
    "model.transformer.wte.weight": "model.embed_tokens.weight",
    "model.transformer.ln_f.weight": "model.norm.weight",
    "model.transformer.ff_out.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
# Settings of a LLaDA config with which a block is a Llama block, and what its code takes where they are missing.
_LLAMA_LIKE: dict[str, tuple[Any, Any]] = {
    "block_type": ("llama", "sequential"),
    "activation_type": ("silu", "swiglu"),
    "layer_norm_type": ("rms", "default"),
    "layer_norm_with_affine": (True, True),
    "attention_layer_norm": (False, False),
    "input_emb_norm": (False, False),
    "rope": (True, False),
    "alibi": (False, False),
    "scale_logits": (False, False),
    "include_bias": (False, False),
    "include_qkv_bias": (False, False),
    "multi_query_attention": (None, None),
    "block_group_size": (1, 1),
}
_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
)
_OPTIONAL = (
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "attention_dropout",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_NOT_ARCHITECTURE = ("architectures", "auto_map", "model_type", "attn_implementation", "_attn_implementation")


def native_config(original: Mapping[str, Any]) -> PretrainedConfig:
    """The config of the native decoder, attending in both directions, for a checkpoint's own config entries.

    It keeps the original entries under `original_config`, so that a trained model can be saved as it came. Dropout
    of the residual stream and of embeddings is left out: likelihoods that are compared must not be noisy.

    Raises UnsupportedError for other families and for settings the native decoder does not have,
    InvalidInputError for missing entries.
    """
    kind = str(original.get("model_type") or "").lower()
    config: PretrainedConfig
    if kind == "llada" and not is_mixture(original):
        config = LlamaConfig(**_llama_entries(original))
    elif kind == "illada":
        _expect(original, "layer_norm_eps", None, None)
        config = LlamaConfig(**_decoder_entries(original, "attention_bias", "mlp_bias"))
    elif kind == "dream":
        config = Qwen2Config(**_decoder_entries(original))
    elif kind == "sdar":
        config = Qwen3Config(**_decoder_entries(original, "attention_bias", "head_dim"))
    elif kind in ("a2d-llama", "a2d-qwen2", "a2d-qwen3"):
        native = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[kind.removeprefix("a2d-")]
        config = native(**{name: value for name, value in original.items() if name not in _NOT_ARCHITECTURE})
    else:
        raise UnsupportedError(
            f"Checkpoints of model type {original.get('model_type')!r} (architectures {original.get('architectures')}) "
            f"cannot be loaded here. Expected one of: {known_families()}. Load others with the code they ship, for "
            "example with transformers 4.57.1, and describe them to family_of by hand."
        )
    sliding = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if sliding:
        raise UnsupportedError(f"The config asks for {sorted(sliding)}. Expected full attention in every layer.")
    config.dtype = original.get("dtype") or original.get("torch_dtype")
    config.is_causal = False
    config.use_cache = False
    setattr(config, ORIGINAL_CONFIG, dict(original))
    return config


def native_name(original: Mapping[str, Any], name: str) -> str:
    """The native decoder's name of a parameter of the checkpoint; a name that is not known stays as it is."""
    return _renamed(name, "model.transformer.blocks.", "model.layers.", _LAYER_NAMES, _TOP_NAMES, original)


def original_name(original: Mapping[str, Any], name: str) -> str:
    """The checkpoint's name of a parameter of the native decoder: the inverse of `native_name`."""
    layers = {native: own for own, native in _LAYER_NAMES.items()}
    top = {native: own for own, native in _TOP_NAMES.items()}
    return _renamed(name, "model.layers.", "model.transformer.blocks.", layers, top, original)


def _renamed(
    name: str, prefix: str, new_prefix: str, layers: dict[str, str], top: dict[str, str], original: Mapping[str, Any]
) -> str:
    if original["model_type"] != "llada":
        return name
    index, _, parameter = name.removeprefix(prefix).partition(".")
    module, _, kind = parameter.rpartition(".")
    if name.startswith(prefix) and module in layers:
        return f"{new_prefix}{index}.{layers[module]}.{kind}"
    return top.get(name, name)


def _llama_entries(original: Mapping[str, Any]) -> dict[str, Any]:
    for name, (expected, default) in _LLAMA_LIKE.items():
        _expect(original, name, expected, default)
    if original.get("bias_for_layer_norm"):
        _expect(original, "bias_for_layer_norm", False, None)
    _require(original, ("d_model", "n_heads", "n_layers", "vocab_size", "rms_norm_eps", "rope_theta"))
    width = original["d_model"]
    # Without pad_token_id: LLaDA's pad token is its end token, which is trained, and a padding row gets no gradient.
    return {
        "vocab_size": vocabulary(original),
        "hidden_size": width,
        "intermediate_size": original.get("mlp_hidden_size") or original.get("mlp_ratio", 4) * width,
        "num_hidden_layers": original["n_layers"],
        "num_attention_heads": original["n_heads"],
        "num_key_value_heads": original.get("n_kv_heads") or original["n_heads"],
        "max_position_embeddings": original.get("max_sequence_length", 1024),
        "initializer_range": original.get("init_std", 0.02),
        "rms_norm_eps": original["rms_norm_eps"],
        "rope_theta": original["rope_theta"],
        "tie_word_embeddings": original.get("weight_tying", True),
        "attention_dropout": original.get("attention_dropout", 0.0),
        "pad_token_id": None,
        "bos_token_id": original.get("bos_token_id"),
        "eos_token_id": original.get("eos_token_id"),
    }


def _decoder_entries(original: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """The entries that a config with the names of transformers shares with the native one."""
    scaling = original.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default" or scaling.get("factor", 1.0) != 1.0:
        _expect(original, "rope_scaling", None, None)
    _require(original, _SHAPE)
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    return special | {name: original[name] for name in (*_SHAPE, *_OPTIONAL, *more) if name in original}


def _expect(original: Mapping[str, Any], name: str, expected: Any, default: Any) -> None:
    given = original.get(name, default)
    if given != expected:
        raise UnsupportedError(
            f"The config has {name}={given!r}. Expected {expected!r}, with which this {original['model_type']} model "
            "is a decoder that transformers has; run this one with the code it ships and transformers 4.57.1."
        )


def _require(original: Mapping[str, Any], names: tuple[str, ...]) -> None:
    missing = [name for name in names if original.get(name) is None]
    if missing:
        raise InvalidInputError(
            f"The config of this {original['model_type']} checkpoint has no {', '.join(missing)}. Expected the "
            "config.json of the released model; add the entries."
        )
