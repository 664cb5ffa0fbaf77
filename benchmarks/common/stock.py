"""Stock TRL's way to run an update: `GRPOTrainer._get_per_token_logps_and_entropies` itself."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.common.models import without_adapters
from benchmarks.common.updates import Outcome, Step, joined, micro_batches
from benchmarks.common.workloads import Workload


def trl(model: PreTrainedModel, work: Workload, inputs: Mapping[str, Any] | None = None) -> Step:
    """`model` must have TRL's fused LM head; see `prepare_for_trl`. inputs: of images, where all is one micro-batch."""
    from trl import GRPOTrainer

    trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext, is_main_process=False))
    batches = micro_batches(work)
    total = sum(work.completion_lengths)

    def step() -> Outcome:
        outcomes = []
        for input_ids, attention_mask, completion, advantages in batches:
            logps, entropies, _ = GRPOTrainer._get_per_token_logps_and_entropies(
                trainer, model, input_ids, attention_mask, completion.shape[1], compute_entropy=True, **(inputs or {})
            )
            loss = -(torch.exp(logps - logps.detach()) * advantages[:, None] * completion).sum() / total
            loss.backward()
            outcomes.append(Outcome(loss.detach(), logps.detach()[completion], entropies.detach()[completion]))
        return joined(outcomes)

    return step


def prepare_for_trl(model: PreTrainedModel) -> None:
    """What GRPOTrainer.__init__ does to its model, at temperature 1."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(
        without_adapters(model), temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs", "entropy")
    )
