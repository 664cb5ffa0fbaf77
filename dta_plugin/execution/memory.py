"""How many tree tokens may have their activations alive at once: by free memory, or learned from running out of it."""

from __future__ import annotations

import logging
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.execution.model import head_dim
from dta_plugin.logprobs import KEEP_BYTES

log = logging.getLogger("dta_plugin")

# Share of the free memory that activations may take. The rest is for gradients of parameters, the arena, and what the
# estimate of `bytes_per_token` misses.
_SHARE = 0.5
_learned: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def token_budget(model: PreTrainedModel, device: torch.device, wanted: int | None) -> int:
    """Tokens per chunk: what the user wants, or what free memory allows; less if that ran out of memory before."""
    if wanted is None:
        wanted = int(_SHARE * _free_bytes(device) - KEEP_BYTES) // bytes_per_token(model)
    return max(1, min(wanted, _learned.get(model, wanted)))


def halve(model: PreTrainedModel, budget: int) -> int | None:
    """The budget to go on with after `budget` ran out of memory; None if it cannot be less. Said once per step down."""
    if budget <= 1:
        return None
    _learned[model] = budget // 2
    log.warning(
        "dta: out of memory with %d tokens per chunk; going on with %d (max_tree_tokens_per_chunk sets it)",
        budget,
        budget // 2,
    )
    return budget // 2


def bytes_per_token(model: PreTrainedModel) -> int:
    """Estimate of what one token's forward pass saves for the backward pass in the decoder layers.

    Counts the usual pre-norm decoder: two norms, attention, a gated MLP, two residuals. With gradient checkpointing
    one hidden state per layer and a single layer in full.
    """
    config = model.config.get_text_config()
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    active = getattr(config, "num_experts_per_tok", None) or 1
    norms, attention = 8 * hidden, (4 * heads + 6 * kv_heads) * head_dim(model)
    layer = norms + attention + 5 * inner * active
    is_checkpointed = model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    elements = layers * hidden + layer if is_checkpointed else layers * layer
    return elements * model.dtype.itemsize


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 8 * 2**30
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024
