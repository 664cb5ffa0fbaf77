"""What the executors need to know of a Hugging Face causal LM, and the one place that reaches inside it.

`tree_forward` makes a call of the *wrapped* model (DDP, FSDP, PEFT, accelerate's autocast) run the decoder and our
LM head instead of the model's own logits. The model's `forward` is replaced for the duration of that call only:
decoder layers are all that checkpointing recomputes, and those are left alone.
"""

from __future__ import annotations

import logging
import math
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from dta_plugin.attention.self_check import Kind
from dta_plugin.dtypes import compute_dtype
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.models.layers import forward_has
from dta_plugin.models.lm_head import LMHead
from dta_plugin.models.sizes import attention_sizes, counted_cost
from dta_plugin.tree.cost import ModelCost

log = logging.getLogger("dta_plugin")


def wrappings(model: torch.nn.Module) -> Iterator[Any]:
    """DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers from the outermost inwards, and last what is inside."""
    seen: Any = model
    while seen is not None:
        yield seen
        if isinstance(seen, PreTrainedModel):
            return
        inner = getattr(seen, "module", None) or getattr(seen, "_orig_mod", None)
        seen = seen.get_base_model() if inner is None and hasattr(seen, "get_base_model") else inner


def causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside all wrappers."""
    *_, found = wrappings(model)
    if not isinstance(found, PreTrainedModel):
        raise UnsupportedError(
            f"Got a {type(model).__name__}. Expected a Hugging Face causal LM (PreTrainedModel), possibly inside "
            "PEFT, DDP or FSDP; load it with AutoModelForCausalLM."
        )
    return found


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
        raise UnsupportedError(
            f"{type(model).__name__} has no output embedding. Expected a causal LM; load it with AutoModelForCausalLM."
        )
    return LMHead(module, _logit_scale(model), _applied(model, "final_logit_softcapping"), dtype)


def _logit_scale(model: PreTrainedModel) -> float:
    for multiplier in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = _applied(model, multiplier)
        if value is not None:
            return float(value)
    divisor = _applied(model, "logits_scaling")
    if divisor is None:
        return 1.0
    is_factor = model.config.get_text_config().model_type == "hyperclovax"
    return float(divisor) if is_factor else 1.0 / float(divisor)


def _applied(model: PreTrainedModel, name: str) -> Any:
    """What the config states, if the model's own forward reads it: some classes with images leave it out."""
    value = getattr(model.config.get_text_config(), name, None)
    return value if forward_has(model, name) else None


@contextmanager
def tree_forward(model: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context, calls of `model` run ``forward(model, **kwargs)``.

    Raises InvalidInputError where another thread is in such a context, or calls the model in this one.
    """
    thread, is_outermost = threading.get_ident(), model not in _users
    if _users.setdefault(model, thread) != thread:
        raise _used_elsewhere(model)
    own = model.__dict__.get("forward")

    def guarded(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            raise _used_elsewhere(self)
        return forward(self, *args, **kwargs)

    model.forward = types.MethodType(guarded, model)
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own
        if is_outermost:
            del _users[model]


# The thread in whose `tree_forward` a model is.
_users: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()


def _used_elsewhere(model: torch.nn.Module) -> InvalidInputError:
    return InvalidInputError(
        f"{type(model).__name__} is called while another thread runs it as a tree. Expected one thread per model at a "
        "time: put a lock around its calls, or give each thread a model of its own."
    )


def is_checkpointed(model: torch.nn.Module) -> bool:
    """Whether any layer of the model has gradient checkpointing switched on."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Within the context, no module of the model is in training mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def attention_kinds(model: PreTrainedModel, device: torch.device) -> set[Kind]:
    """The kinds of attention that the model's layers ask for on `device`, as far as modules and config say."""
    config = model.config.get_text_config()
    dtype = compute_dtype(device.type, model.dtype)
    has_softcap = getattr(config, "attn_logit_softcapping", None) is not None
    has_sinks = any(isinstance(getattr(module, "sinks", None), torch.Tensor) for module in model.modules())
    return {
        Kind(
            device,
            dtype,
            layer.head_dims,
            layer.heads // layer.kv_heads,
            layer.window is not None,
            has_softcap,
            has_sinks,
        )
        for layer in attention_sizes(model)
    }


# Looked at once per model: adapters that come later change little.
_costs: WeakKeyDictionary[PreTrainedModel, ModelCost] = WeakKeyDictionary()


def model_cost(model: PreTrainedModel) -> ModelCost:
    """Forward FLOPs of the model's parts, two per multiply-add; experts count as far as they are active.

    An estimate never stops a run: of a model that cannot be read, all parameters count once per token, nothing else.
    """
    if model not in _costs:
        try:
            _costs[model] = counted_cost(model)
        except Exception as error:
            say_guessed("cost", model, error)
            _costs[model] = ModelCost(2.0 * max(1, sum(math.prod(p.shape) for p in model.parameters())), 0.0, 0.0)
    return _costs[model]


def say_guessed(what: str, model: PreTrainedModel, error: Exception) -> None:
    """One line for an estimate that goes without the sizes of the model's layers."""
    name, kind = type(model).__name__, type(error).__name__
    log.warning("dta: the %s of %s is a guess, its sizes cannot be read (%s: %s)", what, name, kind, error)
