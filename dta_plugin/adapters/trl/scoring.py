"""TRL's log-prob hook as a prefix tree: `_get_per_token_logps_and_entropies` of GRPOTrainer and RLOOTrainer.

Old, reference and policy passes all come through this one hook, and everything after it is a function of what it
returns, so no loss is patched.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dta_plugin.adapters.trl.noise import noise_reason
from dta_plugin.adapters.trl.origin import replaced_scoring
from dta_plugin.adapters.trl.protocols import GRPOLike
from dta_plugin.adapters.trl.rows import MicroBatch, joined
from dta_plugin.adapters.trl.state import TreeState
from dta_plugin.adapters.trl.window import unwrapped
from dta_plugin.errors import UnsupportedError
from dta_plugin.execution.auto import run_tree
from dta_plugin.execution.prepared_batch import PreparedBatch, SequenceLogProbs, prepare_batch, saving_obstacle
from dta_plugin.execution.probing.probe import latest_outcome
from dta_plugin.verify import check_batch

Hook = Callable[..., tuple[torch.Tensor | None, ...]]


def tree_log_probs(
    trainer: GRPOLike,
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
    In an update, the mask of inputs with weights (see `weights`) names the tokens to score; the values of others, the
    balance too, are 0. The aux loss is left out of the tuple for TRL versions whose hook returns two values.
    """
    is_policy = torch.is_grad_enabled()
    has_weights = is_policy and state.hands_out_weights(trainer)
    micro_batch = MicroBatch.from_padded(input_ids, attention_mask, logits_to_keep, has_weights)

    def run_dense(reason: str, topic: str | None = None) -> tuple[torch.Tensor | None, ...]:
        state.why_dense = reason
        state.say_once(trainer, f"dense path: {reason}", topic, logging.WARNING)
        if torch.is_grad_enabled():
            state.log_metrics(trainer, None)
            state.loads.runs_dense()
        kwargs = {"compute_entropy": compute_entropy, **inputs}
        if _returns_aux_loss(dense):
            kwargs["compute_aux_loss"] = compute_aux_loss
        padded = (model, *micro_batch.padded(input_ids, attention_mask))
        return tuple(map(micro_batch.only_scored, dense(*padded, *args, **kwargs)))

    reason = replaced_scoring(trainer) or noise_reason(trainer) or _image_reason(inputs)
    if reason is not None:
        if state.config.on_unsupported == "error":
            raise UnsupportedError(f"Prefix-tree execution is not exact here: {reason}; or on_unsupported='dense'.")
        return run_dense(reason)

    def hook_values(logps: torch.Tensor, entropies: torch.Tensor | None, aux_loss: torch.Tensor | None = None) -> Any:
        columns = None if entropies is None else micro_batch.as_columns(entropies)
        if columns is not None and micro_batch.is_weighted:
            columns = state.with_mean_entropy(columns, micro_batch, attention_mask)
        values = (micro_batch.as_columns(logps), columns)
        return (*values, aux_loss) if _returns_aux_loss(dense) else values

    if is_policy and (waiting := state.windows.take(trainer, model, micro_batch)) is not None:
        return hook_values(*waiting)
    handed_out = state.of_this_pass() if is_policy else []
    together = state.windows.begin(trainer, micro_batch, handed_out) if handed_out else [micro_batch]
    target = model if len(together) == 1 else unwrapped(model)
    sequences, first_scored = joined(together)
    instead = [batch.shape for batch in together]
    most_scored = max(len(row) - first for row, first in zip(sequences, first_scored, strict=True))
    with trainer.accelerator.autocast():  # measured speeds are those of a precision
        why = saving_obstacle(model, max(map(len, sequences)), most_scored, instead, state.config)
        scored = [mask for batch in together for mask in batch.wanted]
        batch = prepare_batch(model, sequences, scored, state.config, instead) if why is None else None
    if batch is None:
        return run_dense(str(why), "min_saving")
    if not batch.use_tree:  # the gate's reason has a number, different in every batch
        return run_dense(batch.reason, "min_saving" if batch.is_gated else None)

    try:
        result = _run(trainer, state, target, batch, compute_entropy, compute_aux_loss)
    except UnsupportedError as error:  # found only while running, such as a layer that bypasses the tree
        if state.config.on_unsupported == "error":
            raise
        return run_dense(str(error))
    state.calls += 1
    if is_policy:
        report = replace(result.report, pruned_tokens=state.pruned_tokens(trainer, len(together)))
        state.say_once(trainer, str(report), topic="idle" if report.is_idle else "report")
        state.log_metrics(trainer, report)
    if len(together) > 1:
        window = f"{len(together)} micro-batches of an accumulation window run as one tree (merge_window)"
        state.say_once(trainer, window, topic="window")
        return hook_values(*state.windows.opened(trainer, model, together, result))
    entropies = None if result.entropies is None else micro_batch.scored_values(result.entropies)
    return hook_values(micro_batch.scored_values(result.logprobs), entropies, result.router_loss)


def _run(
    trainer: GRPOLike,
    state: TreeState,
    model: torch.nn.Module,
    batch: PreparedBatch,
    compute_entropy: bool,
    compute_aux_loss: bool,
) -> SequenceLogProbs:
    """Verify the batch if it is its turn, then run it."""
    with trainer.accelerator.autocast():
        if state.config.verifies(state.calls):
            difference = check_batch(model, batch, state.config, trainer.temperature)
            state.say(trainer, f"call {state.calls} verified against dense: {difference}")
        result = run_tree(
            model,
            batch,
            state.config,
            temperature=trainer.temperature,
            return_entropy=compute_entropy,
            return_router_loss=compute_aux_loss,
            head_dtype=torch.float32 if getattr(trainer.args, "cast_lm_head_to_fp32", False) else None,
        )
    if (outcome := latest_outcome(model)) is not None:
        state.say_once(trainer, str(outcome))
    return result


def _image_reason(inputs: dict[str, Any]) -> str | None:
    images = sorted(name for name, value in inputs.items() if value is not None and name != "batch_size")
    if not images:
        return None
    return f"the batch has {', '.join(images)}: image tokens cannot be merged by token id; train on text"


def _returns_aux_loss(hook: Hook) -> bool:
    """TRL 1.7 and newer return a third value."""
    return "compute_aux_loss" in inspect.signature(hook).parameters
