"""The two methods that the plugin puts in front of a TRL trainer's own, shared by the mixin and the in-place patch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from dta_plugin.adapters.trl.config import tree_config
from dta_plugin.adapters.trl.exchange import exchange
from dta_plugin.adapters.trl.foreign_hooks import gradient_reader, hook_obstacle, window_reader
from dta_plugin.adapters.trl.generation_batch import Inputs, row_obstacle
from dta_plugin.adapters.trl.images import row_images
from dta_plugin.adapters.trl.losses import composition_obstacle
from dta_plugin.adapters.trl.merging import merges
from dta_plugin.adapters.trl.noise import noise_obstacle
from dta_plugin.adapters.trl.origin import foreign_reader, replaced_preparation, unknown_loss
from dta_plugin.adapters.trl.protocols import GRPOLike
from dta_plugin.adapters.trl.regroup import regroup
from dta_plugin.adapters.trl.scoring import Hook, tree_log_probs
from dta_plugin.adapters.trl.state import TreeState
from dta_plugin.adapters.trl.token_weights import is_weighted
from dta_plugin.adapters.trl.tokens import MicroStepInputs, check_selection, draw_micro_step, pruned
from dta_plugin.adapters.trl.upstream import check_trainer
from dta_plugin.adapters.trl.window import window_size
from dta_plugin.config import TreeConfig
from dta_plugin.decline import Decline, decline
from dta_plugin.errors import InvalidInputError
from dta_plugin.execution.calibration_store import tree_cost
from dta_plugin.execution.recovery import remedy_named
from dta_plugin.models.introspection import causal_lm
from dta_plugin.models.support import tree_obstacle
from dta_plugin.models.vision.support import images_obstacle


def log_probs(
    trainer: GRPOLike, own: Hook, default: TreeConfig | None, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor | None, ...]:
    """In front of `_get_per_token_logps_and_entropies`. default: configuration of trainers without the flag."""
    config = active_config(trainer, default)
    if config is None:
        return own(*args, **kwargs)
    state = _state(trainer, config)
    values = tree_log_probs(trainer, state, own, *args, **kwargs)
    if values[0] is not None:
        state.loads.scored(values[0])
    return values


def prepare_inputs(
    trainer: GRPOLike, own: Callable[[Any], Any], default: TreeConfig | None, generation_batch: Any
) -> Any:
    """In front of `_prepare_inputs`: place the rows of a new generation batch, then hand out the step's micro-batch."""
    config = active_config(trainer, default)
    if config is None:
        return own(generation_batch)
    state = _state(trainer, config)
    if _loss_is_fused(trainer):
        _run_fused_loss(trainer, config, state)
        return own(generation_batch)
    before = trainer._buffered_inputs
    inputs = own(generation_batch)
    buffer = trainer._buffered_inputs
    if not trainer.model.training or buffer is None:
        return inputs
    if replaced_preparation(trainer):  # what came out of the buffer may not be what is in it
        _say_what_stays(trainer, config, state)
        return inputs
    is_new = buffer is not before
    if is_new and not _runs_dense(trainer, buffer):  # else on what TRL made
        buffer = trainer._buffered_inputs = _placed(trainer, config, state, buffer)
    slot = trainer._step % trainer.args.steps_per_generation
    if is_new or slot == 0 or not state.micro_steps:
        state.micro_steps = _drawn(trainer, config, state, buffer)
    state.loads.hands_out(slot)
    state.log_selection(trainer, state.micro_steps[slot].metrics)
    return _for_our_hook(trainer, state.micro_steps[slot].inputs)


def _runs_dense(trainer: GRPOLike, buffer: list[Inputs]) -> bool:
    obstacle = tree_obstacle(trainer.model) or noise_obstacle(trainer) or _images_obstacle(trainer, buffer)
    return (obstacle or hook_obstacle(trainer.model, unknown_loss(trainer))) is not None


def _state(trainer: GRPOLike, config: TreeConfig) -> TreeState:
    """The trainer's; at its first use, the trainer is checked for what the plugin reads of it."""
    if TreeState.of(trainer) is None:
        check_trainer(trainer)
        if (obstacle := tree_obstacle(trainer.model)) is not None:
            decline(obstacle, config.on_unsupported)  # an error comes before anything is sampled
        _name_remedies(trainer)
    return TreeState.for_trainer(trainer, config)


def _name_remedies(trainer: GRPOLike) -> None:
    """From now on the trainer's backward passes say what to set where a tree runs out of memory."""
    own = trainer.accelerator.backward

    @functools.wraps(own)
    def backward(*args: Any, **kwargs: Any) -> None:
        with remedy_named(trainer.model):
            own(*args, **kwargs)

    vars(trainer.accelerator)["backward"] = backward


def _for_our_hook(trainer: GRPOLike, inputs: Inputs) -> Inputs:
    """The inputs; InvalidInputError where they have weights that the log-prob hook of somebody else would read."""
    if is_weighted(inputs) and (reader := foreign_reader(trainer)):
        raise InvalidInputError(
            f"This generation batch was pruned or weighted for the plugin's log-prob hook, and now {reader}. Expected "
            "the same method during the whole training; replace it before training begins."
        )
    return inputs


