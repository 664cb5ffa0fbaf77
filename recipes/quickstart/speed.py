"""Measure the policy update with and without the flag, on the same batches, in one process.

    python recipes/quickstart/speed.py recipes/trl/quickstart.yaml

Builds the recipe's own trainer, samples generation batches with it, and times loss + backward of each batch through
stock TRL and through the tree, taking turns. Prints the median times and their ratio, and writes them to speed.json in
the run's folder.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config
from trl.scripts.grpo import GRPOScriptArguments

import dta_plugin

sys.path.insert(0, str(Path(__file__).parents[2]))

BATCHES, ROUNDS = 1, 3


def build_trainer(recipe: str, *overrides: str) -> GRPOTrainer:
    """The trainer that `trl grpo --config RECIPE` builds, overrides (`--seed`, `1`) included."""
    parser = TrlParser((GRPOScriptArguments, GRPOConfig, ModelConfig))
    script, args, model = parser.parse_args_and_config(["--config", recipe, *overrides], fail_with_unknown_args=False)
    paths = [name.rsplit(".", 1) for name in script.reward_funcs]
    functions = [getattr(importlib.import_module(module), name) for module, name in paths]
    return GRPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=functions,
        args=args,
        train_dataset=load_dataset(script.dataset_name)["train"],
        peft_config=get_peft_config(model),
    )


def update_seconds(trainer: GRPOTrainer, inputs: dict[str, Any]) -> float:
    """Loss and backward of one micro-batch."""
    trainer.model.zero_grad()
    start = time.perf_counter()
    trainer.compute_loss(trainer.model, inputs).backward()
    return time.perf_counter() - start


def measure(trainer: GRPOTrainer) -> dict[str, float]:
    """Median seconds of both paths, and the ratio of these."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    stock, tree = [], []
    loader = iter(trainer.get_train_dataloader())
    for _ in range(BATCHES):
        with torch.no_grad():
            inputs = trainer._generate_and_score_completions(next(loader))
        for turn in range(ROUNDS + 1):
            dta_plugin.disable()
            stock.append(update_seconds(trainer, inputs))
            dta_plugin.enable()
            tree.append(update_seconds(trainer, inputs))
            if turn == 0:  # warm-up
                stock.pop(), tree.pop()
    dta_plugin.disable()
    seconds = {"stock_seconds": statistics.median(stock), "tree_seconds": statistics.median(tree)}
    return {**seconds, "speedup": seconds["stock_seconds"] / seconds["tree_seconds"]}


def main() -> None:
    recipe = sys.argv[1] if len(sys.argv) > 1 else "recipes/trl/quickstart.yaml"
    trainer = build_trainer(recipe)
    result = measure(trainer)
    output = Path(trainer.args.output_dir) / "speed.json"
    output.write_text(json.dumps(result, indent=2))
    print(
        f"policy update on the same batches: stock TRL {result['stock_seconds']:.2f} s, tree "
        f"{result['tree_seconds']:.2f} s: {result['speedup']:.2f}x faster ({output})"
    )


if __name__ == "__main__":
    main()
