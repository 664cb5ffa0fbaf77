"""Our dispatcher in front of the attention implementation that a model already has, under that implementation's name.

`install(model)` wraps what the language model's attention layers look up: the entry of their implementation in
transformers' `AttentionInterface`, or, for "eager", the function of that name in their modeling file. Neither the model
nor its config changes, so everything that asks for the name, saves the model or sets another implementation finds what
it would find without us. A call without a tree goes to the function behind with the arguments it came with, whatever
model or vision tower makes it, so the dispatcher can stay on for good.

It stays until `uninstall`, and then as long as graphs of tree calls are alive: a checkpointed layer looks its attention
up again when it is recomputed in the backward pass, and the function behind would ignore the tree without a word.
Whoever is about to make a tree call installs, which costs little and wraps what was registered in the meantime.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, MutableMapping
from types import FunctionType
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from dta_plugin.attention.api import tree_attention
from dta_plugin.attention.chunked import chunked_tree_attention
from dta_plugin.attention.mask import TreeMask
from dta_plugin.dtypes import compute_dtype
from dta_plugin.errors import UnsupportedError
from dta_plugin.models.attention_keywords import check_keywords
from dta_plugin.models.image_blocks import block_rule
from dta_plugin.models.layers import chunk_size, indexed_modules
from dta_plugin.models.stand_in import SHARED_ATTENTION, StandIn

Entries = MutableMapping[str, Any]

# Classes of attention whose masks are of keys chosen by an index: along a tree all are (indexers.py).
INDEXED: WeakSet[type[nn.Module]] = WeakSet()


def install(model: PreTrainedModel, is_required: bool = True) -> None:
    """Route the language model's attention through `tree_attention` whenever a call carries a tree. Idempotent.

    is_required: UnsupportedError is raised for a model without any that can be.
    """
    places = list(_places(model))
    if is_required and not places:
        raise UnsupportedError(
            f"No attention layer of {type(model).__name__} looks its implementation "
            f"{model.config.get_text_config()._attn_implementation!r} up in transformers' AttentionInterface. Expected "
            "all to; use a current transformers implementation of the model."
        )
    for place, key in places:
        Dispatcher.install(place, key, model)


def is_installable(model: PreTrainedModel) -> bool:
    """Whether attention layers of the language model look their implementation up where `install` can stand."""
    return any(True for _ in _places(model))


def uninstall(model: PreTrainedModel | None = None) -> None:
    """The model has no need of dispatchers any more; None: no model has. Those that none needs give way.

    What stood there before is put back, at once or with the last graph of a tree call, unless somebody has registered
    something else in the meantime, which stays.
    """
    Dispatcher.uninstall(model)


class Dispatcher(StandIn):
    """Attention with a tree by `tree_attention`, without one by the function that it stands in front of."""

    def __call__(
        self, *args: Any, dta_tree: TreeMask | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        tree = dta_tree or carried(kwargs.get("attention_mask") if len(args) < 5 else args[4])
        return self.behind(*args, **kwargs) if tree is None else _tree_call(tree, *args, **kwargs)


def carry(placeholder: torch.Tensor, tree: TreeMask) -> torch.Tensor:
    """The attention mask that stands for a tree, with the tree: some layers hand on no keywords, but all hand it on."""
    placeholder.dta_tree = tree  # type: ignore[attr-defined]
    return placeholder


def carried(attention_mask: torch.Tensor | None) -> TreeMask | None:
    """The tree that came with an attention mask."""
    return getattr(attention_mask, "dta_tree", None)


def _tree_call(
    tree: TreeMask,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if attention_mask is not None and attention_mask.numel() > 1 and type(module) not in INDEXED:
        raise UnsupportedError(
            f"{type(module).__name__} adds a mask or bias of its own to attention, of shape "
            f"{tuple(attention_mask.shape)}. Expected the causal mask alone, which the tree replaces; use another "
            "model."
        )
    check_keywords(module, kwargs, both_ways=not tree.layers_rule)
    query, key, value = _autocast(_tuned_by_depth(module, query, tree), key, value)
    layer = cast(int, module.layer_idx)
    options = {
        "scale": kwargs.get("scaling"),
        "window": kwargs.get("sliding_window"),
        "softcap": kwargs.get("softcap"),
        "sinks": kwargs.get("s_aux"),
    }
    mask, chunk = tree.at_layer(layer), chunk_size(cast(Any, module).config, layer)
    if mask.reach is not None and mask.layers_rule:
        mask = mask.ruled(block_rule(module))
    if chunk is None:
        out = tree_attention(query, key, value, mask, **options)
    else:
        out = chunked_tree_attention(query, key, value, mask, chunk, **options)
    tree.calls[layer] += 1
    return out.transpose(1, 2), None


def _tuned_by_depth(module: nn.Module, query: torch.Tensor, tree: TreeMask) -> torch.Tensor:
    """Llama 4 scales queries by their position, which it counts along the row: here it is their depth."""
    layer = cast(Any, module)
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return query

    def scale(position: torch.Tensor) -> torch.Tensor:
        steps: torch.Tensor = torch.log1p(torch.floor((position.float() + 1.0) / layer.floor_scale))
        return steps * layer.attn_scale + 1.0

    count = query.shape[2]
    factor = scale(tree.depth[-count:]) / scale(torch.arange(count, device=query.device))
    return (query * factor[:, None]).to(query.dtype)


def _autocast(*inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    """Under autocast, one dtype, as torch's own attention has it: rotary positions leave query and key in float32."""
    return (x.to(compute_dtype(x.device.type, x.dtype)) for x in inputs)


def _places(model: PreTrainedModel) -> Iterator[tuple[Entries, str]]:
    """Where the attention layers of the language model look their functions up: (mapping, key)."""
    layers: dict[object, tuple[nn.Module, str]] = {}
    for module in indexed_modules(model):
        own = vars(module)
        name = own["config"]._attn_implementation or "eager"
        own_forward = getattr(own.get("forward"), "__func__", None)
        layers[type(module), own_forward, name] = (module, name)
    for layer, name in layers.values():
        for file in _files(layer):
            for key, value in list(file.items()):
                if name == "eager" and key.endswith("eager_attention_forward") and callable(value):
                    yield file, key  # some carry a prefix
                elif name != "eager" and isinstance(value, AttentionInterface) and name in value:
                    yield (SHARED_ATTENTION if value[name] is SHARED_ATTENTION.get(name) else value), name


def _files(layer: nn.Module) -> list[dict[str, Any]]:
    """The globals of every file that has a method of the layer, its parent classes' included but nn.Module's."""
    parents = [parent for parent in type(layer).__mro__ if parent not in nn.Module.__mro__]
    methods = [method for parent in parents for method in vars(parent).values()]
    functions = [inspect.unwrap(method) for method in (*methods, vars(layer).get("forward")) if callable(method)]
    functions = [getattr(function, "__func__", function) for function in functions]
    found = {id(f.__globals__): f.__globals__ for f in functions if isinstance(f, FunctionType)}
    return list(found.values())
