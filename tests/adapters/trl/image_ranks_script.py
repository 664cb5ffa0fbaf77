"""Run by test_image_ranks.py under torchrun: trainings with images, stock and as a tree, whose rows move between ranks.

torchrun --nproc-per-node 2 -m tests.adapters.trl.image_ranks_script <model> <folder> [case ...]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from trl import RLOOConfig, RLOOTrainer

from dta_plugin.adapters.trl import TreeRLOOConfig, TreeRLOOTrainer, transfer
from tests.adapters.trl.recurrent_ranks_script import run_cases
from tests.adapters.trl.vision import Tools, processor, questions

_moved_images = transfer._moved_images


def with_wrong_images(_: Any) -> None:
    """Negative control: pixels of rows that are exchanged come in another order. To run last."""

    def moved(*arguments: Any) -> dict[str, list[torch.Tensor]]:
        found = _moved_images(*arguments)
        return found | {"pixel_values": [part.flip(0) for part in found["pixel_values"]]}

    transfer._moved_images = moved


def half(completions: list[Any], prompts: list[Any], **_: Any) -> list[float]:
    """Completions of one of two prompts are all worth the same."""
    texts = [completion[0]["content"] for completion in completions]
    known = [prompt[0]["content"][-1]["text"].startswith("w5") for prompt in prompts]
    return [0.5 if same else len(set(text)) / 10 for same, text in zip(known, texts, strict=True)]


def turns(images: list[list[int]]) -> dict[str, Any]:
    """Two prompts in turn, unshuffled: both ranks get both, which one rank each could compute."""
    data = questions(images * 8, texts=1)
    return {"shuffle_dataset": False, "trainer_options": {"train_dataset": data, "processing_class": processor()}}


ALWAYS = {"dta_balance_ranks": "always"}
SEPARATE = {"dta_merge_window": "never", **ALWAYS}
SPREAD = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 4}
CASES: dict[str, dict[str, Any]] = {
    "apart": {"max_steps": 2, **turns([[0], [1]])},
    "together": {"max_steps": 2, "beta": 0.4, "dta": ALWAYS, **turns([[0], [3]])},
    "several": {"num_iterations": 2, "max_steps": 2, "dta": ALWAYS, **turns([[0, 1], [2]])},
    "merged": {"dta": {"dta_merge_window": "always", **ALWAYS}, **SPREAD, **turns([[0], [1, 2]])},
    "tools": {
        "loss_type": "grpo",
        "prepare": Tools(),
        "max_completion_length": 40,
        "dta": SEPARATE,
        **SPREAD,
        **turns([[0], [1]]),
    },
    # All rows of the first rank are worth the same: they are pruned, with their images, and the second's are not.
    "nothing_read": {
        "num_generations": 8,
        "max_steps": 2,
        "shuffle_dataset": False,
        "trainer_options": {
            "train_dataset": questions([[0], [1]] * 8),
            "processing_class": processor(),
            "reward_funcs": half,
        },
    },
    "rloo": {
        "trainers": (RLOOTrainer, TreeRLOOTrainer),
        "configs": (RLOOConfig, TreeRLOOConfig),
        "dta": SEPARATE,
        **SPREAD,
        **turns([[0], [1]]),
    },
}
SHARDED = ("together", "several", "tools", "nothing_read")
CONTROLS = {"wrong_images": CASES["together"] | {"prepare": with_wrong_images}}


if __name__ == "__main__":
    run_cases(sys.argv[1], sys.argv[2], CASES | CONTROLS, sys.argv[3:])