def _drawn(trainer: GRPOLike, config: TreeConfig, state: TreeState, buffer: list[Inputs]) -> list[MicroStepInputs]:
    """The micro-batches of one pass over the generation batch, each with a drawing of its own."""
    selection = config.selection()
    if selection is None:
        return [MicroStepInputs(inputs) for inputs in buffer]
    check_selection(trainer, buffer, selection)
    first = state.micro_step_number(trainer) - trainer._step % len(buffer)
    seed, rank = trainer.args.seed, trainer.accelerator.process_index
    return [
        draw_micro_step(inputs, trainer.model, selection, seed=seed, step=first + slot, rank=rank)
        for slot, inputs in enumerate(buffer)
    ]


def _placed(trainer: GRPOLike, config: TreeConfig, state: TreeState, buffer: list[Inputs]) -> list[Inputs]:
    """A new generation batch with its rows where they cost least, and the decision whether windows are merged."""
    with trainer.accelerator.autocast():  # measured speeds are those of a precision
        cost = tree_cost(trainer.model, config)
    size = window_size(trainer, buffer)
    repeated: list[float] = []

    def prune(batches: list[Inputs]) -> list[Inputs]:
        return batches if config.prune == "never" else pruned(trainer, batches, forced=config.prune == "always")

    _say_what_stays(trainer, config, state)

    if config.balance_ranks == "always" and trainer.accelerator.num_processes > 1:
        found = exchange(trainer, buffer, size, cost, prune)
        if isinstance(found, Decline):
            state.notices.say_once(f"rows stay on the ranks that generated them because {found.reason}")
        else:
            buffer, repeated = found.buffer, found.repeated
    buffer = prune(buffer)
    own_order = _regroup_obstacle(trainer, config, buffer)
    steps = trainer.args.gradient_accumulation_steps
    separate = regroup(buffer, steps, cost, trainer.model) if own_order is None else buffer
    merged = state.windows.merges = merges(trainer, config, state.notices, buffer, separate, cost)
    if own_order and not merged:
        state.notices.say_once(f"micro-batches stay as TRL shuffled them, siblings apart, because {own_order}")
    chosen = buffer if merged else separate
    state.loads.plan(trainer, chosen, size, merged, cost, repeated)
    return chosen


def active_config(trainer: GRPOLike, default: TreeConfig | None) -> TreeConfig | None:
    """The trainer's own options where its config has the flag, else the process-wide ones."""
    if hasattr(trainer.args, "use_dta"):
        return tree_config(trainer.args)
    return default


def _regroup_obstacle(trainer: GRPOLike, config: TreeConfig, buffer: list[Inputs]) -> str | None:
    """None: regroup. Otherwise why not, empty where there is nothing to say."""
    if config.regroup == "never" or len(buffer) == 1:
        return ""
    obstacle = row_obstacle(buffer)
    if obstacle is not None or config.regroup == "always":
        return obstacle
    if window_reader(trainer):
        return ""
    reason = composition_obstacle(trainer)
    return reason and f"{reason}; regroup='always' regroups all the same"


def _images_obstacle(trainer: GRPOLike, buffer: list[Inputs]) -> str | None:
    """Why images of this generation batch cannot come into a tree; None if they can, or there are none."""
    if all(row_images(inputs) is None for inputs in buffer):
        return None
    return images_obstacle(causal_lm(trainer.model))


def _say_what_stays(trainer: GRPOLike, config: TreeConfig, state: TreeState) -> None:
    """One line where the loss, or who reads its gradient, is not known: what is left alone and what would force it."""
    unknown = unknown_loss(trainer)
    if unknown is None:
        _say_who_reads_gradients(trainer, state)
        return
    forced = ["regroup", "merge_window"] * (not replaced_preparation(trainer))
    forced += ["prune"] * (bool(forced) and foreign_reader(trainer) is None)
    ways = [f"{name}='always'" for name in forced if getattr(config, name) == "auto"]
    state.notices.say_once(
        f"rows and tokens stay as TRL made them, because {unknown}"
        + (f"; {', '.join(ways)} would treat it as TRL's own loss" if ways else ""),
        topic="unknown loss",
    )


def _say_who_reads_gradients(trainer: GRPOLike, state: TreeState) -> None:
    if trainer.args.gradient_accumulation_steps > 1 and (reader := gradient_reader(trainer)) is not None:
        state.notices.say_once(
            f"micro-batches of a window stay as TRL made them, because {reader}; regroup='always' and "
            "merge_window='always' go by their sum alone",
            topic="gradient reader",
        )


def _loss_is_fused(trainer: object) -> bool:
    """TRL up to 1.13 routes the Liger loss around the log-prob hook."""
    asked = getattr(trainer, "use_liger_kernel", False) or getattr(trainer, "use_liger_loss", False)
    return bool(asked) and hasattr(trainer, "compute_liger_loss")


def _run_fused_loss(trainer: GRPOLike, config: TreeConfig, state: TreeState) -> None:
    """Refuse, or say that the loss runs dense."""
    reason = "this TRL version's Liger loss bypasses the log-prob hook; set use_liger_kernel=False or use trl>=1.14"
    if config.selection() is not None:
        raise InvalidInputError(f"token_selection={config.token_selection!r} cannot be followed: {reason}.")
    decline(reason, config.on_unsupported)
    state.why_dense = reason
    state.notices.say_once(f"dense path: {reason}", level=logging.WARNING)
    if trainer.model.training:
        state.log_dense(trainer, reason)
