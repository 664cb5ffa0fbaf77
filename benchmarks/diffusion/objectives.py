"""Which objective learns, and whether what it has learnt lasts: bgpo, trajectory, gdsd and vrpo on two tasks.

    python recipes/verl/diffusion.py runs/diffusion
    python recipes/quickstart/diffusion.py --output runs/quickstart_diffusion
    python -m benchmarks.diffusion.objectives --seeds 42 43 44 45 46 --output results.json   # 160 runs
    python -m benchmarks.diffusion.objectives --smoke

Each objective of DiffusionGRPOTrainer trains on both tasks, with low-confidence and random remasking, on-policy and
with 4 updates per rollout. Runs of one seed start from the same weights and see the same prompts. Every update takes 4
forward passes. The learning rate is constant and too large for comfort: what collapses should do so here.

    sevens   the task of recipes/verl/diffusion.sh: the reward is the share of 7s in 8 tokens, whatever the prompt says;
             random weights
    sums     the task of recipes/trl/quickstart_diffusion.yaml: the reward is 1 for the right sum of two digits, else 0;
             a model that writes most sums wrong by one

On-policy a run has 60 rollouts of sevens and 40 of sums (`--steps`: at most so many), with 4 updates each half as many.
Off-policy the objectives run with the clips that they have by default: `trajectory` and `gdsd` TRL's epsilon of 0.2,
`bgpo` and `vrpo` none. `fall` is the largest distance of a mean reward of 5 rollouts below its best so far; `+-` the
standard deviation over seeds.

Results are written after each run, and runs that are in `--output` already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from benchmarks.common.curves import Runs, arguments, by_name, draw_bands, smoothed, with_deviation
from benchmarks.common.harness import environment, table, write_json

ROOT = Path(__file__).resolve().parents[2]
# Options that are not at their defaults; gdsd divides by the width of the canvas whatever the norm.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "bgpo": {"length_norm": "none"},
    "trajectory": {"length_norm": "none"},
    "gdsd": {},
    "vrpo": {"length_norm": "none"},
}
REMASKING = ("low_confidence", "random")
UPDATES = (1, 4)


@dataclass(frozen=True, slots=True)
class Task:
    """Where its model and prompts are, below `--folder`; tokens of a completion; prompts, of 8 completions, a rollout.

    rollouts: of a training with one update each.
    """

    model: str
    prompts: str
    length: int
    prompts_per_rollout: int
    rollouts: int
    reward: Callable[..., list[float]]


@dataclass(frozen=True, slots=True)
class Run:
    """What one training logged: the reward of every rollout, and the gradient norm of its first update."""

    task: str
    remasking: str
    updates: int
    name: str
    seed: int
    reward: list[float]
    grad_norm: list[float]


Key = tuple[str, str, int, str, int]
"""The first five fields of a Run; `name` is the objective."""


def share_of_sevens(completions: list[Any], **_: Any) -> list[float]:
    texts = [turns[-1]["content"] for turns in completions]
    return [text.split().count("7") / TASKS["sevens"].length for text in texts]


def right_sum(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(text.split() == wanted.split()) for text, wanted in zip(completions, answer, strict=True)]


TASKS = {
    "sevens": Task("diffusion/model", "diffusion/train.jsonl", 8, 4, 60, share_of_sevens),
    "sums": Task("quickstart_diffusion/model", "quickstart_diffusion/data/train.jsonl", 4, 16, 40, right_sum),
}


def main() -> None:
    args = arguments(__doc__, steps=60, folder=ROOT / "runs", ways=list(OBJECTIVES))
    if missing := [task.model for task in TASKS.values() if not (args.folder / task.model).is_dir()]:
        sys.exit(f"{args.folder} has no {', '.join(missing)}. Make the models as the first lines of --help say.")
    where = environment(torch.device("cpu"))
    runs: Runs = json.loads(args.output.read_text())["runs"] if args.output and args.output.exists() else []
    for run in _trained(_missing(args, runs), args):
        runs.append(asdict(run) | {"commit": where["commit"]})
        print(f"{_key(runs[-1])}: fall {fall(run.reward):.2f}, mean {fmean(run.reward):.2f}", flush=True)
        if args.output:
            content = {"benchmark": "diffusion_objectives", "smoke": args.smoke, "steps": args.steps, **where}
            write_json(args.output, content | {"runs": runs})
    print(f"\n{objectives_table(runs)}")
    if args.plot:
        draw(runs, args.plot)


def _key(run: dict[str, Any]) -> Key:
    return run["task"], run["remasking"], run["updates"], run["name"], run["seed"]


def _missing(args: argparse.Namespace, runs: Runs) -> list[Key]:
    """Runs that are not there yet, by remasking and seed: stopped early, every objective has as many."""
    done = {_key(run) for run in runs}
    keys = [
        (task, remasking, updates, name, seed)
        for remasking, seed, task, updates, name in product(REMASKING, args.seeds, TASKS, UPDATES, args.only)
    ]
    return [key for key in keys if key not in done]


def _trained(keys: list[Key], args: argparse.Namespace) -> Any:
    """The runs as they come, in the order of the keys, each on one thread."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(_train, keys, [args.steps] * len(keys), [args.folder] * len(keys))


