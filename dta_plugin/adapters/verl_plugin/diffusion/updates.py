"""Log-prob passes and updates of a diffusion LM inside verl's engine: BGPO, one Monte-Carlo sample at a time.

verl's loop over micro-batches, its gradient synchronisation and its optimizer step stay; a micro-batch's forward step
is replaced. It back-propagates all samples but the last, which is verl's to do: memory does not grow with samples.
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

from dta_plugin.adapters.verl_plugin.diffusion.canvas import TERMS, Canvas, carried_terms, row_advantages
from dta_plugin.adapters.verl_plugin.diffusion.options import DiffusionOptions
from dta_plugin.adapters.verl_plugin.obstacles import batch_obstacle, engine_obstacle
from dta_plugin.adapters.verl_plugin.protocols import OurEngine
from dta_plugin.adapters.verl_plugin.upstream import check_diffusion_engine
from dta_plugin.diffusion import MaskDraws, draw_masks, family_of
from dta_plugin.diffusion.objectives.bgpo import bound_gap, per_sample_losses
from dta_plugin.diffusion.objectives.elbo import length_scale, sample_term
from dta_plugin.errors import UnsupportedError
from dta_plugin.models.introspection import causal_lm


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What an engine is told. length_norm, max_length: as in `length_scale`.

    rows_per_step: rows of all ranks in one optimizer step, if every row is used once; else None. A batch of so many
    rows is on-policy: its old ELBO terms are the new ones.
    """

    options: DiffusionOptions
    length_norm: str
    max_length: int
    rows_per_step: int | None


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
        self.family = family_of(causal_lm(engine.module).config)
        self._wants_terms = True
        self._updated: int | None = None  # the step that has been trained on without old terms
        self._sums = torch.zeros(4, dtype=torch.float64)

    def mini_batch(self, run: Callable[..., Any], data: TensorDict, forward_only: bool) -> Any:
        """verl's `run` over the micro-batches of `data`; metrics of an update are those of all ranks."""
        reason = engine_obstacle(self.engine) or batch_obstacle(data)
        if reason is not None:
            raise UnsupportedError(f"Not for a diffusion LM: {reason}.")
        if forward_only:
            rows = len(data) * self.engine.get_data_parallel_size()
            self._wants_terms = rows != self.settings.rows_per_step
            return run()
        self._check_terms(data)
        self._sums.zero_()
        outputs = run()
        outputs["metrics"].update(self._metrics())
        return outputs

    def forward_step(self, micro_batch: TensorDict, forward_only: bool) -> tuple[torch.Tensor, dict[str, Any]]:
        """In the place of verl's: the loss to be back-propagated, and what verl keeps of a micro-batch."""
        data = micro_batch.to(get_device_id())
        canvas = Canvas.of(data, self.family.pad_token_id or 0, self._step())
        if forward_only:
            outputs = self._outputs(data, canvas)
            return torch.tensor(1.0), {"model_output": outputs, "loss": 1.0, "metrics": {}}
        loss, total = self._losses(data, canvas)
        return loss, {"model_output": {}, "loss": total, "metrics": {}}

    def _outputs(self, data: TensorDict, canvas: Canvas) -> dict[str, torch.Tensor]:
        """What verl asks of a log-prob pass, as NaN; and ELBO terms, jagged [S, samples], if an update will."""
        nothing = torch.full_like(data["input_ids"], float("nan"), dtype=torch.float32)
        outputs = {"log_probs": nothing}
        if tu.get_non_tensor_data(data, "calculate_entropy", False):
            outputs["entropy"] = nothing
        if self._wants_terms:
            draws = self._draws(canvas)
            with self._autocast():
                terms = [self._term(canvas, draws, sample) for sample in range(draws.samples)]
            outputs[TERMS] = torch.nested.as_nested_tensor(list(torch.stack(terms, dim=1)), layout=torch.jagged)
        return outputs

    def _losses(self, data: TensorDict, canvas: Canvas) -> tuple[torch.Tensor, float]:
        """The last sample's loss, with graph, and the sum of all; the others have been back-propagated."""
        options, draws, advantages = self.settings.options, self._draws(canvas), row_advantages(data)
        terms: list[torch.Tensor] = []

        def term(sample: int, rows: torch.Tensor) -> torch.Tensor:
            found = self._term(canvas, draws, sample, rows)
            terms.append(found.detach())
            return found

        scale = length_scale(self.settings.length_norm, canvas.lengths, self.settings.max_length)
        parts = per_sample_losses(
            term,
            advantages,
            draws.samples,
            old_terms=carried_terms(data),
            length_scale=scale,
            # verl averages gradients over ranks, and micro-batches add up: the mean over a mini-batch's rows.
            loss_scale=len(data) * data["dp_size"] / data["global_batch_size"],
            clip=options.clip,
            dual_clip=options.dual_clip,
            always_run=True,
        )
        total, differences, synchronises = 0.0, [], self.engine.dta_is_last_micro_batch
        for sample in range(draws.samples):
            is_last = sample == draws.samples - 1
            with self._deferred_sync() if synchronises and not is_last else nullcontext():
                with self._autocast():
                    part = next(parts)
                total += part.loss.item()
                differences.append(part.d)
                if not is_last:
                    scaler = getattr(self.engine, "scaler", None)
                    (part.loss if scaler is None else scaler.scale(part.loss)).backward()
        self._count(terms, differences, advantages)
        return part.loss, total

    def _term(self, canvas: Canvas, draws: MaskDraws, sample: int, rows: torch.Tensor | None = None) -> torch.Tensor:
        return sample_term(
            self.engine.module,
            self.family,
            canvas.input_ids,
            canvas.attention_mask,
            draws,
            sample,
            canvas.width,
            rows,
        )

    def _deferred_sync(self) -> AbstractContextManager[None]:
        """As verl does in micro-batches before the last one: the backward pass of the last sample synchronises."""
        found: AbstractContextManager[None] = self.engine._gradient_sync_context(is_last_micro_batch=False)
        return found

    def _draws(self, canvas: Canvas) -> MaskDraws:
        options = self.settings.options
        return draw_masks(
            canvas.lengths, options.samples, canvas.seeds, options.form, options.stratified, options.coupled
        )

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

    def _count(self, terms: list[torch.Tensor], differences: list[torch.Tensor], advantages: torch.Tensor) -> None:
        """Add up ELBOs of the rows that count, gaps of the bound, those rows, and all rows."""
        ran = int(advantages.count_nonzero())
        elbo = float(torch.stack(terms).double().mean(dim=0).sum()) if ran else 0.0
        gap = float(bound_gap(torch.stack(differences, dim=1), advantages).sum())
        self._sums += torch.tensor([elbo, gap, ran, len(advantages)], dtype=torch.float64)

    def _metrics(self) -> dict[str, Metric]:
        """Of all ranks, the same on each. dta/elbo is in nats per response; it is left out if no row counted."""
        sums = self._sums.to(get_device_id())
        distributed.all_reduce(sums, group=self.engine.get_data_parallel_group())
        elbo, gap, ran, rows = sums.tolist()
        found = {"dta/bound_gap": gap / rows, "dta/skipped_rows": rows - ran}
        if ran:
            found["dta/elbo"] = elbo / ran
        return {name: Metric(AggregationType.MEAN, value) for name, value in found.items()}
