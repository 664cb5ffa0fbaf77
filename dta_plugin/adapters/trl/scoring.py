"""TRL's log-prob hook as a prefix tree: `_get_per_token_logps_and_entropies` of GRPOTrainer and RLOOTrainer.

Old, reference and policy passes all come through this one hook, and everything after it is a function of what it
returns, so no loss is patched. `tree_log_probs` is four steps: the rows as sequences; why they cannot run as a tree;
what runs, alone or with the rest of an accumulation window; running it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from dta_plugin.adapters.trl.foreign_hooks import hook_notice, hook_obstacle
from dta_plugin.adapters.trl.image_rows import image_rows
from dta_plugin.adapters.trl.images import TOKEN_TYPES, input_obstacle
from dta_plugin.adapters.trl.micro_batch import MicroBatch, joined, joined_images
from dta_plugin.adapters.trl.noise import noise_obstacle
from dta_plugin.adapters.trl.origin import replaced_scoring, unknown_loss
from dta_plugin.adapters.trl.protocols import GRPOLike
from dta_plugin.adapters.trl.state import TreeState
from dta_plugin.adapters.trl.window import unwrapped
from dta_plugin.decline import Decline, decline
from dta_plugin.errors import UnsupportedError
from dta_plugin.execution.auto import run_tree
from dta_plugin.execution.gate import saving_obstacle
from dta_plugin.execution.prepared_batch import PreparedBatch, SequenceLogProbs, prepare_batch
from dta_plugin.execution.probing.probe import latest_outcome
from dta_plugin.models.introspection import causal_lm, wrappings
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
    In an update, the mask of inputs with weights (see `token_weights`) names the tokens to score; the values of others,
    the balance too, are 0. The aux loss is left out of the tuple for TRL versions whose hook returns two values.
    """
    has_weights = torch.is_grad_enabled() and state.hands_out_weights(trainer)
    images = image_rows(trainer.model, inputs, input_ids)
    micro_batch = MicroBatch.from_padded(input_ids, attention_mask, logits_to_keep, has_weights, images)
    call = _Call(trainer, state, model, micro_batch, attention_mask, compute_entropy, compute_aux_loss)

    def run_dense(why: Decline) -> tuple[torch.Tensor | None, ...]:
        call.say_dense(why)
        kwargs = {"compute_entropy": compute_entropy, **inputs}
        if _returns_aux_loss(dense):
            kwargs["compute_aux_loss"] = compute_aux_loss
        kwargs |= {name: micro_batch.without_balance(inputs[name]) for name in TOKEN_TYPES if name in inputs}
        padded = (model, *micro_batch.padded(input_ids, attention_mask))
        return tuple(map(micro_batch.only_scored, dense(*padded, *args, **kwargs)))

    whole = [*wrappings(model)][-1]
    obstacle = replaced_scoring(trainer) or noise_obstacle(trainer) or hook_obstacle(whole, unknown_loss(trainer))
    obstacle = obstacle or input_obstacle(causal_lm(trainer.model), inputs, input_ids, attention_mask)
    if obstacle is not None:
        return run_dense(decline(obstacle, state.config.on_unsupported))
    if (notice := hook_notice(whole)) is not None:
        state.notices.say_once(notice, "hooks", logging.WARNING)
    values = call.waiting_values()
    if values is None:
        plan = call.planned()
        if isinstance(plan, Decline):
            return run_dense(plan)
        try:
            values = call.run(plan)
        except UnsupportedError as error:  # found only while running, such as a layer that bypasses the tree
            return run_dense(decline(error, state.config.on_unsupported))
    returned = call.as_columns(*values)
    return returned if _returns_aux_loss(dense) else returned[:2]


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """What runs: micro-batches, the current one first, as one batch of sequences."""

    micro_batches: list[MicroBatch]
    batch: PreparedBatch


