"""`TreeMegatronEngine`: verl's Megatron engine for language models, with log-probs and entropies from prefix trees.

Old log-probs, reference and update all come through `forward_step`: each micro-batch is one packed row of a tree, which
Megatron's own model, schedules and recomputation carry along (`model`). Everything around it stays verl's and
Megatron's: losses, pipeline, gradient reduction, optimizer, checkpoints, weight export. A mini-batch is cut into
micro-batches in which siblings meet, and tokens that no loss reads are left out, as in the engine for FSDP. Packed
execution only: a micro-batch is one call of the model, and memory is bounded by `max_token_len_per_gpu` tree tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDict
from torch import distributed
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.megatron_utils import unwrap_model
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

from dta_plugin.adapters.verl_plugin.jagged import JaggedRows
from dta_plugin.adapters.verl_plugin.megatron.check import Agreement, agreement, probe_data
from dta_plugin.adapters.verl_plugin.megatron.cost import model_cost
from dta_plugin.adapters.verl_plugin.megatron.mini_batch import (
    cost_on_all_ranks,
    find,
    for_the_pipeline,
    tree_cost,
    virtual_stages_multiple,
)
from dta_plugin.adapters.verl_plugin.megatron.model import read_along_trees, run_row
from dta_plugin.adapters.verl_plugin.megatron.obstacles import engine_obstacle
from dta_plugin.adapters.verl_plugin.megatron.row import TreeRow
from dta_plugin.adapters.verl_plugin.megatron.scoring import model_output
from dta_plugin.adapters.verl_plugin.micro_batches import agreed, set_plan
from dta_plugin.adapters.verl_plugin.mini_batch import MiniBatchRun, decide
from dta_plugin.adapters.verl_plugin.obstacles import text_obstacle
from dta_plugin.adapters.verl_plugin.run_checks import saves_enough, take_own_path
from dta_plugin.adapters.verl_plugin.tree_engine import TreeEngineFrame
from dta_plugin.adapters.verl_plugin.upstream import check_megatron_engine
from dta_plugin.config import TreeConfig
from dta_plugin.errors import UnsupportedError, VerificationError
from dta_plugin.tree.cost import ModelCost
from dta_plugin.tree.report import TreeReport


class TreeMegatronEngine(TreeEngineFrame, MegatronEngineWithLMHead):
    """Same arguments as the engine it extends. Until `configure` is called, options have their defaults."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._dta_obstacle: str | None = None
        self._dta_cost: ModelCost | None = None
        self._dta_batches = 0
        self._dta_missed: str | None = None

    def configure(self, config: TreeConfig | None, diffusion: object = None) -> None:
        """Options from now on; None: verl's own path.

        Raises InvalidInputError for what Megatron cannot do, and UnsupportedError for a diffusion LM.
        """
        if diffusion is not None:
            raise UnsupportedError("Diffusion LMs do not run with strategy=megatron. Expected strategy=fsdp or fsdp2.")
        self.configure_early(config)

    def initialize(self) -> None:
        super().initialize()
        check_megatron_engine(self)
        obstacles = agreed(engine_obstacle(self), distributed.group.WORLD)  # pipeline stages have some of their own
        self._dta_obstacle = next((found for found in obstacles if found is not None), None)
        if self._dta_obstacle is None:
            self._vocabulary = int(self.model_config.hf_config.vocab_size)
            self._dta_cost = model_cost(self.tf_config, self._vocabulary)
            for chunk in self.module:
                read_along_trees(unwrap_model(chunk))

    def forward_backward_batch(self, data: TensorDict, loss_function: Any, forward_only: bool = False) -> Any:
        if self._dta_config is None:
            return super().forward_backward_batch(data, loss_function, forward_only)
        self._check(data, self._dta_config)
        stock = functools.partial(super().forward_backward_batch, data, forward_only=forward_only)
        whole = functools.partial(self._whole, stock)
        return self._mini_batch(whole, data, self._dta_config, loss_function, forward_only)

    def _whole(self, stock: Callable[..., Any], **given: Any) -> Any:
        """verl's pass. Raises UnsupportedError, on all ranks, where a layer of any stage did not use the tree."""
        self._dta_missed = None
        outputs = stock(**given)
        found = agreed(self._dta_missed, distributed.group.WORLD)
        missed = next((stage for stage in found if stage is not None), None)
        if missed is not None:
            raise UnsupportedError(missed)
        return outputs

    def forward_step(
        self,
        batch_iter: Iterator[TensorDict],
        model: Any,
        logits_processor_func: Any,
        postprocess_micro_batch_func: Any,
    ) -> Any:
        run = self._dta_run
        if run is None:
            return super().forward_step(batch_iter, model, logits_processor_func, postprocess_micro_batch_func)
        stage = unwrap_model(model)
        counts = not getattr(stage, "vp_stage", None)  # of virtual stages, the first one
        micro_batch = next(batch_iter)
        if run.config is None:
            if counts:
                run.counts.add_dense(int(micro_batch["input_ids"].offsets()[-1]))
            return super().forward_step(iter([micro_batch]), model, logits_processor_func, postprocess_micro_batch_func)
        micro_batch = micro_batch.to(get_device_id())
        rows = JaggedRows.from_data(micro_batch, None)
        multiple = self.tf_config.tensor_model_parallel_size if self.tf_config.sequence_parallel else 1
        row = TreeRow.from_rows(rows, run.config.backend, multiple, rows.offsets.device)
        output: Any
        output, missed = run_row(model, row, stage)
        self._dta_missed = self._dta_missed or missed
        if stage.post_process:
            wants_entropy = bool(tu.get_non_tensor_data(micro_batch, "calculate_entropy", False))
            output = model_output(output, row, rows, self._entropy_chunk, wants_entropy)
        if counts:
            self._report(run, row, rows)
        return output, functools.partial(postprocess_micro_batch_func, data=micro_batch)

    @property
    def _entropy_chunk(self) -> int | None:
        config = self.engine_config
        return config.entropy_from_logits_chunk_size if config.entropy_from_logits_with_chunking else None

    def _report(self, run: MiniBatchRun, row: TreeRow, rows: JaggedRows) -> None:
        assert self._dta_cost is not None and run.config is not None
        cost = tree_cost(self._dta_cost, row.tree, row.edges)
        report = TreeReport(
            tree=row.tree,
            chunks=1,
            executor="packed",
            backend="+".join(sorted(row.params.mask.backends_used)),
            reason=f"{cost.saving:.0%} of dense FLOPs saved",
            cost=cost,
            pruned_tokens=rows.left_out,
        )
        run.counts.add_tree(report)
        if run.is_update:
            self._dta_notices.say_report(report, run.config.picture)

    def _check(self, data: TensorDict, config: TreeConfig) -> None:
        """The probe, before the first mini-batch, and what `verify` asks for.

        Raises VerificationError where a mini-batch has to be verified and is not within rounding.
        """
        number = self._dta_batches
        self._dta_batches += 1
        if self._dta_obstacle is None and number == 0 and config.probe == "auto":
            multiple = virtual_stages_multiple(self.tf_config)
            probe = probe_data(self.tf_config, self._vocabulary, data["input_ids"].device, multiple)
            probed = self._agreement(probe, config)
            if not probed.is_given:
                self._dta_obstacle = (
                    f"a small tree differs from the model's own path by {probed}. Expected rounding errors only; "
                    "please report the model, and train without trees (probe=off would train on what differs)"
                )
            self._dta_notices.say_once(f"probed: log-probs of a small tree differ by {probed}")
        if config.verifies(number) and self._runs_as_trees(data):
            found = self._agreement(data, config)
            if not found.is_given:
                raise VerificationError(
                    f"Trees and verl's own path differ by {found}. Run without trees, and report it."
                )
            self._dta_notices.say(
                f"mini-batch {number + 1} verified against verl's own path: log-probs differ by {found}"
            )

    def _runs_as_trees(self, data: TensorDict) -> bool:
        """Whether no rank has anything against it; else `_begin` says what, and there is nothing to verify."""
        return not any(agreed(self._dta_obstacle or text_obstacle(data), distributed.group.WORLD))

    def _agreement(self, data: TensorDict, config: TreeConfig) -> Agreement:
        """Whatever a tree would save here: what it gives is compared, and other mini-batches may save more."""
        config = replace(config, min_saving=0.0)
        return agreement(self._log_probs, lambda rows: self._log_probs(rows, config), data, self.module, self.tf_config)

    def _log_probs(self, data: TensorDict, config: TreeConfig | None = None) -> torch.Tensor | None:
        """A pass in evaluation mode, as a tree if there is a config; None on ranks that have no outputs."""
        training = [chunk.training for chunk in self.module]
        try:
            for chunk in self.module:
                chunk.eval()
            if config is not None:
                self._dta_run = self._begin(data, config, None, forward_only=True)
            with torch.no_grad():
                outputs = self._whole(super().forward_backward_batch, data=data, loss_function=None, forward_only=True)
        finally:
            self._dta_run = None
            for chunk, was_training in zip(self.module, training, strict=True):
                chunk.train(was_training)
        return outputs["model_output"]["log_probs"] if outputs else None

    def _updates(self) -> int:
        return int(self.lr_scheduler.num_steps)

    def _begin(self, data: TensorDict, config: TreeConfig, loss_function: Any, forward_only: bool) -> MiniBatchRun:
        run = self._tokens_chosen(data, config, loss_function, forward_only, None)
        findings, plans = find(
            self._dta_obstacle, self._dta_cost, data, config, loss_function, forward_only, self._dta_key
        )
        ranks = agreed(findings, distributed.group.WORLD)
        decision = decide(ranks)
        if decision.obstacle is not None:
            take_own_path(decision.obstacle, config, self._dta_notices, self._dta_key)
            return run
        if config.min_saving and self._dta_cost is not None:
            saving = cost_on_all_ranks(self._dta_cost, data, self.get_data_parallel_group()).saving
            if not saves_enough(saving, config, self._dta_notices):
                return run
        count = for_the_pipeline(decision, ranks, virtual_stages_multiple(self.tf_config))
        if plans is not None and count is not None:
            set_plan(data, plans.plan(count))
        run.config = config
        return run
