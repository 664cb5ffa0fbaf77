"""The sizes of a model's layers, how much of it every token passes, and what that costs: read off its modules.

Configs do not say it: sizes differ by layer, quantised weights are stored in other shapes, embeddings are tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.models.layers import attention_modules, layer_types, number
from dta_plugin.models.recurrent_layers import layer_of, mixers
from dta_plugin.tree.cost import ModelCost

# The layer that attention says it is in where several layers share it.
_SHARED = -1
# Kinds of layers that only feed forward.
_WITHOUT = ("mlp", "moe")
_OUTPUTS = ("o_proj", "out_proj", "dense", "wo", "c_proj")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE_EXPERTS = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")


@dataclass(frozen=True, slots=True)
class AttentionSizes:
    """One layer's attention. head_dims: of keys and of values. window: None for full attention."""

    heads: int
    kv_heads: int
    head_dims: tuple[int, int]
    window: int | None


def attention_sizes(model: PreTrainedModel) -> list[AttentionSizes]:
    """The sizes of every layer that attends, as its module has them, or else as the config says."""
    config = model.config.get_text_config()
    modules = attention_modules(model)
    recurrent = {layer_of(mixer) for mixer in mixers(model)}
    found = []
    for index, kind in enumerate(layer_types(config)):
        shared = modules.get(_SHARED) if kind.startswith("hybrid") else None
        module = modules.get(index, shared)
        if module is not None or not (index in recurrent or kind in _WITHOUT):
            found.append(_sizes(module, config, kind))
    return found


def _sizes(module: nn.Module | None, config: Any, kind: str) -> AttentionSizes:
    heads = number(module, "num_heads", "num_attention_heads") or config.num_attention_heads
    width = number(module, "qk_head_dim", "head_dim", "head_size") or _head_dim(config)
    value_width = number(module, "v_head_dim") or width
    output = next((o for o in (getattr(module, name, None) for name in _OUTPUTS) if hasattr(o, "in_features")), None)
    if output is not None:
        heads = output.in_features // value_width or heads
    groups = number(module, "num_key_value_groups")
    kv_heads = heads // groups if groups else number(config, "num_key_value_heads") or heads
    window = number(module, "sliding_window") or number(config, "sliding_window")
    return AttentionSizes(heads, kv_heads, (width, value_width), window if kind.startswith("sliding") else None)


def _head_dim(config: Any) -> int:
    return number(config, "head_dim") or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True, slots=True)
class StateSizes:
    """One recurrent layer. channels: that its convolutions have. state: numbers, of all heads; 0 without a scan.

    width: how many numbers of a state's rows and columns, over all heads, a token reads or writes.
    """

    channels: int
    state: int
    width: int


def state_sizes(model: PreTrainedModel) -> list[StateSizes]:
    """The sizes of every recurrent layer, as far as its module has them."""
    return [_state_sizes(mixer) for mixer in mixers(model)]


def _state_sizes(mixer: nn.Module) -> StateSizes:
    channels = sum(child.in_channels for child in mixer.children() if isinstance(child, nn.Conv1d))
    keys = number(mixer, "head_k_dim", "ssm_state_size", "head_dim") or 0
    heads = number(mixer, "num_v_heads", "num_heads")
    if heads is None:  # Mamba 1 has a state for every channel, LFM2 none
        return StateSizes(channels, channels * keys, 0)
    values = number(mixer, "head_v_dim", "head_dim") or 0
    return StateSizes(channels, heads * keys * values, heads * (keys + values))


# Tokens per block within which a scan compares all with all.
_BLOCK = 64


def _scan_flops(layer: StateSizes) -> float:
    """Per token: to read the state, to take from it and to write to it, and two triangles within its block."""
    return 6.0 * layer.state + 2.0 * _BLOCK * layer.width


def counted_cost(model: PreTrainedModel) -> ModelCost:
    """FLOPs of the forward pass, two per multiply-add."""
    config = model.config.get_text_config()
    per_pair = 0.0
    per_window: dict[int, float] = {}
    for layer in attention_sizes(model):
        flops = 2.0 * layer.heads * sum(layer.head_dims)
        if layer.window is None:
            per_pair += flops
        else:
            per_window[layer.window] = per_window.get(layer.window, 0.0) + flops
    scans = sum(map(_scan_flops, state_sizes(model)))
    return ModelCost(
        per_token=2.0 * sum(numbers for _, numbers in active_matrices(model)) + scans,
        per_pair=per_pair,
        per_scored=2.0 * config.hidden_size * config.vocab_size,
        per_window_pair=tuple(sorted(per_window.items())),
    )


def feed_forward_numbers(model: PreTrainedModel) -> float:
    """How many numbers of matrices outside attention multiply every token."""
    within = {id(m) for attention in attention_modules(model).values() for m in attention.modules()}
    return sum(numbers for module, numbers in active_matrices(model) if id(module) not in within)


def active_matrices(model: PreTrainedModel) -> Iterator[tuple[nn.Module, float]]:
    """(module, numbers in its own matrices): of the language model, experts as far as they are active, no LM head."""
    share = _active_share(model.config.get_text_config())
    head = model.get_output_embeddings()
    seen = {id(getattr(table, "weight", None)) for table in (head, model.get_input_embeddings())}
    for name, module in _decoder(model).named_modules():
        if isinstance(module, nn.Embedding) or module is head:
            continue
        numbers = _own_numbers(module, seen)
        if numbers:
            yield module, numbers * (share if ".experts." in f".{name}." else 1.0)


def matrix_numbers(modules: Iterable[nn.Module]) -> int:
    """How many numbers these modules have in their own matrices, tables included."""
    seen: set[int] = set()
    return sum(_own_numbers(module, seen) for module in modules)


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The language model alone, without vision towers."""
    found = model.get_decoder()
    return found if isinstance(found, nn.Module) else model


def _own_numbers(module: nn.Module, seen: set[int]) -> int:
    """A linear layer's by its features, since its weight may be packed, sharded or flattened; others' by shape."""
    own = [p for p in (*module._parameters.values(), *module._buffers.values()) if p is not None]
    features: Any = [getattr(module, name, None) for name in ("in_features", "out_features")]
    if own and all(isinstance(size, int) for size in features):
        weight = getattr(module, "weight", own[0])
        found = [] if id(weight) in seen else [features]
        seen.add(id(weight))
    else:
        matrices = {id(p): _shape(p) for p in module._parameters.values() if p is not None and len(_shape(p)) >= 2}
        found = [shape for key, shape in matrices.items() if key not in seen]
        seen.update(matrices)
    return sum(math.prod(shape) for shape in found)


def _shape(parameter: torch.Tensor) -> Any:
    """Shape of the whole parameter, also where DeepSpeed ZeRO-3 has left nothing of it here, or bits are packed."""
    packed = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return packed or getattr(parameter, "ds_shape", parameter.shape)


def _active_share(config: Any) -> float:
    """The share of experts that a token passes."""
    experts, active = (
        next(filter(None, (getattr(config, name, None) for name in names)), None)
        for names in (_EXPERTS, _ACTIVE_EXPERTS)
    )
    return active / experts if experts and active else 1.0
