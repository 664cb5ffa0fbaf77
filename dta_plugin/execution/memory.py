"""How many tree tokens may have their activations alive at once: by free memory, or learned from running out of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.execution.host_memory import free_host_bytes
from dta_plugin.models.introspection import is_checkpointed, say_guessed
from dta_plugin.models.sizes import attention_sizes, feed_forward_numbers, mixer_numbers
from dta_plugin.models.tiled_logprobs import KEEP_BYTES

log = logging.getLogger("dta_plugin")

# Share of the free memory that activations may take. The rest is for gradients of parameters, the arena, and what the
# estimate of `bytes_per_token` misses.
_SHARE = 0.5
# What RuntimeErrors say: the CPU's allocator (on Linux, on Windows), CUDA's runtime, cuBLAS.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
# Of that, what is left for them where the LM head may keep more than there is.
_LEAST_SHARE = 0.25
_learned: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def token_budget(model: PreTrainedModel, device: torch.device, limit: int | None) -> int:
    """Tokens per chunk: what the user wants, or what free memory allows; less if that ran out of memory before."""
    if limit is None:
        available = _SHARE * free_bytes(device)
        limit = int(max(available - KEEP_BYTES, _LEAST_SHARE * available)) // bytes_per_token(model)
    return max(1, min(limit, _learned.get(model, limit)))


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


@contextmanager
def budget_kept(model: PreTrainedModel) -> Iterator[None]:
    """What is learned about the budget within the context is forgotten."""
    before = _learned.get(model)
    try:
        yield
    finally:
        _learned.pop(model, None)
        if before is not None:
            _learned[model] = before


# Looked at once per model and checkpointing: the estimate walks all modules.
_estimates: WeakKeyDictionary[nn.Module, dict[bool, int]] = WeakKeyDictionary()


def bytes_per_token(model: PreTrainedModel) -> int:
    """Estimate of what one token's forward pass saves for the backward pass in the decoder layers; never raises.

    Counts the usual pre-norm decoder: two norms, attention or a recurrent module, a gated MLP, two residuals. With
    gradient checkpointing one hidden state per layer and a single layer in full.
    """
    recomputes = model.training and is_checkpointed(model)
    estimates = _estimates.setdefault(model, {})
    if recomputes not in estimates:
        try:
            elements = _saved_elements(model, recomputes)
        except Exception as error:
            say_guessed("memory per token", model, error)
            elements = _GUESSED_ELEMENTS
        estimates[recomputes] = elements * model.dtype.itemsize
    return estimates[recomputes]


# What a recurrent module saves, in units of the width of its projections: as measured for delta rules and Mamba 2;
# convolutions alone save less.
_MIXER_WIDTHS = 5
# Of a model that cannot be read: 30 layers in full with hidden states of 4096.
_GUESSED_ELEMENTS = 30 * 30 * 4096


def _saved_elements(model: PreTrainedModel, recomputes: bool) -> int:
    hidden, attention = model.config.get_text_config().hidden_size, attention_sizes(model)
    per_layer = [8 * hidden + sum(x.head_dims) * (2 * x.heads + 3 * x.kv_heads) for x in attention]
    per_layer += [8 * hidden + math.ceil(_MIXER_WIDTHS * numbers / hidden) for numbers in mixer_numbers(model)]
    # A gated MLP saves five times its width and has three matrices of it.
    feed_forward = math.ceil(5 * feed_forward_numbers(model) / (3 * hidden))
    if recomputes:
        return len(per_layer) * hidden + max(per_layer) + feed_forward // len(per_layer)
    return sum(per_layer) + feed_forward


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be had, on a device or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def free_bytes(device: torch.device) -> int:
    """Memory of the device, or of the machine within this process's limits, that can be had."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_host_bytes()
