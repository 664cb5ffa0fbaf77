"""DiffusionGRPOTrainer: TRL's GRPOTrainer for diffusion language models.

TRL keeps what it does well: data, rewards, advantages, buffering of generation batches, logging, checkpoints. Replaced
are the three places in which it takes the model to write from left to right: generation (`generation`), log-probs of
the old and the reference policy (here what an objective stores, in the same buffer), and the loss, which is that of
`dta_plugin.training.diffusion`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from trl import GRPOTrainer

from dta_plugin.adapters.trl import patch
from dta_plugin.adapters.trl.diffusion.config import DiffusionGRPOConfig
from dta_plugin.adapters.trl.diffusion.generation import sampled_completions
from dta_plugin.adapters.trl.diffusion.micro_batch import MASK_SEEDS, diffusion_batch
from dta_plugin.adapters.trl.diffusion.siblings import siblings_together
from dta_plugin.adapters.trl.diffusion.unsupported_options import check_arguments
from dta_plugin.adapters.trl.upstream import check_diffusion, check_diffusion_trainer
from dta_plugin.diffusion import DiffusionFamily, load_diffusion_lm
from dta_plugin.diffusion.sampler import check_blocks, check_positions
from dta_plugin.errors import InvalidInputError
from dta_plugin.models.introspection import causal_lm
from dta_plugin.training.diffusion.batch import CANVAS_IDS, COMMIT_STEPS, DiffusionBatch, Rollout, draw_seeds
from dta_plugin.training.diffusion.objective import objective_of
from dta_plugin.training.diffusion.statistics import PREFIX
from dta_plugin.training.diffusion.update import MicroStep, Objective, back_propagated


class DiffusionGRPOTrainer(GRPOTrainer):
    """GRPOTrainer for a masked diffusion LM.

        DiffusionGRPOTrainer("GSAI-ML/LLaDA-8B-Instruct", reward, DiffusionGRPOConfig(...), train_dataset=data)

    model: what `load_diffusion_lm` reads, or returns; or a model made `bidirectional`; in PEFT or not. args: a
    DiffusionGRPOConfig. Other arguments are GRPOTrainer's; tools, rollout_func and environment_factory are refused.

    Raises InvalidInputError for arguments that do not go together, UnsupportedError for a model that is no masked
    diffusion LM, and for a TRL release without the methods that are replaced.
    """

    args: DiffusionGRPOConfig
    model: Any
    ref_model: Any
    processing_class: Any
    objective: Objective
    _rollout: Rollout | None = None
    _buffered_inputs: Any

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        reward_funcs: Any = None,
        args: DiffusionGRPOConfig | None = None,
        **arguments: Any,
    ) -> None:
        args = DiffusionGRPOConfig("diffusion_grpo") if args is None else args
        _check(args, arguments)
        if isinstance(model, str):
            given = {name: arguments.pop(name) for name in ("quantization_config",) if arguments.get(name) is not None}
            model = load_diffusion_lm(model, **cast(dict[str, Any], args.model_init_kwargs or {}), **given)
        own = args.diffusion_options.family(causal_lm(model).config)
        self.sampler = args.sampler_config(own.block_length)
        self.eval_sampler = args.eval_sampler_config(own.block_length)
        for sampler in (self.sampler, self.eval_sampler):
            check_blocks(own, sampler)
            check_positions(model, 1, sampler)
        is_adapted = arguments.get("peft_config") is not None or hasattr(model, "peft_config")
        reference = copy.deepcopy(model) if args.beta and not is_adapted else None
        aside = {"model_init_kwargs": None} | ({} if reference is None else {"beta": 0.0})
        with _set_aside(args, **aside):
            super().__init__(model, reward_funcs, args, **arguments)
        check_diffusion_trainer(self)
        self.beta = args.beta
        if reference is not None:
            self.ref_model = self._prepared(reference)
        if getattr(self, "aux_loss_enabled", False):
            raise InvalidInputError(
                f"{type(causal_lm(model)).__name__} is a mixture of experts with a router loss, which is not part of "
                "the objective here. Expected a dense model, or router_aux_loss_coef=0.0 in its config."
            )
        self.family = self._with_all_ends(own)
        self.objective = objective_of(
            args.diffusion_options,
            self.family,
            self.accelerator.autocast,
            args.canvas,
            args.epsilon,
            args.beta,
            self.num_iterations,
        )

    def _prepared(self, reference: PreTrainedModel) -> Any:
        """The frozen initial policy, wrapped as TRL wraps the reference that it loads."""
        reference.requires_grad_(False).eval()
        if self.is_fsdp_enabled:
            from trl.models.utils import prepare_fsdp

            return prepare_fsdp(reference, self.accelerator)
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    def _with_all_ends(self, family: DiffusionFamily) -> DiffusionFamily:
        """The family with every token that TRL or the model takes for an end, TRL's first; told to both."""
        own = getattr(self, "eos_token_ids", None)
        ends = tuple(dict.fromkeys([*(own or [self.processing_class.eos_token_id]), *family.eos_token_ids]))
        if own is None and self.mask_truncated_completions and len(ends) > 1:
            raise InvalidInputError(
                f"mask_truncated_completions=True with end tokens {ends}. This TRL release knows one end token, and "
                "would take completions that end with another for truncated; update TRL, or leave the option out."
            )
        self.eos_token_ids = list(ends)
        return replace(family, eos_token_ids=ends)

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, *_: Any, **__: Any
    ) -> tuple[list[list[int]], None]:
        if images is not None:
            raise InvalidInputError("The data has images. Expected text: diffusion LMs with images are not supported.")
        sampler = self.sampler if self.model.training else self.eval_sampler
        found = sampled_completions(self, self.family, sampler, prompt_ids)
        self._record({f"{PREFIX}model_calls": float(found.model_calls)})
        self._rollout = Rollout(found.canvas_ids, found.steps) if self.objective.options.reads_rollout else None
        completions = found.completion_ids.tolist()
        if self.args.score_fillers:
            return completions, None
        return [row[:length] for row, length in zip(completions, found.lengths.tolist(), strict=True)], None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._seeds = draw_seeds(len(inputs), self.accelerator.device)
        found = {**super()._generate_and_score_completions(inputs), MASK_SEEDS: self._seeds}
        if self._rollout is not None:
            found |= {CANVAS_IDS: self._rollout.canvas_ids, COMMIT_STEPS: self._rollout.steps}
        return found

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        found = super()._prepare_inputs(generation_batch)
        buffer = self._buffered_inputs
        if buffer is None or buffer is before or not self.objective.sharing.is_on(self.family):
            return found
        self._buffered_inputs = siblings_together(buffer, self.args.gradient_accumulation_steps)
        return self._buffered_inputs[self._step % len(buffer)]

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """What the objective compares later policies with, in place of the log-probs that TRL stores and slices."""
        batch = DiffusionBatch(input_ids, attention_mask, logits_to_keep, self._seeds, self._rollout)
        terms = torch.cat([self.objective.stored(model, part) for part in batch.chunks(batch_size or len(batch))])
        own = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
        return (terms, None, None) if "compute_aux_loss" in own else (terms, None)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        is_training = self.model.training
        slots = self.args.steps_per_generation or 1
        step = MicroStep(
            diffusion_batch(inputs),
            inputs["advantages"],
            inputs.get("old_per_token_logps"),
            inputs.get("ref_per_token_logps"),
            iteration=self._step // slots % self.num_iterations if is_training else 0,
            scale=1.0 / self.current_gradient_accumulation_steps if is_training else 1.0,
            always_run=self._needs_a_gradient() or not is_training,
        )
        update, own = self.objective.update(model, step), self.accelerator
        loss = back_propagated(
            update.losses(), self.objective.passes, own.backward, self._reduced_later(model), own.device
        )
        self._record(update.statistics().over_ranks(lambda values: own.gather(values[None]), own.device))
        return loss

    def _reduced_later(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Gradients of this context stay on their rank. Within the Trainer's own such context there is nothing to do.

        accelerate's context for FSDP2 ends with gradients being reduced again: nested, it would end the outer one, too.
        With `sync_each_batch` the user asks for gradients to be reduced (and sharded) after every backward pass.
        """
        state = self.accelerator.gradient_state
        if not state.sync_gradients or state.plugin_kwargs.get("sync_each_batch", False):
            return nullcontext()
        if getattr(self, "is_distributed_loading_by_transformers", False):
            return self._defer_fsdp_gradient_reduction()
        return self.accelerator.no_sync(model)

    def _record(self, values: dict[str, float]) -> None:
        """Add to what TRL averages until it logs."""
        for name, value in values.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _needs_a_gradient(self) -> bool:
        """Other ranks wait for this one's, or a gradient scaler refuses a step without any."""
        return self.accelerator.num_processes > 1 or self.accelerator.scaler is not None


def _check(args: DiffusionGRPOConfig, arguments: dict[str, Any]) -> None:
    if not isinstance(args, DiffusionGRPOConfig):
        raise InvalidInputError(
            f"args is a {type(args).__name__}. Expected a DiffusionGRPOConfig, which refuses what has no meaning for a "
            "diffusion LM (dta_* options, too: they are about attention from left to right)."
        )
    check_diffusion()
    if patch.process_config() is not None:
        raise InvalidInputError(
            "Prefix trees are switched on in this process (dta_plugin.enable, use_dta). Expected them off: they are "
            "for attention from left to right; what a diffusion LM can share, share_prompts says. Leave out use_dta "
            "and dta_*."
        )
    check_arguments(arguments)


@contextmanager
def _set_aside(args: Any, **instead: Any) -> Iterator[None]:
    """Within the context these arguments are as given: TRL would load a reference and models of its own by them."""
    own = {name: getattr(args, name) for name in instead}
    vars(args).update(instead)
    try:
        yield
    finally:
        vars(args).update(own)
