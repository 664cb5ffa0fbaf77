"""PEFT methods that are exact on a tree, by name: those that were shown to be. A method of another name is refused.

Most methods change weights, or hidden states token by token, and never see what a tree changes: how many tokens a row
has, in which order, and how many rows there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from dta_plugin.models.introspection import wrappings

_EXACT = {
    "ADALORA",
    "BEFT",
    "BOFT",
    "C3A",
    "DEFT",
    "DELORA",
    "FOURIERFT",
    "FROD",
    "GLORA",
    "GRALORA",
    "HIRA",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "LORA",
    "MISS",
    "OFT",
    "PEANUT",
    "PVERA",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "SUPERTUNING",
    "TINYLORA",
    "TRAINABLE_TOKENS",
    "UNILORA",
    "VBLORA",
    "VERA",
    "WAVEFT",
}
_REMEDY = "use LoRA or full fine-tuning"


def adapter_obstacle(model: nn.Module) -> str | None:
    """Why the active adapters of a model, wrapped or not, cannot run as a tree; None if they can."""
    return next((reason for config in _active(model) if (reason := _method_obstacle(config))), None)


def _method_obstacle(config: Any) -> str | None:
    kind = config.peft_type
    name = str(getattr(kind, "value", kind))
    if config.is_prompt_learning:
        return f"{name} adds virtual tokens to every row of a batch; {_REMEDY}"
    if getattr(config, "alora_invocation_tokens", None):
        return (
            "activated LoRA looks for its invocation tokens row by row (alora_invocation_tokens); use LoRA without them"
        )
    if getattr(config, "arrow_config", None):
        return "LoRA with an arrow_config routes by adapters that were not shown to be exact on a tree; leave it out"
    if name not in _EXACT:
        return f"the PEFT method {name} was not shown to be exact on a tree, where rows become one; {_REMEDY}"
    return None


def _active(model: nn.Module) -> Iterator[Any]:
    """The configs of active adapters, in PEFT's own wrapper or in a model that adapters were put into."""
    for owner in wrappings(model):
        configs = getattr(owner, "peft_config", None)
        if isinstance(configs, dict):
            stated = getattr(owner, "active_adapters", None)
            names = stated if isinstance(stated, list) else _active_in_layers(owner)
            yield from (config for name, config in configs.items() if name in names)
            return


def _active_in_layers(model: nn.Module) -> set[str]:
    """What the adapted layers say; the model's own answer needs a version of PEFT that may not be there."""
    stated = (getattr(module, "active_adapters", None) for module in model.modules() if module is not model)
    return {name for names in stated if isinstance(names, list) for name in names}
