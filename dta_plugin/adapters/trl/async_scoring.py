"""In front of three methods of TRL's AsyncGRPO trainer: its rows run as trees of this package, on any device.

TRL's loss calls the model once for a row, and reads log-probs, entropies and a router loss. It is called with a
`TreeScorer` in the model's place; the loss stays TRL's. Where no tree runs, TRL's own call goes on to the model.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.adapters.trl.folded_rows import FoldedRow
from dta_plugin.adapters.trl.hooks import active_config
from dta_plugin.adapters.trl.noise import noise_obstacle
from dta_plugin.adapters.trl.protocols import Accelerator, AsyncLike, GRPOLike
from dta_plugin.adapters.trl.state import TreeState
from dta_plugin.adapters.trl.upstream import check_async_trainer
from dta_plugin.config import TreeConfig
from dta_plugin.decline import Decline, decline
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.execution.auto import run_tree
from dta_plugin.execution.prepared_batch import SequenceLogProbs, prepare_batch
from dta_plugin.execution.probing.probe import latest_outcome
from dta_plugin.models.dispatch import install
from dta_plugin.models.introspection import causal_lm, model_cost
from dta_plugin.option_places import Place, Scope
from dta_plugin.verify import check_batch

PLACE = Place(
    "in AsyncGRPO",
    {Scope.CALL, Scope.BATCH, Scope.TRAINING},
    "TRL's own planner decides which rows run together, and its loss has no weights",
    {"calibration": "there is no dense path whose time could be predicted; min_saving goes by FLOPs"},
)


def construct(trainer: object, own: Callable[..., None], default: TreeConfig | None, *args: Any, **kwargs: Any) -> None:
    """In front of `__init__`, which refuses models and devices that TRL's kernel does not serve."""
    given = inspect.signature(own).bind(*args, **kwargs).arguments
    config = active_config(cast(GRPOLike, SimpleNamespace(args=given.get("args"))), default)
    if config is None:
        return own(*args, **kwargs)
    if config.selection() is not None:
        raise InvalidInputError(
            f"token_selection={config.token_selection!r} cannot be followed by AsyncGRPO, whose loss has no weights. "
            "Expected token_selection='all'; GRPOTrainer knows the others."
        )
    if hasattr(given.get("args"), "use_dta"):  # what the process was enabled with may be for other trainers
        PLACE.check(config, prefix="dta_")
    trl = _module_of(trainer)
    with _replaced(trl, **_for_any_model_and_device(trl)):
        own(*args, **kwargs)


