"""Drop-in trainers: `TreeGRPOTrainer` and `TreeRLOOTrainer`, and the mixin for any trainer with the same hooks.

    class MyTreeTrainer(TreeTrainerMixin, MyGRPOTrainer): ...

With TreeGRPOConfig the tree runs as its `use_dta` and `dta_*` say; with a plain GRPOConfig as `dta_plugin.enable` was
told, or else with the class's `tree_config`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import Trainer
from trl import GRPOTrainer, RLOOTrainer

from dta_plugin.adapters.trl import hooks, patch
from dta_plugin.adapters.trl.protocols import GRPOLike
from dta_plugin.adapters.trl.summary import summed_up
from dta_plugin.config import TreeConfig


class TreeTrainerMixin:
    """Goes before a TRL trainer with `_get_per_token_logps_and_entropies` and `_prepare_inputs` in the bases."""

    tree_config = TreeConfig()

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        own = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
        return hooks.log_probs(cast(GRPOLike, self), own, patch.process_config() or self.tree_config, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with summed_up(cast(Trainer, self)):
            return super().train(*args, **kwargs)  # type: ignore[misc]

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        own = super()._prepare_inputs  # type: ignore[misc]
        return hooks.prepare_inputs(
            cast(GRPOLike, self), own, patch.process_config() or self.tree_config, generation_batch
        )


class TreeGRPOTrainer(TreeTrainerMixin, GRPOTrainer):
    """GRPOTrainer that computes the tokens its rollouts share once, with the same losses and gradients."""


class TreeRLOOTrainer(TreeTrainerMixin, RLOOTrainer):
    """RLOOTrainer that computes the tokens its rollouts share once, with the same losses and gradients."""
