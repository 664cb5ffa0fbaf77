"""What the executors need to know of a Hugging Face causal LM, and the one place that reaches inside it.

`tree_forward` makes a call of the *wrapped* model (DDP, FSDP, PEFT, accelerate's autocast) run the decoder and our
LM head instead of the model's own logits. The model's `forward` is replaced for the duration of that call only:
decoder layers are all that checkpointing recomputes, and those are left alone.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from dta_plugin.attention.self_check import Kind
from dta_plugin.errors import UnsupportedModelError
from dta_plugin.logprobs import LMHead
from dta_plugin.tree.cost import ModelCost


def causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers."""
    seen: Any = model
    while not isinstance(seen, PreTrainedModel):
        inner = getattr(seen, "module", None) or getattr(seen, "_orig_mod", None)
        if inner is None and hasattr(seen, "get_base_model"):
            inner = seen.get_base_model()
        if inner is None:
            raise UnsupportedModelError(
                f"Got a {type(model).__name__}. Expected a Hugging Face causal LM (PreTrainedModel), possibly inside "
                "PEFT, DDP or FSDP; load it with AutoModelForCausalLM."
            )
        seen = inner
    return seen


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model with any head that turns token ids into hidden states; the model itself if it has no head.

    Before transformers 5, the prefix that Gemma 3 states is that of another class.
    """
    found: PreTrainedModel | None = getattr(model, model.base_model_prefix, None)
    return getattr(model, "model", model) if found is None else found


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the token ids go: the device of the input embedding."""
    return next(model.get_input_embeddings().parameters()).device


def lm_head(model: PreTrainedModel, dtype: torch.dtype | None = None) -> LMHead:
    """The output embedding with the model's logit scale and soft-cap. dtype: projection dtype, None for the model's."""
    module = model.get_output_embeddings()
    if module is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no output embedding. Expected a causal LM; load it with AutoModelForCausalLM."
        )
    config = model.config.get_text_config()
    return LMHead(module, _logit_scale(config), getattr(config, "final_logit_softcapping", None), dtype)


def _logit_scale(config: Any) -> float:
    for multiplier in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, multiplier, None)
        if value is not None:
            return float(value)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if config.model_type == "hyperclovax" else 1.0 / float(divisor)


@contextmanager
def tree_forward(model: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context, calls of `model` run ``forward(model, **kwargs)``."""
    own = model.__dict__.get("forward")
    model.forward = types.MethodType(forward, model)
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def layer_types(config: Any) -> list[str]:
    """Per decoder layer: "full_attention", "sliding_attention", or another kind of layer."""
    types_ = getattr(config, "layer_types", None)
    if types_:
        return list(types_)
    kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return [kind] * config.num_hidden_layers


def attention_kinds(model: PreTrainedModel, device: torch.device) -> set[Kind]:
    """The kinds of attention that the model's layers ask for on `device`, as far as its config says."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype
    has_softcap = getattr(config, "attn_logit_softcapping", None) is not None
    has_sinks = any(isinstance(getattr(module, "sinks", None), torch.Tensor) for module in model.modules())
    return {
        Kind(device, dtype, (head_dim(model),) * 2, heads // kv_heads, window, has_softcap, has_sinks)
        for window in {kind == "sliding_attention" for kind in layer_types(config)}
    }


def head_dim(model: PreTrainedModel) -> int:
    """Width of an attention head."""
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Shape of the whole parameter, also where DeepSpeed ZeRO-3 has left nothing of it here."""
    return getattr(parameter, "ds_shape", parameter.shape)


# Looked at once per model: adapters that come later change little.
_costs: WeakKeyDictionary[PreTrainedModel, ModelCost] = WeakKeyDictionary()


def model_cost(model: PreTrainedModel) -> ModelCost:
    """Forward FLOPs of the model's parts, two per multiply-add; experts count as far as they are active."""
    if model not in _costs:
        _costs[model] = _counted(model)
    return _costs[model]


def _counted(model: PreTrainedModel) -> ModelCost:
    config = model.config.get_text_config()
    decoder_matrices = {id(p): (name, p) for name, p in model.named_parameters() if len(_shape(p)) >= 2}
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    for embedding in embeddings:
        decoder_matrices.pop(id(getattr(embedding, "weight", None)), None)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    active = (getattr(config, "num_experts_per_tok", None) or experts) / experts if experts else 1.0
    parameters = sum(
        math.prod(_shape(p)) * (active if ".experts." in name else 1.0) for name, p in decoder_matrices.values()
    )

    per_pair = 4.0 * config.num_attention_heads * head_dim(model)
    kinds = layer_types(config)
    window = int(getattr(config, "sliding_window", None) or 0)
    windowed = sum(kind == "sliding_attention" for kind in kinds) if window else 0
    return ModelCost(
        per_token=2.0 * parameters,
        per_pair=per_pair * (len(kinds) - windowed),
        per_scored=2.0 * config.hidden_size * config.vocab_size,
        per_window_pair=((window, per_pair * windowed),) if windowed else (),
    )
