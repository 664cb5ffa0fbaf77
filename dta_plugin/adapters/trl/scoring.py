"""TRL's log-prob hook as a prefix tree: `_get_per_token_logps_and_entropies` of GRPOTrainer and RLOOTrainer.

Old, reference and policy passes all come through this one hook, and everything after it is a function of what it
returns, so no loss is patched.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dta_plugin.adapters.trl.state import TreeState
from dta_plugin.errors import InvalidInputError, UnsupportedModelError
from dta_plugin.execution.auto import run_tree
from dta_plugin.execution.batch import Batch, SequenceLogProbs, prepare
from dta_plugin.verify import check_logprobs

Hook = Callable[..., tuple[torch.Tensor | None, ...]]


def tree_log_probs(
    trainer: Any,
    state: TreeState,
    dense: Hook,
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    *args: Any,
    compute_entropy: bool = False,
    compute_aux_loss: bool = False,
    **inputs: Any,
) -> tuple[torch.Tensor | None, ...]:
    """The hook's contract: -> (logps [B, C], entropies [B, C] or None, aux loss or None), float32, 0 at padding.

    dense: the trainer's own bound method, which runs where the tree cannot or should not.
    input_ids, attention_mask: [B, P + C], prompts padded left and completions right. logits_to_keep: C.
    The aux loss is left out of the tuple for TRL versions whose hook returns two values.
    """

    def run_dense(reason: str, topic: str | None = None) -> tuple[torch.Tensor | None, ...]:
        state.say_once(trainer, f"dense path: {reason}", topic, logging.WARNING)
        if torch.is_grad_enabled():
            state.log_metrics(trainer, None)
        kwargs = {"compute_entropy": compute_entropy, **inputs}
        if _returns_aux_loss(dense):
            kwargs["compute_aux_loss"] = compute_aux_loss
        return dense(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    images = sorted(name for name, value in inputs.items() if value is not None and name != "batch_size")
    if images:
        reason = f"the batch has {', '.join(images)}: image tokens cannot be merged by token id; train on text"
        if state.config.on_unsupported == "error":
            raise UnsupportedModelError(
                f"Prefix-tree execution is not exact here: {reason}; or on_unsupported='dense'."
            )
        return run_dense(reason)

    real = attention_mask.bool()
    completion = real.clone()
    completion[:, :-logits_to_keep] = False
    batch = prepare(model, _unpadded(input_ids, real), _first_scored(real, completion), state.config)
    if not batch.use_tree:
        below_gate = batch.cost.saving < state.config.min_saving  # a reason with a number, different in every batch
        return run_dense(batch.reason, "min_saving" if below_gate else None)

    try:
        result = _run(trainer, state, model, batch, compute_entropy, compute_aux_loss)
    except UnsupportedModelError as error:  # found only while running, such as a layer that bypasses the tree
        if state.config.on_unsupported == "error":
            raise
        return run_dense(str(error))
    state.calls += 1
    if torch.is_grad_enabled():
        state.say_once(trainer, str(result.report), topic="report")
        state.log_metrics(trainer, result)
    logps = _as_columns(result.logprobs, completion, logits_to_keep)
    entropies = None if result.entropies is None else _as_columns(result.entropies, completion, logits_to_keep)
    return (logps, entropies, result.router_loss) if _returns_aux_loss(dense) else (logps, entropies)


def _run(
    trainer: Any, state: TreeState, model: torch.nn.Module, batch: Batch, compute_entropy: bool, compute_aux_loss: bool
) -> SequenceLogProbs:
    """Verify the batch if it is its turn, then run it."""
    with trainer.accelerator.autocast():
        if state.config.verifies(state.calls):
            difference = check_logprobs(model, batch, state.config, trainer.temperature)
            state.say(trainer, f"call {state.calls} verified against dense: log-probs agree to {difference:.1e} nats")
        return run_tree(
            model,
            batch,
            state.config,
            temperature=trainer.temperature,
            return_entropy=compute_entropy,
            return_router_loss=compute_aux_loss,
            head_dtype=torch.float32 if getattr(trainer.args, "cast_lm_head_to_fp32", False) else None,
        )


def _unpadded(input_ids: torch.Tensor, real: torch.Tensor) -> list[np.ndarray]:
    """Padded rows [B, L] -> one array of real token ids per row."""
    ids, mask = input_ids.cpu().numpy(), real.cpu().numpy()
    return [row[keep] for row, keep in zip(ids, mask, strict=True)]


def _first_scored(real: torch.Tensor, completion: torch.Tensor) -> list[int]:
    """Per row, the number of prompt tokens: completions start there."""
    prompt_lengths = (real.sum(dim=1) - completion.sum(dim=1)).tolist()
    if min(prompt_lengths) < 1:
        raise InvalidInputError(
            f"Row {prompt_lengths.index(min(prompt_lengths))} has no prompt token. Expected at least one per row: the "
            "first completion token needs a token to be predicted from."
        )
    return prompt_lengths


def _as_columns(values: list[torch.Tensor], completion: torch.Tensor, columns: int) -> torch.Tensor:
    """Per-row values [len - 1] -> [B, C], 0 at padding."""
    counts = completion.sum(dim=1).tolist()
    flat = torch.cat([value[len(value) - count :] for value, count in zip(values, counts, strict=True)])
    padded = flat.new_zeros(completion.shape).masked_scatter(completion, flat)
    return padded[:, -columns:]


def _returns_aux_loss(hook: Hook) -> bool:
    """TRL 1.7 and newer return a third value."""
    return "compute_aux_loss" in inspect.signature(hook).parameters
