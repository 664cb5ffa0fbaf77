"""Tiny random checkpoints in the formats of released diffusion LMs, and their forward passes written out in torch.

The forward passes are written from the architectures alone and work on the checkpoints' own parameter names, so that
what loads a checkpoint has something independent to agree with. Sizes are ugly on purpose: query, key, value and
hidden widths differ, and no parameter is left at its initial value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

State = dict[str, torch.Tensor]
LAYERS, WIDTH, HIDDEN, HEADS, KV_HEADS, ROWS = 2, 24, 40, 4, 2, 56

_LLADA: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": WIDTH,
    "embedding_size": ROWS,
    "eos_token_id": 3,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 50,
    "max_sequence_length": 128,
    "mlp_hidden_size": HIDDEN,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": HEADS,
    "n_kv_heads": HEADS,
    "n_layers": LAYERS,
    "pad_token_id": 3,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-3,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 5000.0,
    "scale_logits": False,
    "use_cache": False,
    "vocab_size": 54,
    "weight_tying": False,
}
_DECODER: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 3,
    "eos_token_id": 3,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": HIDDEN,
    "mask_token_id": 50,
    "max_position_embeddings": 128,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-3,
    "rope_scaling": None,
    "rope_theta": 3000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": False,
    "vocab_size": ROWS,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llada": _LLADA,
    "illada": _DECODER
    | {
        "architectures": ["ILLaDAForCausalLM"],
        "attention_bias": False,
        "layer_norm_eps": None,
        "mlp_bias": False,
        "model_type": "illada",
        "pad_token_id": 1,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": True,
    },
    "dream": _DECODER | {"architectures": ["DreamModel"], "model_type": "Dream", "pad_token_id": 3},
    "sdar": _DECODER
    | {
        "architectures": ["SDARForCausalLM"],
        "attention_bias": False,
        "attn_implementation": "flex_attention",
        "block_size": 4,
        "head_dim": 8,
        "model_type": "sdar",
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "a2d": _DECODER | {"architectures": ["A2DQwen3LMHeadModel"], "head_dim": 8, "model_type": "a2d-qwen3"},
}
FAMILIES = tuple(_FAMILIES)


def released_config(family: str, **changes: Any) -> dict[str, Any]:
    """The entries of a tiny config.json as the family's checkpoints have them."""
    return _FAMILIES[family] | changes


