"""TRL's own dense scoring of completions, outside of a trainer: what `dta calibrate` compares trees with."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.trainer import utils

from dta_plugin.adapters.trl.upstream import check_scorer
from dta_plugin.calibrate import DenseBatch


class DenseScorer(GRPOTrainer):
    """As much of a trainer as the log-prob hook of TRL 1.0 to 1.16 reads; a `DensePath` when called.

    model: prepared as GRPOTrainer prepares its own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_scorer()
        if hasattr(utils, "add_fused_lm_head"):
            utils.add_fused_lm_head(
                model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs", "entropy")
            )
        self.model = model
        self.temperature = 1.0
        self.model_kwarg_keys: set[str] = {"logits_to_keep"}
        self.accelerator = SimpleNamespace(autocast=nullcontext, unwrap_model=lambda m: m, is_main_process=False)
        self.is_fsdp_enabled = self.use_liger_kernel = self._is_vlm = self._entropy_bonus_enabled = False

    def __call__(self, model: PreTrainedModel, rows: DenseBatch) -> torch.Tensor:
        """Log-probs [B, C]; entropies are computed beside them, as in training."""
        values: Any = self._get_per_token_logps_and_entropies(
            model, rows.input_ids, rows.attention_mask, rows.columns, compute_entropy=True
        )
        return values[0]
