"""Does the reward last? BGPO against the trajectory objective, under low-confidence and random remasking.

    python recipes/verl/diffusion.py runs/diffusion
    python -m benchmarks.diffusion.remasking             # about 5 minutes on 2 CPU cores
    python -m benchmarks.diffusion.remasking --smoke     # 2 steps, 1 seed

The task of recipes/verl/diffusion.sh (the reward is the share of 7s in 8 tokens, from random weights) through
DiffusionGRPOTrainer, with a constant learning rate that is too large for comfort: 1e-3, 4 prompts of 8 completions per
step. Both objectives run 4 passes per update: on-policy, and in the last setting with 4 updates per rollout, where
BGPO has no clip and the trajectory objective TRL's epsilon, 0.2. `fall` is the largest distance of a mean reward of 5
rollouts below its best so far; `+-` the standard deviation over seeds.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from benchmarks.common.curves import Runs, arguments, by_name, smoothed, with_deviation
from benchmarks.common.harness import environment, table, write_json

ROOT = Path(__file__).resolve().parents[2]
OBJECTIVES = ("bgpo", "trajectory")
SETTINGS: dict[str, dict[str, Any]] = {
    "low_confidence": {},
    "random": {"remasking": "random"},
    "low_confidence, 4 updates": {"num_iterations": 4},
}
WANTED, LENGTH = "7", 8


@dataclass(frozen=True, slots=True)
class Run:
    """What one training logged: the reward of every rollout, and the gradient norm of its first update."""

    name: str
    seed: int
    reward: list[float]
    grad_norm: list[float]


def main() -> None:
    args = arguments(__doc__, steps=80, folder=ROOT / "runs" / "diffusion")
    if not (args.folder / "model").is_dir():
        sys.exit(f"{args.folder} has no model. Make one: python recipes/verl/diffusion.py {args.folder}")
    tasks = [(setting, name, seed) for seed in args.seeds for setting in SETTINGS for name in OBJECTIVES]
    runs: Runs = []
    for run in _trained(tasks, args.workers, args.steps, args.folder):
        runs.append(asdict(run))
        print(f"{run.name}, seed {run.seed}: fall {fall(run.reward):.2f}, mean {fmean(run.reward):.2f}", flush=True)
    print(f"\n{remasking_table(runs)}")
    where = environment(torch.device("cpu"))
    content = {"benchmark": "diffusion_remasking", "smoke": args.smoke, "steps": args.steps, **where, "runs": runs}
    if args.output:
        write_json(args.output, content)


def _trained(tasks: list[tuple[str, str, int]], workers: int, steps: int, folder: Path) -> Iterator[Run]:
    """The runs as they come, in the order of the tasks, each on one thread."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(partial(_train, steps, folder), tasks)


def _share(completions: list[Any], **_: Any) -> list[float]:
    texts = [turns[-1]["content"] for turns in completions]
    return [text.split().count(WANTED) / LENGTH for text in texts]


def _train(steps: int, folder: Path, task: tuple[str, str, int]) -> Run:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from transformers.trainer_callback import PrinterCallback

    from dta_plugin.adapters.trl import DiffusionGRPOConfig, DiffusionGRPOTrainer

    warnings.filterwarnings("ignore")
    setting, name, seed = task
    changes = SETTINGS[setting]
    prompts = [json.loads(line)["prompt"] for line in (folder / "train.jsonl").read_text().splitlines()]
    with tempfile.TemporaryDirectory() as output:
        config = DiffusionGRPOConfig(
            output_dir=output,
            objective=name,
            num_elbo_samples=4,
            length_norm="none",
            max_completion_length=LENGTH,
            block_length=LENGTH,
            diffusion_steps=LENGTH,
            per_device_train_batch_size=32,
            num_generations=8,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_steps=steps * changes.get("num_iterations", 1),
            logging_steps=1,
            seed=seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            **changes,
        )
        trainer = DiffusionGRPOTrainer(
            str(folder / "model"),
            _share,
            config,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    return Run(f"{setting}, {name}", seed, *([entry[key] for entry in log] for key in ("reward", "grad_norm")))


def fall(reward: list[float]) -> float:
    """The largest distance of the smoothed reward below its best so far."""
    curve = smoothed(reward)
    return float((np.maximum.accumulate(curve) - curve).max())


def remasking_table(runs: Runs) -> str:
    """One line per setting and objective, over its seeds."""
    header = ("remasking, objective", "mean reward", "last 10 %", "largest fall")
    rows = [
        (
            name,
            with_deviation([fmean(run["reward"]) for run in found]),
            with_deviation([fmean(run["reward"][-max(1, len(run["reward"]) // 10) :]) for run in found]),
            with_deviation([fall(run["reward"]) for run in found]),
        )
        for name, found in by_name(runs).items()
    ]
    return table(header, rows)


if __name__ == "__main__":
    main()
