"""What keeps a model, or one of its calls, from sharing prefixes: heads and losses that read padding, and decoders.

What the rows of a call say is read in padded.py, what any model says in models/support.py.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from dta_plugin.models.introspection import causal_lm, decoder_of
from dta_plugin.models.recurrent_layers import mixers
from dta_plugin.models.support import tree_obstacle
from dta_plugin.models.vision.support import images_obstacle, text_model_of


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    if not args:
        return dict(kwargs)
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def padding_obstacle(model: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why the head or the loss of a model needs what its own path has at padding. arguments: of its call, by name."""
    if _labels_read_padding(arguments.get("labels"), arguments.get("attention_mask")):
        return "labels other than -100 score what padding predicts"
    return _head_obstacle(model, arguments)


def _labels_read_padding(labels: Any, mask: Any) -> bool:
    """Whether labels score the output of padding, as labels of their own position or of the next one.

    labels, mask: int [B, L], or anything else, which says nothing about tokens.
    """
    if not (isinstance(labels, torch.Tensor) and isinstance(mask, torch.Tensor)):
        return False
    if labels.ndim != 2 or labels.shape != mask.shape:
        return False
    scored, padding = labels != -100, ~mask.bool()
    return bool(((scored & padding).any() | (scored[:, 1:] & padding[:, :-1]).any()).item())


def _head_obstacle(model: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why a head of transformers reads the output of padding: spans over all of a row, the last token by its id."""
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if not (isinstance(ids, torch.Tensor) and isinstance(mask, torch.Tensor)) or mask.shape != ids.shape:
        return None
    if hasattr(model, "qa_outputs") and not bool(mask.all()):
        return "a span is a choice among all positions, padding too"
    if not isinstance(model, GenericForSequenceClassification):
        return None
    config: Any = model.config
    pad = config.get_text_config().pad_token_id
    if pad is None:
        return None if bool(mask[:, -1].all()) else "the last position is pooled, and is padding"
    last = (torch.arange(ids.shape[1], device=ids.device) * (ids != pad)).argmax(dim=1, keepdim=True)
    return None if bool(mask.gather(1, last).all()) else f"what is pooled is padding, whose id is not {pad}"


def model_obstacle(model: nn.Module) -> str | None:
    """Why no call of a model can share prefixes, whatever its rows."""
    return tree_obstacle(model) or decoder_obstacle(decoder_of(causal_lm(model)))


def decoder_obstacle(decoder: PreTrainedModel) -> str | None:
    """What matters of a model with any head, where `tree_obstacle` expects one of a causal LM."""
    config = decoder.config
    is_text = config.get_text_config() is config
    if config.is_encoder_decoder or not (is_text or images_obstacle(decoder) is None):
        return (
            f"{type(decoder).__name__} is more than a text decoder, and its rows are more than their tokens; use a "
            "text-only causal model, or one whose images are known"
        )
    text = decoder if is_text else text_model_of(decoder)
    layers = [module for module in text.modules() if hasattr(module, "layer_idx")]
    causal = [module.is_causal for module in layers if hasattr(module, "is_causal")]
    if not all(causal) or not (causal or mixers(decoder)):
        return f"{type(decoder).__name__} does not say that its attention is causal; use a causal model"
    return None
