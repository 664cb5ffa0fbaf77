"""The call that takes the place of verl's model call in one forward step: a micro-batch as a prefix tree."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dta_plugin.adapters.verl_plugin.jagged import JaggedRows
from dta_plugin.adapters.verl_plugin.own_forwards import as_transformers_has_them
from dta_plugin.config import TreeConfig
from dta_plugin.execution.auto import run_tree
from dta_plugin.execution.prepared_batch import PreparedBatch
from dta_plugin.execution.probing.tree_difference import Difference
from dta_plugin.tree.report import TreeReport
from dta_plugin.verify import check_batch


@dataclass(frozen=True, slots=True, eq=False)
class TreeOutputs:
    """What verl's `prepare_model_outputs` is to return: jagged [S, len]; 0, or old log-probs, where no loss reads."""

    tensors: dict[str, torch.Tensor]


class TreeCall:
    """Called once, by verl's step, within its autocast. report: what was shared. verified: the dense path's result."""

    report: TreeReport

    def __init__(self, module: nn.Module, batch: PreparedBatch, rows: JaggedRows, config: TreeConfig) -> None:
        self.module, self.batch, self.rows, self.config = module, batch, rows, config
        self.wants_entropy = self.verifies = self.has_scaler = False
        self.verified: Difference | None = None

    def __call__(self, **_: Any) -> TreeOutputs:
        temperature = 1.0 if isinstance(self.rows.temperature, list) else self.rows.temperature
        with as_transformers_has_them():  # what a tree is checked against
            if self.verifies:
                self.verified = check_batch(self.module, self.batch, self.config, temperature)
            result = run_tree(
                self.module,
                self.batch,
                self.config,
                temperature=temperature,
                return_entropy=self.wants_entropy,
                has_scaler=self.has_scaler,
            )
        self.report = replace(result.report, pruned_tokens=self.rows.left_out)
        tensors = {"log_probs": self.rows.log_probs(result.logprobs)}
        if result.entropies is not None:
            tensors["entropy"] = self.rows.nested(result.entropies)
        return TreeOutputs(tensors)