Returned = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """One call of the hook."""

    trainer: GRPOLike
    state: TreeState
    model: torch.nn.Module
    micro_batch: MicroBatch
    attention_mask: torch.Tensor
    compute_entropy: bool
    compute_aux_loss: bool

    def waiting_values(self) -> Returned | None:
        """Those of the current micro-batch [n], if the tree of its window has run; None if not."""
        if not torch.is_grad_enabled():
            return None
        waiting = self.state.windows.take(self.trainer, self.model, self.micro_batch)
        return None if waiting is None else (*waiting, None)

    def planned(self) -> _Plan | Decline:
        """What to run, alone or with the rest of the window, or why a tree cannot or does not pay."""
        state, micro_batches = self.state, [self.micro_batch]
        if torch.is_grad_enabled() and state.micro_steps:
            micro_batches = state.windows.begin(self.trainer, self.micro_batch, state.inputs_of_this_pass())
        rows, shapes = joined(micro_batches), [batch.shape for batch in micro_batches]
        images = joined_images(micro_batches)
        with self.trainer.accelerator.autocast():  # measured speeds are those of a precision
            if images is None:  # images save a tower's work, which takes more than a look at the rows to tell
                longest = max(map(len, rows.sequences))
                reason = saving_obstacle(self.model, longest, rows.most_scored, shapes, state.config)
                if reason is not None:
                    return Decline(reason, "min_saving")
            batch = prepare_batch(self.model, rows.sequences, rows.scored, state.config, shapes, images=images)
        decision = batch.decision
        if not decision.use_tree:  # the gate's reason has a number, different in every batch
            return Decline(decision.reason, "min_saving" if decision.is_gated else None)
        return _Plan(micro_batches, batch)

    def run(self, plan: _Plan) -> Returned:
        """Values [n] of the current micro-batch's scored tokens; the window keeps those of the others."""
        state, count = self.state, len(plan.micro_batches)
        result = self._run_tree(plan.batch, self.model if count == 1 else unwrapped(self.model))
        state.calls += 1
        if torch.is_grad_enabled():
            report = replace(result.report, pruned_tokens=state.pruned_tokens(self.trainer, count))
            state.notices.say_report(report, state.config.picture)
            state.log_tree(self.trainer, report)
        if count > 1:
            window = f"{count} micro-batches of an accumulation window run as one tree (merge_window)"
            state.notices.say_once(window, "window")
            return (*state.windows.opened(self.trainer, self.model, plan.micro_batches, result), None)
        entropies = None if result.entropies is None else self.micro_batch.scored_values(result.entropies)
        return self.micro_batch.scored_values(result.logprobs), entropies, result.router_loss

    def as_columns(
        self, logps: torch.Tensor, entropies: torch.Tensor | None, aux_loss: torch.Tensor | None
    ) -> Returned:
        """Values [n] as the hook returns them, [B, C]."""
        columns = None if entropies is None else self.micro_batch.as_columns(entropies)
        if columns is not None and self.micro_batch.is_weighted:
            columns = self.state.with_mean_entropy(columns, self.micro_batch, self.attention_mask)
        return self.micro_batch.as_columns(logps), columns, aux_loss

    def say_dense(self, why: Decline) -> None:
        """The dense path runs: say why, and count it."""
        self.state.why_dense = why.reason
        self.state.notices.say_once(f"dense path: {why.reason}", why.topic, logging.WARNING)
        if torch.is_grad_enabled():
            self.state.log_dense(self.trainer, why.reason, why.topic)
            self.state.loads.runs_dense()

    def _run_tree(self, batch: PreparedBatch, model: torch.nn.Module) -> SequenceLogProbs:
        """Verify the batch if it is its turn, then run it."""
        state, temperature = self.state, self.trainer.temperature
        with self.trainer.accelerator.autocast():
            if state.config.verifies(state.calls):
                difference = check_batch(model, batch, state.config, temperature)
                state.notices.say(f"call {state.calls} verified against dense: {difference}")
            result = run_tree(
                model,
                batch,
                state.config,
                temperature=temperature,
                return_entropy=self.compute_entropy,
                return_router_loss=self.compute_aux_loss,
                head_dtype=torch.float32 if getattr(self.trainer.args, "cast_lm_head_to_fp32", False) else None,
                has_scaler=getattr(self.trainer.accelerator, "scaler", None) is not None,
            )
        if (outcome := latest_outcome(model)) is not None:
            state.notices.say_once(str(outcome))
        return result


def _returns_aux_loss(hook: Hook) -> bool:
    """TRL 1.7 and newer return a third value."""
    return "compute_aux_loss" in inspect.signature(hook).parameters
