"""`TreeCriticEngine`: verl's FSDP engine for value models, whose decoder computes what rows share once.

A value belongs to a token and what comes before it, so every token of the tree has one. The step stays verl's, its head
and its loss, too: the engine hands rows over padded, and `share_prefixes` makes a tree of them in front of the decoder.
Mini-batches are cut into micro-batches in which siblings meet, as the actor's are. What a tree cannot follow takes
verl's own path, said once: a critic has no `on_unsupported`, since its values are the same either way. `external_lib`
of the critic's model has to name the plugin, which the trainer's process sees to (`trainers`).
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any

from tensordict import TensorDict
from torch import nn
from verl.utils import tensordict_utils as tu
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithValueHead

from dta_plugin.adapters.verl_plugin.jagged import token_rows
from dta_plugin.adapters.verl_plugin.micro_batches import agreed, clear_plan, may_regroup, planner, set_plan
from dta_plugin.adapters.verl_plugin.mini_batch import Findings, MiniBatchRun, decide
from dta_plugin.adapters.verl_plugin.obstacles import engine_obstacle, text_obstacle
from dta_plugin.adapters.verl_plugin.reach import names_plugin
from dta_plugin.adapters.verl_plugin.upstream import check_engine
from dta_plugin.config import TreeConfig
from dta_plugin.errors import UnsupportedError
from dta_plugin.models.introspection import causal_lm, model_cost
from dta_plugin.sharing.decoder_hooks import PrefixSharing, share_prefixes
from dta_plugin.training.notices import Notices

# verl hands options to actors only. A critic takes those of the actor in its process, or their defaults.
_options: TreeConfig | None = TreeConfig()


def configure(config: TreeConfig | None) -> None:
    """Options of this process's critic from now on; None: verl's own path."""
    global _options
    _options = config


class TreeCriticEngine(FSDPEngineWithValueHead):
    """Same arguments as the engine it extends."""

    module: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._dta_sharing = PrefixSharing()
        self._dta_run: MiniBatchRun | None = None
        self._dta_notices = Notices(speaks=self.rank == 0)

    def initialize(self) -> None:
        super().initialize()
        check_engine(self)

    def _build_fsdp_module(self, module: nn.Module) -> Any:
        """Hooks go onto the decoder, and FLOPs are counted, while parameters have their names and shapes."""
        try:
            model_cost(causal_lm(module))
            self._dta_sharing = share_prefixes(module, TreeConfig(on_unsupported="dense"))
        except UnsupportedError as error:
            self._dta_sharing.reason = error.reason
        return super()._build_fsdp_module(module)

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Any, forward_only: bool = False, **kwargs: Any
    ) -> Any:
        stock = functools.partial(super().forward_backward_batch, data, loss_function, forward_only, **kwargs)
        if _options is None or not names_plugin(self.model_config.external_lib):
            self._dta_sharing.remove()
            return stock()
        try:
            self._dta_run = run = self._begin(data, _options, loss_function, forward_only)
            outputs = stock()
        finally:
            self._dta_run = None
            clear_plan(data)
        if run.is_update:
            outputs["metrics"].update(run.metrics())
        return outputs

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        run = self._dta_run
        if run is None or run.config is None:
            if run is not None:
                run.counts.add_dense(int(micro_batch["input_ids"].offsets()[-1]))
            return super().forward_step(micro_batch, loss_function, forward_only)
        tu.assign_non_tensor_data(micro_batch, "use_remove_padding", False)
        result = super().forward_step(micro_batch, loss_function, forward_only)
        report = self._dta_sharing.report
        if report is None:
            run.counts.add_dense(int(micro_batch["input_ids"].offsets()[-1]))
            self._dta_notices.say_once(f"critic, a micro-batch on verl's own path: {self._dta_sharing.reason}")
        else:
            run.counts.add_tree(report)
            self._dta_notices.say_report(report, whose="critic: ")  # the picture is the actor's
        return result

    def _begin(self, data: TensorDict, config: TreeConfig, loss_function: Any, forward_only: bool) -> MiniBatchRun:
        """Let all ranks agree on how a mini-batch runs, and cut it into micro-batches."""
        run = MiniBatchRun(None, not forward_only)
        obstacle, plans = engine_obstacle(self) or text_obstacle(data) or self._model_obstacle(), None
        if obstacle is None and may_regroup(data, config.regroup, loss_function, forward_only):
            plans = planner(data, token_rows(data), model_cost(causal_lm(self.module)))
        findings = Findings(None, obstacle, None if plans is None else plans.count, len(data))
        decision = decide(agreed(findings, self.get_data_parallel_group()))
        if decision.obstacle is not None:
            self._dta_notices.say_once(f"the critic runs dense: {decision.obstacle}", level=logging.WARNING)
            return run
        if plans is not None and decision.micro_batches is not None:
            set_plan(data, plans.plan(decision.micro_batches))
        run.config = config
        self._dta_sharing.config = replace(
            self._dta_sharing.config, backend=config.backend, min_saving=config.min_saving, probe=config.probe
        )
        return run

    def _model_obstacle(self) -> str | None:
        """Why its decoder has no hooks, or None. (A handle's reason is later that of single calls.)"""
        return None if self._dta_sharing.is_attached else self._dta_sharing.reason
