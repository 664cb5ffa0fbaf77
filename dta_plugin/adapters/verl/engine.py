"""`TreeEngine`: verl's FSDP engine for language models, with log-probs and entropies from prefix trees.

Old log-probs, reference and update all come through `forward_step`. It stays verl's, as do losses, autocast, gradient
synchronisation, optimizer, checkpoints and weight export: only the inputs of the model call, the call itself and what
is read from it are replaced, and the mini-batch is cut into micro-batches in which siblings meet (`micro_batches`).
An update leaves out tokens that its loss cannot read, or that were not drawn (`selection`); then losses are `weighted`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from tensordict import TensorDict
from torch import nn
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from dta_plugin.adapters.logs import say
from dta_plugin.adapters.verl.call import TreeCall, TreeOutputs
from dta_plugin.adapters.verl.diffusion.guards import check_model
from dta_plugin.adapters.verl.diffusion.updates import DiffusionUpdates, Settings
from dta_plugin.adapters.verl.guards import batch_reason, engine_reason
from dta_plugin.adapters.verl.micro_batches import Planner, agreed, clear_plan, may_regroup, set_plan
from dta_plugin.adapters.verl.registry import registered
from dta_plugin.adapters.verl.rows import Rows
from dta_plugin.adapters.verl.selection import Passes, choose, clear_weights, objection
from dta_plugin.adapters.verl.tally import Tally
from dta_plugin.adapters.verl.upstream import check_engine
from dta_plugin.adapters.verl.weighted import weighted
from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.execution.prepared_batch import prepare_batch
from dta_plugin.execution.probing.probe import latest_outcome
from dta_plugin.models.attention_registry import uninstall
from dta_plugin.models.introspection import causal_lm, model_cost
from dta_plugin.models.support import tree_obstacle
from dta_plugin.tree.cost import CostEstimate


@dataclass(slots=True)
class _Run:
    """One mini-batch. config: as it applies to its micro-batches, None where it takes verl's own path."""

    config: TreeConfig | None
    is_update: bool
    tally: Tally = field(default_factory=Tally)


