"""Drop-in for TRL's asynchronous trainer: `TreeAsyncGRPOTrainer`, with `TreeAsyncGRPOConfig`.

TRL announces that what this imports is experimental, so nothing else here imports it; `dta_plugin.enable` reaches TRL's
own class when somebody else does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

from dta_plugin.adapters.trl import async_scoring, patch
from dta_plugin.adapters.trl.config import TreeArguments, Validated
from dta_plugin.adapters.trl.protocols import AsyncLike
from dta_plugin.adapters.trl.upstream import check_async
from dta_plugin.config import TreeConfig

check_async()

__all__ = ["TreeAsyncGRPOConfig", "TreeAsyncGRPOTrainer"]


@dataclass
class TreeAsyncGRPOConfig(Validated, TreeArguments, AsyncGRPOConfig):
    """AsyncGRPOConfig with `use_dta` (on) and the `dta_*` options; see TreeConfig for their meaning."""


class TreeAsyncGRPOTrainer(AsyncGRPOTrainer):
    """AsyncGRPOTrainer whose rows run on any device, with windows, soft-caps and sinks: with the same loss."""

    tree_config = TreeConfig()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if patch.process_config() is None:
            async_scoring.PLACE.check(self.tree_config)
        async_scoring.construct(self, super().__init__, self._default(), *args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        own = super().compute_loss
        return async_scoring.compute_loss(cast(AsyncLike, self), own, self._default(), *args, **kwargs)

    def _log_step_metrics(self) -> None:
        async_scoring.log_step_metrics(cast(AsyncLike, self), super()._log_step_metrics, self._default())

    def _default(self) -> TreeConfig:
        return patch.process_config() or self.tree_config