def released_state(config: Mapping[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> State:
    """Random parameters under the checkpoint's own names, large enough that attention and gates matter."""
    generator = torch.Generator().manual_seed(seed)
    shapes = _llada_shapes(config) if config["model_type"] == "llada" else _decoder_shapes(config)
    offset = {name: 1.0 if "norm" in name or "ln_f" in name else 0.0 for name in shapes}
    return {n: (offset[n] + 0.3 * torch.randn(s, generator=generator)).to(dtype) for n, s in shapes.items()}


def write_checkpoint(directory: Path, config: Mapping[str, Any], state: State, shards: int = 1) -> Path:
    """config.json and safetensors, in several shards with an index or in one file."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if shards == 1:
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names = sorted(state)
    weight_map = {n: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(names)}
    for shard in set(weight_map.values()):
        part = {name: state[name] for name in names if weight_map[name] == shard}
        save_file(part, directory / shard, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def released_logits(config: Mapping[str, Any], state: State, ids: torch.Tensor) -> torch.Tensor:
    """Logits [S, V] of the family's own model for ids [S], in the order in which it returns them."""
    if config["model_type"] == "llada":
        return _llada_logits(config, state, ids)
    return _decoder_logits(config, state, ids)


def _llada_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    keys = WIDTH // HEADS * (config["n_kv_heads"] or HEADS)
    hidden = config["mlp_hidden_size"] or config["mlp_ratio"] * WIDTH
    shapes: dict[str, tuple[int, ...]] = {"model.transformer.wte.weight": (ROWS, WIDTH)}
    for i in range(LAYERS):
        block = {"attn_norm": (WIDTH,), "ff_norm": (WIDTH,), "q_proj": (WIDTH, WIDTH), "attn_out": (WIDTH, WIDTH)}
        block |= {"k_proj": (keys, WIDTH), "v_proj": (keys, WIDTH)}
        block |= {"ff_proj": (hidden, WIDTH), "up_proj": (hidden, WIDTH), "ff_out": (WIDTH, hidden)}
        shapes |= {f"model.transformer.blocks.{i}.{name}.weight": shape for name, shape in block.items()}
    shapes["model.transformer.ln_f.weight"] = (WIDTH,)
    return shapes if config["weight_tying"] else shapes | {"model.transformer.ff_out.weight": (ROWS, WIDTH)}


def _decoder_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    size = config.get("head_dim") or WIDTH // HEADS
    queries, keys = HEADS * size, KV_HEADS * size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, WIDTH)}
    for i in range(LAYERS):
        layer = {"input_layernorm.weight": (WIDTH,), "post_attention_layernorm.weight": (WIDTH,)}
        layer |= {"self_attn.q_proj.weight": (queries, WIDTH), "self_attn.o_proj.weight": (WIDTH, queries)}
        layer |= {"self_attn.k_proj.weight": (keys, WIDTH), "self_attn.v_proj.weight": (keys, WIDTH)}
        layer |= {"mlp.gate_proj.weight": (HIDDEN, WIDTH), "mlp.up_proj.weight": (HIDDEN, WIDTH)}
        layer |= {"mlp.down_proj.weight": (WIDTH, HIDDEN)}
        if config["model_type"] == "Dream":
            layer |= {"self_attn.q_proj.bias": (queries,), "self_attn.k_proj.bias": (keys,)}
            layer |= {"self_attn.v_proj.bias": (keys,)}
        if config["model_type"] in ("sdar", "a2d-qwen3"):
            layer |= {"self_attn.q_norm.weight": (size,), "self_attn.k_norm.weight": (size,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (WIDTH,)
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": (ROWS, WIDTH)}


def _llada_logits(config: Mapping[str, Any], state: State, ids: torch.Tensor) -> torch.Tensor:
    theta, eps, groups = config["rope_theta"], config["rms_norm_eps"], config["n_kv_heads"] or HEADS
    x = state["model.transformer.wte.weight"][ids]
    for i in range(LAYERS):
        w = {n: state[f"model.transformer.blocks.{i}.{n}.weight"] for n in _BLOCK}
        h = _norm(x, w["attn_norm"], eps)
        q = _rotate(_heads(h @ w["q_proj"].T, HEADS), theta)
        k = _rotate(_heads(h @ w["k_proj"].T, groups), theta)
        x = x + _attend(q, k, _heads(h @ w["v_proj"].T, groups), None) @ w["attn_out"].T
        h = _norm(x, w["ff_norm"], eps)
        x = x + (F.silu(h @ w["ff_proj"].T) * (h @ w["up_proj"].T)) @ w["ff_out"].T
    x = _norm(x, state["model.transformer.ln_f.weight"], eps)
    head = "model.transformer.wte.weight" if config["weight_tying"] else "model.transformer.ff_out.weight"
    return x @ state[head].T


_BLOCK = ("attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")


def _decoder_logits(config: Mapping[str, Any], state: State, ids: torch.Tensor) -> torch.Tensor:
    theta, eps, block = config["rope_theta"], config["rms_norm_eps"], config.get("block_size")
    x = state["model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        w = {n.removeprefix(f"model.layers.{i}."): t for n, t in state.items() if n.startswith(f"model.layers.{i}.")}
        h = _norm(x, w["input_layernorm.weight"], eps)
        q, k, v = (F.linear(h, w[f"self_attn.{n}.weight"], w.get(f"self_attn.{n}.bias")) for n in _QKV)
        q, k, v = _heads(q, HEADS), _heads(k, KV_HEADS), _heads(v, KV_HEADS)
        if "self_attn.q_norm.weight" in w:
            q, k = _norm(q, w["self_attn.q_norm.weight"], eps), _norm(k, w["self_attn.k_norm.weight"], eps)
        x = x + _attend(_rotate(q, theta), _rotate(k, theta), v, block) @ w["self_attn.o_proj.weight"].T
        h = _norm(x, w["post_attention_layernorm.weight"], eps)
        gate, up = h @ w["mlp.gate_proj.weight"].T, h @ w["mlp.up_proj.weight"].T
        x = x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return _norm(x, state["model.norm.weight"], eps) @ state[head].T


_QKV = ("q_proj", "k_proj", "v_proj")


def _norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    return gain * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[S, H * D] -> [H, S, D]"""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


def _rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding of [H, S, D]: entries k and k + D/2 are a complex number, turned by position / theta^(2k/D)."""
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half) / half)
    angle = torch.arange(x.shape[-2])[:, None] * speed
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int | None) -> torch.Tensor:
    """[H, S, D] queries, [G, S, D] keys and values -> [S, H * D]; a token sees its own and earlier blocks, or all."""
    shared = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(shared, dim=0), v.repeat_interleave(shared, dim=0)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if block is not None:
        of = torch.arange(q.shape[1]) // block
        scores = scores.masked_fill(of[None, :] > of[:, None], float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
