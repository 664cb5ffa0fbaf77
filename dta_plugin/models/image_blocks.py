"""What each layer makes of images whose tokens attend both ways (Gemma 3, Gemma 4): asked of the model's own masks.

Releases of transformers differ, in the layers and in whether a sliding window applies within an image:

| layer | Gemma 3, 5.10 | Gemma 3, 5.24 | Gemma 4, 5.10 | Gemma 4, 5.24 |
|---|---|---|---|---|
| full attention | both ways | both ways | both ways | causal |
| sliding window | both ways, whole | both ways, within the window | both ways, whole | both ways, within the window |

"Whole": in 5.10 the image is or-ed onto a causal mask that has the window already, so that within an image the window
does not apply. In 5.24 the window comes last: a token sees less than `window` tokens back, within its image too, while
all that follow in its image it sees however far they are. Gemma 4 attends both ways only where its config says
``use_bidirectional_attention="vision"``.

So no release is asked for, but the code that makes the masks: on a row of five tokens, with a window of two.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.attention.blocks import BlockRule
from dta_plugin.errors import UnsupportedError
from dta_plugin.models.layers import attention_modules, layer_types

_MAKES_MASKS = "create_masks_for_generate"
_SAY_IMAGES = ("token_type_ids", "mm_token_type_ids")
# Which tokens of the row are an image's, and the window.
_ROW, _WINDOW = [0, 1, 1, 1, 0], 2

_rules: dict[tuple[object, ...], dict[str, BlockRule]] = {}


# Looked at once per model.
_of_models: WeakKeyDictionary[PreTrainedModel, dict[int, BlockRule]] = WeakKeyDictionary()


def block_rules(model: PreTrainedModel) -> dict[int, BlockRule]:
    """What each attention layer makes of images, by index: "causal" everywhere, or some attend both ways.

    "causal" also where the model's file has no code for masks that tells images apart.
    """
    if model not in _of_models:
        _of_models[model] = {
            index: "causal" if _mask_code(module) is None else block_rule(module)
            for index, module in attention_modules(model).items()
        }
    return _of_models[model]


def block_rule(module: nn.Module) -> BlockRule:
    """What an attention layer makes of images.

    Raises UnsupportedError where the masks of the model do not tell.
    """
    attention = cast(Any, module)
    config, kind = attention.config, layer_types(attention.config)[attention.layer_idx]
    key = (type(module), getattr(config, "use_bidirectional_attention", None))
    if key not in _rules or kind not in _rules[key]:
        _rules[key] = _rules.get(key, {}) | _rules_of(module, config)
    if kind not in _rules[key]:
        raise UnsupportedError(f"{_unknown(module)}, which have none for its {kind} layers. {_REMEDY}")
    return _rules[key][kind]


_REMEDY = "Expected those of Gemma 3 or Gemma 4; use one of these."


def _unknown(module: nn.Module) -> str:
    return f"Images whose tokens attend both ways, and {type(module).__name__} with masks"


def _mask_code(module: nn.Module) -> Callable[..., Any] | None:
    """The function of the model's file that makes masks out of which tokens are an image's."""
    files = [sys.modules[kind.__module__] for kind in type(module).__mro__ if kind not in nn.Module.__mro__]
    for value in (value for file in files for value in vars(file).values()):
        if isinstance(value, type) and _MAKES_MASKS in vars(value):
            code: Callable[..., Any] = getattr(value, _MAKES_MASKS)
            if not {*_SAY_IMAGES}.isdisjoint(inspect.signature(code).parameters):
                return code
    return None


def _rules_of(module: nn.Module, config: Any) -> dict[str, BlockRule]:
    """By the kind of layer, as configs name it."""
    code = _mask_code(module)
    masks = None if code is None else _masks(code, config)
    if not isinstance(masks, dict) or not all(isinstance(mask, torch.Tensor) for mask in masks.values()):
        raise UnsupportedError(f"{_unknown(module)} that do not tell which layers do. {_REMEDY}")
    return {kind: _rule_of(mask[0, 0] == 0) for kind, mask in masks.items()}


def _masks(code: Callable[..., Any], config: Any) -> Any:
    """Of the row, by kind of layer: float [1, 1, 5, 5], 0 where a token is seen."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # which gets its masks written out
    config.sliding_window = _WINDOW
    known: dict[str, Any] = {"config": config, "cache_position": torch.arange(len(_ROW))}
    known |= dict.fromkeys(("inputs_embeds", "input_embeds"), torch.zeros(1, len(_ROW), 1, device="cpu"))
    known |= dict.fromkeys(_SAY_IMAGES, torch.tensor([_ROW], device="cpu"))
    known |= dict.fromkeys(("attention_mask", "cache", "past_key_values", "position_ids"))
    return code(**{name: known[name] for name in inspect.signature(code).parameters if name in known})


def _rule_of(visible: torch.Tensor) -> BlockRule:
    """visible: bool [5, 5] of the row."""
    sees_ahead, sees_back, has_window = visible[1, 3], visible[3, 1], not visible[4, 1]
    if not sees_ahead:
        return "causal"
    return "whole" if sees_back and has_window else "windowed"