def _train(key: Key, steps: int, folder: Path) -> Run:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from transformers.trainer_callback import PrinterCallback

    from dta_plugin.adapters.trl import DiffusionGRPOConfig, DiffusionGRPOTrainer

    warnings.filterwarnings("ignore")
    name, remasking, updates, objective, seed = key
    task = TASKS[name]
    rollouts = min(steps, task.rollouts)
    rows = [json.loads(line) for line in (folder / task.prompts).read_text().splitlines()]
    columns = [column for column in ("prompt", "answer") if column in rows[0]]
    with tempfile.TemporaryDirectory() as output:
        config = DiffusionGRPOConfig(
            output_dir=output,
            objective=objective,
            num_elbo_samples=4,
            remasking=remasking,
            max_completion_length=task.length,
            block_length=task.length,
            diffusion_steps=task.length,
            per_device_train_batch_size=8 * task.prompts_per_rollout,
            num_generations=8,
            num_iterations=updates,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_steps=rollouts if updates == 1 else rollouts // 2 * updates,
            logging_steps=1,
            seed=seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            **OBJECTIVES[objective],
        )
        trainer = DiffusionGRPOTrainer(
            str(folder / task.model),
            task.reward,
            config,
            train_dataset=Dataset.from_list([{column: row[column] for column in columns} for row in rows]),
            processing_class=AutoTokenizer.from_pretrained(folder / task.model),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    return Run(*key, *([entry[field] for entry in log] for field in ("reward", "grad_norm")))


def fall(reward: list[float]) -> float:
    """The largest distance of the smoothed reward below its best so far."""
    curve = smoothed(reward)
    return float((np.maximum.accumulate(curve) - curve).max())


def by_setting(runs: Runs) -> dict[tuple[str, str, int], Runs]:
    """Per task, remasking and updates per rollout the runs, in the order of OBJECTIVES."""
    found = {key: [run for run in runs if _key(run)[:3] == key] for key in product(TASKS, REMASKING, UPDATES)}
    return {key: sorted(own, key=lambda run: list(OBJECTIVES).index(run["name"])) for key, own in found.items() if own}


def objectives_table(runs: Runs) -> str:
    """One line per setting and objective, over its seeds."""
    header = ("task", "remasking", "updates", "objective", "seeds", "mean reward", "last 10 %", "largest fall", "worst")
    rows = []
    for (task, remasking, updates), own in by_setting(runs).items():
        for name, found in by_name(own).items():
            last = [fmean(run["reward"][-max(1, len(run["reward"]) // 10) :]) for run in found]
            falls = [fall(run["reward"]) for run in found]
            means = with_deviation([fmean(run["reward"]) for run in found])
            cells = (means, with_deviation(last), with_deviation(falls), f"{max(falls):.3f}")
            rows.append((task, remasking, str(updates), name, str(len(found)), *cells))
    return table(header, rows)


def draw(runs: Runs, path: Path) -> None:
    """Reward over rollouts, a panel per setting: a mean curve per objective in a band of one standard deviation."""
    settings = list(product(REMASKING, UPDATES))
    figure, axes = plt.subplots(
        len(TASKS), len(settings), figsize=(11.0, 5.2), sharey=True, squeeze=False, layout="constrained"
    )
    places = {(task, *setting): axes[y, x] for y, task in enumerate(TASKS) for x, setting in enumerate(settings)}
    for key, own in by_setting(runs).items():
        draw_bands(places[key], own, "reward")
    for (task, remasking, updates), axis in places.items():
        axis.set(title=f"{task}, {remasking}" + (f", {updates} updates" if updates > 1 else ""), ylim=(0, 1.03))
        axis.title.set_fontsize(9)
    for axis in axes[-1]:
        axis.set_xlabel("rollout")
    for axis in axes[:, 0]:
        axis.set_ylabel("reward")
    axes[0, -1].legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
