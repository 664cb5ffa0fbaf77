"""`TreeEngine`: verl's FSDP engine for language models, with log-probs and entropies from prefix trees.

Old log-probs, reference and update all come through `forward_step`. It stays verl's, as do losses, autocast, gradient
synchronisation, optimizer, checkpoints and weight export: only the inputs of the model call, the call itself and what
is read from it are replaced, and the mini-batch is cut into micro-batches in which siblings meet (`micro_batches`).
An update leaves out tokens that its loss cannot read, or that were not drawn (`tokens`); then losses are `weighted`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tensordict import TensorDict
from torch import nn
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from dta_plugin.adapters.verl_plugin.diffusion.guards import check_model
from dta_plugin.adapters.verl_plugin.diffusion.updates import DiffusionUpdates, Settings
from dta_plugin.adapters.verl_plugin.jagged import JaggedRows
from dta_plugin.adapters.verl_plugin.micro_batches import agreed, set_plan
from dta_plugin.adapters.verl_plugin.mini_batch import (
    MiniBatchRun,
    config_of_micro_batches,
    cost_on_all_ranks,
    decide,
    find,
)
from dta_plugin.adapters.verl_plugin.packing import packing_faults
from dta_plugin.adapters.verl_plugin.run_checks import saves_enough, take_own_path
from dta_plugin.adapters.verl_plugin.tree_call import TreeCall, TreeOutputs
from dta_plugin.adapters.verl_plugin.tree_engine import TreeEngineFrame
from dta_plugin.adapters.verl_plugin.upstream import check_engine
from dta_plugin.config import TreeConfig
from dta_plugin.errors import UnsupportedError
from dta_plugin.execution.prepared_batch import prepare_batch
from dta_plugin.execution.probing.probe import latest_outcome
from dta_plugin.execution.recovery import remedy_named
from dta_plugin.models.dispatch import uninstall
from dta_plugin.models.introspection import causal_lm, model_cost


class TreeEngine(TreeEngineFrame, FSDPEngineWithLMHead):
    """Same arguments as the engine it extends. Until `configure` is called, options have their defaults."""

    module: Any
    dta_is_last_micro_batch: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._dta_diffusion: DiffusionUpdates | None = None
        self._dta_calls = 0

    def configure(self, config: TreeConfig | None, diffusion: Settings | None = None) -> None:
        """Options from now on; None: verl's own path. diffusion: of a diffusion LM, which has no prefix trees.

        Raises InvalidInputError for what the strategy cannot do, and UnsupportedError for a diffusion LM without
        settings of its own: verl's own path would take it for a causal model.
        """
        check_model(self.module, diffusion is not None)
        self._dta_diffusion = None if diffusion is None else DiffusionUpdates(self, diffusion)
        self.configure_early(config)

    def initialize(self) -> None:
        super().initialize()
        check_engine(self)

    def _build_fsdp_module(self, module: nn.Module) -> Any:
        with suppress(UnsupportedError):  # said when the first batch comes
            model_cost(causal_lm(module))  # counted once, while parameters have their shapes
        return super()._build_fsdp_module(module)

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Any, forward_only: bool = False, **kwargs: Any
    ) -> Any:
        if self._dta_config is None:
            stock = functools.partial(super().forward_backward_batch, data, loss_function, forward_only, **kwargs)
            return stock() if self._dta_diffusion is None else self._dta_diffusion.mini_batch(stock, data, forward_only)
        stock = functools.partial(super().forward_backward_batch, data, forward_only=forward_only, **kwargs)
        with remedy_named(self.module):
            return self._mini_batch(stock, data, self._dta_config, loss_function, forward_only)

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        if self._dta_diffusion is not None:
            return self._dta_diffusion.forward_step(micro_batch, forward_only)
        run = self._dta_run
        if run is None:
            return super().forward_step(micro_batch, loss_function, forward_only)
        if run.config is None:
            return self._dense_step(run, micro_batch, loss_function, forward_only)
        micro_batch = micro_batch.to(get_device_id())
        try:
            call = self._tree_call(micro_batch, run.config)
            with self._calling(call):
                result = super().forward_step(micro_batch, loss_function, forward_only)
        except UnsupportedError as error:  # of these rows, or found while running: a layer that bypasses the tree
            take_own_path(error, run.config, self._dta_notices, self._dta_key)
            run.config = None
            return self._dense_step(run, micro_batch, loss_function, forward_only)
        self._dta_calls += 1
        run.counts.add_tree(call.report)
        if (outcome := latest_outcome(self.module)) is not None:
            self._dta_notices.say_once(str(outcome))
        if call.verified is not None:
            self._dta_notices.say_once(f"call {self._dta_calls} verified against dense: {call.verified}")
        if run.is_update:
            self._dta_notices.say_report(call.report, run.config.picture)
        return result

    def _tree_call(self, micro_batch: TensorDict, config: TreeConfig) -> TreeCall:
        """What verl's step is to call. Raises UnsupportedError where these rows cannot be a tree."""
        rows = JaggedRows.from_data(micro_batch, causal_lm(self.module))
        batch = prepare_batch(
            self.module,
            rows.runs.sequences,
            rows.runs.scored,
            config,
            temperatures=rows.temperature if isinstance(rows.temperature, list) else None,
            device=rows.offsets.device,
            images=rows.images,
        )
        decision = batch.decision
        if not (decision.use_tree or decision.is_gated):  # the gate is passed by mini-batches
            raise UnsupportedError(decision.reason)
        call = TreeCall(self.module, batch, rows, config)
        call.wants_entropy = bool(tu.get_non_tensor_data(micro_batch, "calculate_entropy", False))
        call.has_scaler = getattr(self, "scaler", None) is not None
        call.verifies = config.verifies(self._dta_calls)
        return call

    def prepare_model_inputs(self, micro_batch: TensorDict) -> Any:
        if isinstance(self.module, TreeCall):
            return {}, {}
        return super().prepare_model_inputs(micro_batch)

    def prepare_model_outputs(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(output, TreeOutputs):
            return output.tensors
        return super().prepare_model_outputs(output, *args, **kwargs)

    def _gradient_sync_context(self, *, is_last_micro_batch: bool) -> Any:
        self.dta_is_last_micro_batch = is_last_micro_batch
        return super()._gradient_sync_context(is_last_micro_batch=is_last_micro_batch)

    def _dense_step(self, run: MiniBatchRun, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        """verl's own step, with the attention that it had before."""
        if run.drawn is not None:
            self._dta_notices.say_once(
                "verl's own path computes all tokens: token_selection weighs them in the loss, but saves nothing"
            )
        run.counts.add_dense(int(micro_batch["input_ids"].offsets()[-1]))
        with suppress(UnsupportedError):
            uninstall(causal_lm(self.module))
        with packing_faults(self, micro_batch) as faults:
            result = super().forward_step(micro_batch, loss_function, forward_only)
        for fault in faults:
            self._dta_notices.say_once(f"verl's own path is not exact: {fault}", level=logging.WARNING)
        return result

    @contextmanager
    def _calling(self, call: TreeCall) -> Iterator[None]:
        """Within the context, verl's step calls the tree where it would call the module."""
        module, self.module = self.module, call
        try:
            yield
        finally:
            self.module = module

    def _updates(self) -> int:
        return int(self.lr_scheduler.last_epoch)

    def _begin(self, data: TensorDict, config: TreeConfig, loss_function: Any, forward_only: bool) -> MiniBatchRun:
        run = self._tokens_chosen(data, config, loss_function, forward_only, self.module)
        findings, plans = find(self, data, config, loss_function, forward_only, self._dta_key)
        decision = decide(agreed(findings, self.get_data_parallel_group()))
        if decision.obstacle is not None:
            take_own_path(decision.obstacle, config, self._dta_notices, self._dta_key)
            return run
        if config.min_saving:
            saving = cost_on_all_ranks(self, data, decision.is_cut).saving
            if not saves_enough(saving, config, self._dta_notices):
                return run
        if plans is not None and decision.micro_batches is not None:
            set_plan(data, plans.plan(decision.micro_batches))
        run.config = config_of_micro_batches(data, config, self.engine_config.strategy)
        return run