def compute_loss(
    trainer: AsyncLike, own: Callable[..., Any], default: TreeConfig | None, model: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """In front of `compute_loss`. default: configuration of trainers without the flag."""
    config = active_config(cast(GRPOLike, trainer), default)
    if config is None or isinstance(model, TreeScorer):  # a trainer of ours on top of TRL's, enabled
        return own(model, *args, **kwargs)
    if TreeState.of(trainer) is None:
        check_async_trainer(trainer)
    state = TreeState.for_trainer(trainer, config)
    if (line := PLACE.without_effect(config)) is not None:
        state.notices.say_once(line, level=logging.WARNING)
    return own(TreeScorer(trainer, state, model), *args, **kwargs)


def log_step_metrics(trainer: AsyncLike, own: Callable[[], None], default: TreeConfig | None) -> None:
    """In front of `_log_step_metrics`, whose count of FLOPs is for configs that name sizes as some families do."""
    if active_config(cast(GRPOLike, trainer), default) is None:
        return own()
    trl = _module_of(trainer)
    count = trl.compute_flops_per_token

    def counted(config: Any, length: int) -> float:
        try:
            return count(config, length)
        except AttributeError:  # such as GPT-OSS's
            cost = model_cost(causal_lm(trainer.model))
            per_pair = cost.per_pair + sum(flops for _, flops in cost.per_window_pair)
            return 3 * (cost.per_token + per_pair * length + cost.per_scored)

    with _replaced(trl, compute_flops_per_token=counted):
        own()


class TreeScorer:
    """Called as TRL's loss calls the model."""

    def __init__(self, trainer: AsyncLike, state: TreeState, model: nn.Module) -> None:
        self.trainer, self.state, self.model = trainer, state, model

    def __call__(self, **call: Any) -> Any:
        """log_probs and entropy, float32 [1, N] at the places of the row; aux_loss, or None."""
        found = self._outputs(call)
        if not isinstance(found, Decline):
            return found
        self.state.why_dense = found.reason
        self.state.notices.say_once(f"TRL's own path: {found.reason}", found.topic, logging.WARNING)
        self.state.log_dense(cast(GRPOLike, self.trainer), found.reason, found.topic)
        return self.model(**call)

    def _outputs(self, call: dict[str, Any]) -> SimpleNamespace | Decline:
        """What the loss reads, or why TRL's own call is to give it."""
        on_unsupported = self.state.config.on_unsupported
        if (obstacle := noise_obstacle(self.trainer)) is not None:
            return decline(obstacle, on_unsupported)
        try:
            return self._as_tree(FoldedRow.from_call(call), bool(call.get("output_router_logits")))
        except UnsupportedError as error:
            return decline(error, on_unsupported)

    def _as_tree(self, row: FoldedRow, with_router_loss: bool) -> SimpleNamespace | Decline:
        """What the loss reads, or why a tree does not pay."""
        state, config = self.state, self.state.config
        with self.trainer.accelerator.autocast():
            batch = prepare_batch(self.model, row.sequences, row.masks, config)
            decision = batch.decision
            if not decision.use_tree:
                return Decline(decision.reason, "min_saving" if decision.is_gated else None)
            if with_router_loss:  # which TRL takes over the places of its row
                tree = replace(batch.tree, multiplicity=row.places_of_tokens(batch.tree))
                batch = replace(batch, tree=tree)
            install(causal_lm(self.model))  # under TRL's name for it, for what a backward pass recomputes
            with _ordinary_attention(causal_lm(self.model)):  # that a probe compares with
                if config.verifies(state.calls):
                    difference = check_batch(self.model, batch, config, self.trainer.temperature)
                    state.notices.say(f"call {state.calls} verified against dense: {difference}")
                result = run_tree(
                    self.model,
                    batch,
                    config,
                    temperature=self.trainer.temperature,
                    return_entropy=True,
                    return_router_loss=with_router_loss,
                )
        self._log(result)
        assert result.entropies is not None
        return SimpleNamespace(
            log_probs=row.at_places(result.logprobs),
            entropy=row.at_places(result.entropies),
            aux_loss=result.router_loss,
        )

    def _log(self, result: SequenceLogProbs) -> None:
        state = self.state
        state.calls += 1
        if (outcome := latest_outcome(self.model)) is not None:
            state.notices.say_once(str(outcome))
        state.notices.say_report(result.report, state.config.picture)
        state.log_tree(cast(GRPOLike, self.trainer), result.report)


@contextmanager
def _ordinary_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, the model computes rows without trees, too: TRL's attention takes nothing but its own."""
    own = model.config._attn_implementation
    has_softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    model.set_attn_implementation("sdpa" if model._supports_sdpa and not has_softcap else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _module_of(trainer: object) -> Any:
    """TRL's module of the trainer's class, or of the base that is TRL's."""
    return sys.modules[next(base.__module__ for base in type(trainer).__mro__ if base.__name__ == "AsyncGRPOTrainer")]


@contextmanager
def _replaced(module: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """Within the context, the module's code calls these functions by their names."""
    own = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(own)


def _for_any_model_and_device(trl: Any) -> dict[str, Callable[..., Any]]:
    """What TRL's constructor calls, so that it takes models with attention sinks, and devices other than GPUs.

    Models with sinks then run as our trees only. Between loading a model and adding its head, TRL looks whether a
    parameter is called so; until then, none is. It asks CUDA for a name to look up the device's speed by.
    """
    load, add_head, peak_flops = trl.create_model_from_path, trl.add_fused_lm_head, trl.get_peak_flops_per_device

    def loaded(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        parameters = model.named_parameters
        if any(name.endswith(".sinks") for name, _ in parameters()):
            model.register_forward_pre_hook(_refuse_row, with_kwargs=True)
            model.named_parameters = lambda *a, **k: (x for x in parameters(*a, **k) if not x[0].endswith(".sinks"))
        return model

    def with_head(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        vars(model).pop("named_parameters", None)
        add_head(model, *args, **kwargs)

    def known_peak_flops(accelerator: Accelerator, dtype: str) -> float | None:
        return peak_flops(accelerator, dtype) if accelerator.device.type == "cuda" else None

    return {
        "create_model_from_path": loaded,
        "add_fused_lm_head": with_head,
        "get_peak_flops_per_device": known_peak_flops,
    }


def _refuse_row(model: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
    if "tree_kv_index" in kwargs:
        raise UnsupportedError(
            f"{type(model).__name__} has attention sinks, which TRL's kernel for rows of trees leaves out. Expected "
            "the plugin to run them; leave it on, without min_saving and on_unsupported='dense'."
        )
