"""RL of a diffusion LM on a task with a verifiable reward: BGPO, VRPO-online and diffu-GRPO on the same prompts.

    python recipes/quickstart/diffusion.py --output runs/quickstart_diffusion
    python -m benchmarks.diffusion.learning --plot docs/diffusion.png      # about 15 minutes on 2 CPU cores
    python -m benchmarks.diffusion.learning --smoke                        # 2 steps, 1 seed

Trains recipes/trl/quickstart_diffusion.yaml (sums of two digits; the reward is 1 for the right sum) with each objective
of DiffusionGRPOTrainer and the same seeds: runs of one seed see the same prompts in the same order, and differ in the
objective only. Every run is a process that computes on one thread; two of them run at a time.

`calls` are the model's forward passes of an update, `step s` the wall time of a step, sampling included, on a machine
that runs two at a time. Rewards are means of the first tenth of the steps, the last, and all of them, `+-` the standard
deviation over seeds. The task is easy on purpose: it shows that the objectives learn, not which is best on a hard one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

import matplotlib.pyplot as plt
import torch

from benchmarks.common.curves import Runs, arguments, by_name, draw_bands, reward_cells
from benchmarks.common.harness import environment, table, write_json

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, RECIPE = ROOT / "recipes" / "trl" / "diffusion.py", ROOT / "recipes" / "trl" / "quickstart_diffusion.yaml"
SAMPLES = 4
# Options that differ from the recipe's, and the forward passes of one update.
OBJECTIVES: dict[str, tuple[list[str], int]] = {
    "bgpo": (["--objective", "bgpo", "--num_elbo_samples", str(SAMPLES)], SAMPLES),
    "vrpo": (["--objective", "vrpo", "--num_elbo_samples", str(SAMPLES)], SAMPLES),
    "diffu-grpo": (["--objective", "diffu-grpo", "--num_elbo_samples", "16"], 1),  # 16 is TRL's field's default
}


@dataclass(frozen=True, slots=True)
class Run:
    """What one training logged, a number per step."""

    name: str
    seed: int
    reward: list[float]
    grad_norm: list[float]
    seconds: list[float]


def main() -> None:
    args = arguments(__doc__, steps=250, folder=ROOT / "runs" / "quickstart_diffusion")
    if not (args.folder / "model").is_dir():
        sys.exit(f"{args.folder} has no model. Make one: python recipes/quickstart/diffusion.py --output {args.folder}")
    where = environment(torch.device("cpu"))
    tasks = [(name, seed) for seed in args.seeds for name in OBJECTIVES]
    runs = []
    for run in _trained(tasks, args):
        runs.append(asdict(run))
        print(f"{run.name}, seed {run.seed}: reward {run.reward[0]:.2f} -> {run.reward[-1]:.2f}", flush=True)
    print(f"\n{learning_table(runs)}")
    content = {"benchmark": "diffusion_learning", "smoke": args.smoke, "steps": args.steps, **where, "runs": runs}
    if args.output:
        write_json(args.output, content)
    if args.plot:
        draw(runs, args.plot)


def _trained(tasks: list[tuple[str, int]], args: argparse.Namespace) -> Iterator[Run]:
    """The runs as they come, in the order of the tasks."""
    with ThreadPoolExecutor(args.workers) as pool:
        yield from pool.map(lambda task: trained(*task, OBJECTIVES[task[0]][0], args.steps, args.folder), tasks)


def trained(name: str, seed: int, options: list[str], steps: int, folder: Path, recipe: Path = RECIPE) -> Run:
    """The recipe, with other options, in a process of its own."""
    overrides = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "data",
        "seed": seed,
        "max_steps": steps,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": steps,
        "save_only_model": True,
    }
    with tempfile.TemporaryDirectory() as output:
        flags = [str(text) for key, value in overrides.items() for text in (f"--{key}", value)]
        command = [sys.executable, str(SCRIPT), "--config", str(recipe), *flags, *options]
        done = subprocess.run(
            [*command, "--output_dir", output],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{name}, seed {seed} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        (state,) = Path(output).glob("checkpoint-*/trainer_state.json")
        log = [entry for entry in json.loads(state.read_text())["log_history"] if "reward" in entry]
    return Run(name, seed, *([entry[key] for entry in log] for key in ("reward", "grad_norm", "step_time")))


def learning_table(runs: Runs) -> str:
    """One line per objective, over its seeds."""
    header = ("objective", "calls", "reward, first 10 %", "last 10 %", "all steps", "step s", "grad norm")
    rows = [
        (
            name,
            str(OBJECTIVES[name][1]),
            *reward_cells(found),
            f"{median(value for run in found for value in run['seconds']):.2f}",
            f"{fmean(value for run in found for value in run['grad_norm']):.2f}",
        )
        for name, found in by_name(runs).items()
    ]
    return table(header, rows)


def draw(runs: Runs, path: Path) -> None:
    """Reward over steps, a mean curve per objective in a band of one standard deviation over seeds."""
    figure, axis = plt.subplots(figsize=(6.0, 3.4), layout="constrained")
    draw_bands(axis, runs, "reward")
    seeds = len({run["seed"] for run in runs})
    axis.set(title=f"Right sums, mean of {seeds} seeds (over 5 steps)", xlabel="step", ylim=(0, 1.03))
    axis.legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