@registered
class TreeEngine(FSDPEngineWithLMHead):
    """Same arguments as the engine it extends. Until `configure` is called, options have their defaults."""

    module: Any
    dta_is_last_micro_batch: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._dta_config: TreeConfig | None = TreeConfig()
        self._dta_diffusion: DiffusionUpdates | None = None
        self._dta_run: _Run | None = None
        self._dta_calls = 0
        self._dta_passes = Passes()
        self._dta_said: set[str] = set()

    def configure(self, config: TreeConfig | None, diffusion: Settings | None = None) -> None:
        """Options from now on; None: verl's own path. diffusion: of a diffusion LM, which has no prefix trees.

        Raises InvalidInputError for what the strategy cannot do, and UnsupportedError for a diffusion LM without
        settings of its own: verl's own path would take it for a causal model.
        """
        check_model(self.module, diffusion is not None)
        self._dta_diffusion = None if diffusion is None else DiffusionUpdates(self, diffusion)
        in_chunks = config is not None and (config.executor == "streamed" or config.max_tree_tokens_per_chunk)
        if in_chunks and self.engine_config.strategy == "fsdp":
            raise InvalidInputError(
                "Got executor=streamed or max_tree_tokens_per_chunk with strategy=fsdp, which cannot run a micro-batch "
                "in chunks. Expected actor_rollout_ref.actor.strategy=fsdp2 (and .ref.strategy); or bound memory with "
                "ppo_max_token_len_per_gpu, which counts tree tokens."
            )
        self._dta_config = config

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
        try:
            self._dta_run = run = self._begin(data, self._dta_config, loss_function, forward_only)
            if run.tally.drawn is not None:
                loss_function = weighted(loss_function)
            outputs = super().forward_backward_batch(data, loss_function, forward_only, **kwargs)
        finally:
            self._dta_run = None
            clear_plan(data)
            clear_weights(data)
        if run.is_update:
            outputs["metrics"].update(run.tally.metrics())
        return outputs

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        if self._dta_diffusion is not None:
            return self._dta_diffusion.forward_step(micro_batch, forward_only)
        run = self._dta_run
        if run is None:
            return super().forward_step(micro_batch, loss_function, forward_only)
        if run.config is None:
            return self._dense_step(run, micro_batch, loss_function, forward_only)
        micro_batch = micro_batch.to(get_device_id())
        rows = Rows.of(micro_batch)
        per_sequence = rows.temperature if isinstance(rows.temperature, list) else None
        batch = prepare_batch(
            self.module,
            rows.sequences,
            rows.scored,
            run.config,
            temperatures=per_sequence,
            device=rows.offsets.device,
        )
        call = TreeCall(self.module, batch, rows, run.config)
        call.wants_entropy = bool(tu.get_non_tensor_data(micro_batch, "calculate_entropy", False))
        call.verifies = run.config.verifies(self._dta_calls)
        try:
            with self._calling(call):
                result = super().forward_step(micro_batch, loss_function, forward_only)
        except UnsupportedError as error:  # found only while running, such as a layer that bypasses the tree
            self._refuse(str(error))
            run.config = None
            return self._dense_step(run, micro_batch, loss_function, forward_only)
        self._dta_calls += 1
        run.tally.tree(call.report)
        if (outcome := latest_outcome(self.module)) is not None:
            self._say(str(outcome))
        if call.verified is not None:
            self._say(f"call {self._dta_calls} verified against dense: {call.verified}")
        if run.is_update:
            self._say(str(call.report), topic="idle" if call.report.is_idle else "report")
        return result

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

    def _dense_step(self, run: _Run, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        """verl's own step, with the attention that it had before."""
        if run.tally.drawn is not None:
            self._say("verl's own path computes all tokens: token_selection weighs them in the loss, but saves nothing")
        run.tally.dense(int(micro_batch["input_ids"].offsets()[-1]))
        with suppress(UnsupportedError):
            uninstall(causal_lm(self.module))
        return super().forward_step(micro_batch, loss_function, forward_only)

    @contextmanager
    def _calling(self, call: TreeCall) -> Iterator[None]:
        """Within the context, verl's step calls the tree where it would call the module."""
        module, self.module = self.module, call
        try:
            yield
        finally:
            self.module = module

    def _begin(self, data: TensorDict, config: TreeConfig, loss_function: Any, forward_only: bool) -> _Run:
        """Let all ranks agree on how a mini-batch runs, choose its tokens, and cut it into micro-batches."""
        run = _Run(None, not forward_only)
        objected = objection(data, loss_function, config) if run.is_update else None
        if run.is_update and objected is None:
            step, rank = self._dta_passes.next(self.lr_scheduler.last_epoch), self.get_data_parallel_rank()
            run.tally.drawn = choose(data, loss_function, config, step, rank)
        reason = engine_reason(self) or tree_obstacle(self.module) or batch_reason(data)
        planner, cost = None, None
        if reason is None:
            rows = Rows.of(data)
            if may_regroup(data, config.regroup, loss_function, forward_only):
                planner = Planner(data, rows.sequences, model_cost(causal_lm(self.module)))
            if config.min_saving:
                cost = self._cost(data, rows)
        mine = (objected, reason, cost, None if planner is None else planner.count, len(data))
        all_objected, reasons, costs, counts, sizes = zip(*agreed(mine, self.get_data_parallel_group()), strict=True)
        if any(all_objected):
            raise InvalidInputError(next(filter(None, all_objected)))
        found = next((reason for reason in reasons if reason is not None), None)
        if found is not None:
            self._refuse(found)
            return run
        if cost is not None and not self._pays(costs, config.min_saving):
            return run
        if planner is not None and max(counts) <= min(sizes):
            set_plan(data, planner.plan(max(counts)))
        run.config = self._for_micro_batches(data, config)
        return run

    def _cost(self, data: TensorDict, rows: Rows) -> CostEstimate:
        """Of verl's own path, which computes all tokens, and of a tree of those that are to run."""

        def of(some: Rows) -> CostEstimate:
            return prepare_batch(
                self.module, some.sequences, some.scored, TreeConfig(), device=some.offsets.device
            ).cost

        cost = of(rows)
        return cost if rows.ran is None else CostEstimate(of(Rows.whole(data)).dense, cost.tree)

    def _for_micro_batches(self, data: TensorDict, config: TreeConfig) -> TreeConfig:
        """The gate has been passed; a sequence beyond the token budget runs in chunks where the strategy can."""
        config = replace(config, min_saving=0.0)
        if tu.get_non_tensor_data(data, "use_dynamic_bsz", True) and self.engine_config.strategy == "fsdp2":
            budget = config.max_tree_tokens_per_chunk or int(tu.get_non_tensor_data(data, "max_token_len_per_gpu", 0))
            if config.executor != "packed":
                return replace(config, max_tree_tokens_per_chunk=budget)
        return config

    def _pays(self, costs: tuple[CostEstimate, ...], min_saving: float) -> bool:
        total = CostEstimate(sum(cost.dense for cost in costs), sum(cost.tree for cost in costs))
        if total.saving >= min_saving:
            return True
        self._say(f"verl's own path: only {total.saving:.0%} of FLOPs saved, min_saving {min_saving:.0%}", "min_saving")
        return False

    def _refuse(self, reason: str) -> None:
        """Raise, or say once that verl's own path runs, as `on_unsupported` has it."""
        assert self._dta_config is not None
        if self._dta_config.on_unsupported == "error":
            raise UnsupportedError(
                f"Prefix-tree execution is not exact here: {reason}. Or set "
                "+actor_rollout_ref.rollout.custom.dta.on_unsupported=dense."
            )
        self._say(f"verl's own path: {reason}", level=logging.WARNING)

    def _say(self, message: str, topic: str | None = None, level: int = logging.INFO) -> None:
        """One line from the first rank; about a topic, by default the message itself, only once."""
        topic = topic or message
        if self.rank == 0 and topic not in self._dta_said:
            self._dta_said.add(topic)
            say(message, level)
