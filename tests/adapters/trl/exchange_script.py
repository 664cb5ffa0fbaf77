"""Run by test_exchange.py under torchrun: trainings whose rows move between ranks, stock and as a tree.

torchrun --nproc-per-node 2 -m tests.adapters.trl.exchange_script <model> <folder> [case ...]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl import RLOOConfig, RLOOTrainer

from dta_plugin.adapters.trl import TreeRLOOConfig, TreeRLOOTrainer, exchange
from tests.adapters.trl.ddp_script import run_cases
from tests.adapters.trl.rollouts import Rollouts, as_if_vllm


@dataclass(frozen=True)
class RaggedRollouts(Rollouts):
    """The second rank's completions lack their last two tokens, so that ranks pad to different widths."""

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        output = super().__call__(prompts, trainer)
        if trainer.accelerator.process_index == 0:
            return output
        return {key: rows if key == "prompt_ids" else [row[:-2] for row in rows] for key, rows in output.items()}


def alternating() -> Dataset:
    """Two prompts in turn, unshuffled: the ranks get the same two, which one rank each could compute."""
    first, second = (" ".join(f"w{word}" for word in range(begin, begin + 16)) for begin in (4, 20))
    return Dataset.from_list([{"prompt": text} for text in [first, second] * 8])


def as_if_vllm_with_wrong_padding(trainer: Any) -> None:
    """Negative control: ratios padded with 0, which vespo sums the logarithms of. To run last."""
    as_if_vllm(trainer)
    exchange.PADDING.pop("importance_sampling_ratio", None)


ALWAYS = {"dta_balance_ranks": "always"}
SEPARATE = {"dta_merge_window": "never", **ALWAYS}
TURNS: dict[str, Any] = {"shuffle_dataset": False, "trainer_options": {"train_dataset": alternating()}}
SPREAD = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 4}
CORRECTED: dict[str, Any] = {
    "loss_type": "vespo",
    "prepare": as_if_vllm,
    "vllm_importance_sampling_mode": "token_truncate",
    "dta": SEPARATE,
    **SPREAD,
    "trainer_options": {"rollout_func": RaggedRollouts(environment=True)},
}
CASES: dict[str, dict[str, Any]] = {
    "apart": {"num_iterations": 2, "max_steps": 2, **TURNS},
    "together": {"num_iterations": 2, "max_steps": 2, "beta": 0.4, "dta": ALWAYS, **TURNS},
    "two_windows": {"loss_type": "grpo", "beta": 0.04, "dta": SEPARATE, **SPREAD, **TURNS},
    "merged": {"dta": {"dta_merge_window": "always", **ALWAYS}, **SPREAD, **TURNS},
    "in_order": {"dta": {"dta_regroup": "never", **SEPARATE}, **SPREAD},
    "rloo": {
        "trainers": (RLOOTrainer, TreeRLOOTrainer),
        "configs": (RLOOConfig, TreeRLOOConfig),
        "dta": SEPARATE,
        **SPREAD,
    },
    "corrected": CORRECTED,
    "declined": {"loss_type": "bnpo", "dta": ALWAYS, "max_steps": 1},
}
CONTROLS = {"wrong_padding": CORRECTED | {"prepare": as_if_vllm_with_wrong_padding, "max_steps": 2}}


if __name__ == "__main__":
    run_cases(CASES | CONTROLS, *sys.argv[1:])
