"""What both of the plugin's engines for policies do alike: options, and the frame of a mini-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensordict import TensorDict
from torch import distributed, nn

from dta_plugin.adapters.verl_plugin.config import KEY
from dta_plugin.adapters.verl_plugin.jagged import clear_weights
from dta_plugin.adapters.verl_plugin.micro_batches import clear_plan
from dta_plugin.adapters.verl_plugin.mini_batch import MiniBatchRun
from dta_plugin.adapters.verl_plugin.run_checks import check_strategy
from dta_plugin.adapters.verl_plugin.tokens import OptimizerPasses, choose_tokens, selection_obstacle
from dta_plugin.adapters.verl_plugin.weighted_loss import weighted
from dta_plugin.config import TreeConfig
from dta_plugin.training.notices import Notices


class TreeEngineFrame:
    """Goes before an engine of verl's for language models, with its arguments. Options are the defaults at first.

    Who extends both says what a mini-batch comes to (`_begin`), and how far training has come (`_updates`).
    """

    engine_config: Any
    get_data_parallel_rank: Callable[[], int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._dta_config: TreeConfig | None = TreeConfig()
        self._dta_key = KEY
        self._dta_run: MiniBatchRun | None = None
        self._dta_passes = OptimizerPasses()
        self._dta_notices = Notices(speaks=distributed.get_rank() == 0)

    def configure_early(self, config: TreeConfig | None, key: str = KEY) -> None:
        """`configure` before there is a model; None: verl's own path. Raises InvalidInputError likewise.

        key: where the command has the options, for what refusals say.
        """
        if config is not None:
            check_strategy(config, self.engine_config.strategy)
        self._dta_config, self._dta_key = config, key

    def _mini_batch(
        self, stock: Callable[..., Any], data: TensorDict, config: TreeConfig, loss_function: Any, forward_only: bool
    ) -> Any:
        """What `stock`, verl's `forward_backward_batch` of this mini-batch, gives; updates have metrics of trees."""
        try:
            self._dta_run = run = self._begin(data, config, loss_function, forward_only)
            outputs = stock(loss_function=loss_function if run.drawn is None else weighted(loss_function))
        finally:
            self._dta_run = None
            clear_plan(data)
            clear_weights(data)
        if run.is_update and outputs:  # of a pipeline, the last stage has some
            outputs["metrics"].update(run.metrics())
        return outputs

    def _begin(self, data: TensorDict, config: TreeConfig, loss_function: Any, forward_only: bool) -> MiniBatchRun:
        """Choose a mini-batch's tokens, let all ranks agree on how it runs, and cut it into micro-batches."""
        raise NotImplementedError

    def _updates(self) -> int:
        """How many updates the learning-rate scheduler has seen."""
        raise NotImplementedError

    def _tokens_chosen(
        self, data: TensorDict, config: TreeConfig, loss_function: Any, forward_only: bool, model: nn.Module | None
    ) -> MiniBatchRun:
        """A run that has not been decided on, with the tokens of an update. model: as `choose_tokens` has it."""
        run = MiniBatchRun(None, not forward_only)
        if run.is_update and selection_obstacle(data, loss_function, config, self._dta_key) is None:
            step, rank = self._dta_passes.next(self._updates()), self.get_data_parallel_rank()
            run.drawn = choose_tokens(data, model, loss_function, config, step, rank)
        return run
