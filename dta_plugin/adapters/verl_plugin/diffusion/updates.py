"""Log-prob passes and updates of a diffusion LM inside verl's engine: those of `dta_plugin.training.diffusion`.

verl's loop over micro-batches, its gradient synchronisation and its optimizer step stay; a micro-batch's forward step
is replaced. It back-propagates all losses but the last, which is verl's to do: memory does not grow with samples.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import distributed
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.metric import AggregationType, Metric

from dta_plugin.adapters.verl_plugin.diffusion.micro_batch import (
    TERMS,
    carried_terms,
    diffusion_batch,
    row_advantages,
    without_padding,
)
from dta_plugin.adapters.verl_plugin.obstacles import engine_obstacle, text_obstacle
from dta_plugin.adapters.verl_plugin.protocols import OurEngine
from dta_plugin.adapters.verl_plugin.upstream import check_diffusion_engine
from dta_plugin.errors import UnsupportedError
from dta_plugin.models.introspection import causal_lm
from dta_plugin.training.diffusion.batch import DiffusionBatch
from dta_plugin.training.diffusion.objective import objective_of
from dta_plugin.training.diffusion.options import DiffusionOptions
from dta_plugin.training.diffusion.statistics import Statistics
from dta_plugin.training.diffusion.update import MicroStep, back_propagated


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What an engine is told. max_length: of responses. epsilon: the clip range, for the objectives that have one.

    rows_per_step: rows of all ranks in one optimizer step, if every row is used once; else None. A batch of so many
    rows is on-policy: its old ELBO terms are the new ones.
    """

    options: DiffusionOptions
    max_length: int
    rows_per_step: int | None
    epsilon: float = 0.2


class DiffusionUpdates:
    """For one engine. Raises InvalidInputError or UnsupportedError for a model without a diffusion family."""

    def __init__(self, engine: OurEngine, settings: Settings) -> None:
        check_diffusion_engine(engine)
        if engine.engine_config.forward_only:
            raise UnsupportedError(
                "Got a reference policy for a diffusion LM, which has no log-probs of single tokens to compare. "
                "Expected none; set actor_rollout_ref.actor.use_kl_loss=False and algorithm.use_kl_in_reward=False."
            )
        self.engine, self.settings = engine, settings
        self.family = settings.options.family(causal_lm(engine.module).config)
        self.objective = objective_of(
            settings.options, self.family, self._autocast, settings.max_length, settings.epsilon
        )
        self._wants_terms = True
        self._updated: int | None = None  # the step that has been trained on without old terms
        self._statistics: Statistics | None = None  # of the mini-batch so far

    def mini_batch(self, run: Callable[..., Any], data: TensorDict, forward_only: bool) -> Any:
        """verl's `run` over the micro-batches of `data`; metrics of an update are those of all ranks."""
        reason = engine_obstacle(self.engine) or text_obstacle(data)
        if reason is not None:
            raise UnsupportedError(f"Not for a diffusion LM: {reason}.")
        if forward_only:
            rows = len(data) * self.engine.get_data_parallel_size()
            self._wants_terms = rows != self.settings.rows_per_step
            return run()
        self._check_terms(data)
        self._statistics = None
        outputs = run()
        outputs["metrics"].update(self._metrics())
        return outputs

    def forward_step(self, micro_batch: TensorDict, forward_only: bool) -> tuple[torch.Tensor, dict[str, Any]]:
        """In the place of verl's: the loss to be back-propagated, and what verl keeps of a micro-batch."""
        data = micro_batch.to(get_device_id())
        batch = diffusion_batch(data, self.family.pad_token_id or 0, self._step(), self.objective.options.reads_rollout)
        if forward_only:
            outputs = self._outputs(data, batch)
            return torch.tensor(1.0), {"model_output": outputs, "loss": 1.0, "metrics": {}}
        loss = self._loss(data, batch)
        return loss, {"model_output": {}, "loss": loss.item(), "metrics": {}}

    def _outputs(self, data: TensorDict, batch: DiffusionBatch) -> dict[str, torch.Tensor]:
        """What verl asks of a log-prob pass, as NaN; and ELBO terms, jagged [S, samples], if an update will."""
        nothing = torch.full_like(data["input_ids"], float("nan"), dtype=torch.float32)
        outputs = {"log_probs": nothing}
        if tu.get_non_tensor_data(data, "calculate_entropy", False):
            outputs["entropy"] = nothing
        if self._wants_terms:
            terms = self.objective.stored(self.engine.module, batch)
            outputs[TERMS] = torch.nested.as_nested_tensor(list(terms), layout=torch.jagged)
        return outputs

    def _loss(self, data: TensorDict, batch: DiffusionBatch) -> torch.Tensor:
        """The last part, with graph, and the value of all; the others have been back-propagated."""
        step = MicroStep(
            without_padding(batch, data),
            row_advantages(data),
            carried_terms(data),
            # verl averages gradients over ranks, and micro-batches add up: the mean over a mini-batch's rows.
            scale=len(data) * data["dp_size"] / data["global_batch_size"],
            always_run=True,
        )
        update = self.objective.update(self.engine.module, step)
        reduced_later = self._deferred_sync() if self.engine.dta_is_last_micro_batch else nullcontext()
        loss = back_propagated(
            update.losses(), self.objective.passes, self._backward, reduced_later, batch.input_ids.device
        )
        found = update.statistics()
        self._statistics = found if self._statistics is None else self._statistics + found
        return loss

    def _backward(self, loss: torch.Tensor) -> None:
        scaler = getattr(self.engine, "scaler", None)
        (loss if scaler is None else scaler.scale(loss)).backward()

    def _deferred_sync(self) -> AbstractContextManager[None]:
        """As verl does in micro-batches before the last one: the backward pass of the last sample synchronises."""
        found: AbstractContextManager[None] = self.engine._gradient_sync_context(is_last_micro_batch=False)
        return found

    def _step(self) -> int:
        """The same from a batch's log-prob pass to its last optimizer step: verl schedules once per batch."""
        return int(self.engine.lr_scheduler.last_epoch)

    def _autocast(self) -> AbstractContextManager[Any]:
        """As in verl's forward step."""
        dtype = getattr(self.engine, "_autocast_dtype", torch.bfloat16)
        return nullcontext() if dtype == torch.float32 else torch.autocast(get_device_name(), dtype=dtype)

    def _check_terms(self, data: TensorDict) -> None:
        """Without old terms, one optimizer step per batch of rollouts."""
        if TERMS in data.keys():  # noqa: SIM118 (a TensorDict)
            return
        if self._updated == self._step():
            raise UnsupportedError(
                f"A second optimizer step on one batch of rollouts, whose data has no {TERMS!r}: verl's log-prob pass "
                "leaves them there for every batch of another size than ppo_mini_batch_size * rollout.n, or with "
                "ppo_epochs > 1. Expected verl's own trainer of trainer.use_v1=True; do not leave that pass out "
                "(algorithm.rollout_correction.bypass_mode=False)."
            )
        self._updated = self._step()

    def _metrics(self) -> dict[str, Metric]:
        """Of all ranks, the same on each."""
        assert self._statistics is not None
        found = self._statistics.over_ranks(self._gathered, torch.device(get_device_id()))
        return {name: Metric(AggregationType.MEAN, value) for name, value in found.items()}

    def _gathered(self, values: torch.Tensor) -> torch.Tensor:
        """[N] -> [ranks, N]"""
        group = self.engine.get_data_parallel_group()
        ranks = [torch.empty_like(values) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(ranks, values, group=group)
        return torch.stack(ranks)
