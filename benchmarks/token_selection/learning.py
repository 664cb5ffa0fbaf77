"""Does an update on half of the tokens learn as well? Learning curves of the quickstart with token selection (NAT).

    python recipes/quickstart/build.py --output runs/quickstart
    python -m benchmarks.token_selection.learning --plot docs/selection.png      # about 10 minutes on 2 CPU cores
    python -m benchmarks.token_selection.learning --smoke                        # 2 steps, 1 seed

Trains recipes/trl/quickstart.yaml on all tokens, with rpc (its own floor, and one of 0.1) and with urs at half of them,
each with the same seeds: runs of one seed see the same prompts in the same order, and differ in nothing else. Every run
has a process that computes on one thread; two of them run at a time. `--only` takes some of them.

How to read the table: rewards are means of the first tenth of the steps, the last, all of them, and of the last tenth
of as many tokens as every run has run; `+-` is the standard deviation over seeds. `update s` is the CPU time of loss
and backward pass per step; drawing is not in it. `tokens run` go through the model in it, after sharing, pruning (rows
with advantage 0 do not run) and selection; `kept` is the selection's share of the tokens that carry loss. `saved` is
the most that autograd holds at a time, as a mean over steps. Three seeds tell large differences only.

This task is about learning, not about saving: completions are short, prompts are most of what runs, and what a step
runs depends on how many groups are solved and therefore pruned.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback, TrainerCallback

import dta_plugin
from benchmarks.common.backward import SavedBytes
from benchmarks.common.curves import arguments
from benchmarks.common.harness import environment, write_json
from benchmarks.token_selection.learning_report import draw, learning_table
from dta_plugin import TreeConfig

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "trl" / "quickstart.yaml"
SELECTIONS: dict[str, dict[str, Any]] = {
    "all tokens": {},
    "rpc 50 %": {"token_selection": "rpc", "token_budget": 0.5},
    "rpc 50 %, floor 0.1": {"token_selection": "rpc", "token_budget": 0.5, "token_floor": 0.1},
    "urs 50 %": {"token_selection": "urs", "token_budget": 0.5},
}


@dataclass(frozen=True, slots=True)
class Task:
    """One training. folder: what build.py was given as --output."""

    name: str
    seed: int
    steps: int
    folder: str


@dataclass(frozen=True, slots=True)
class Run:
    """What one training logged, a number per step; kept_fraction: None where no token carried loss."""

    name: str
    seed: int
    reward: list[float]
    grad_norm: list[float]
    tree_tokens: list[float]
    kept_fraction: list[float | None]
    seconds: list[float]
    saved_bytes: list[int]


class Updates(TrainerCallback):
    """CPU seconds and peak of saved bytes of every step's loss and backward pass, which is what a step does before its
    optimizer runs, less what generation takes. The trainer's own methods stay as they are: token selection refuses a
    loss that somebody has wrapped."""

    def __init__(self, trainer: Any) -> None:
        self.seconds: list[float] = []
        self.saved_bytes: list[int] = []
        self._saved = SavedBytes(trainer.model)
        self._generate = trainer._generate_and_score_completions
        trainer._generate_and_score_completions = self._generated

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._saved.peak = self._saved.live
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._saved.pack, lambda held: held.tensor)
        self._hooks.__enter__()
        self._start = time.process_time()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self._start)
        self._hooks.__exit__()
        self.saved_bytes.append(self._saved.peak)

    def _generated(self, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        rows = self._generate(*args, **kwargs)
        self._start += time.process_time() - start
        return rows


def main() -> None:
    args = arguments(__doc__, steps=60, folder=ROOT / "runs" / "quickstart", ways=list(SELECTIONS))
    if not (args.folder / "model").is_dir():
        sys.exit(f"{args.folder} has no model. Make one: python recipes/quickstart/build.py --output {args.folder}")
    torch.set_num_threads(1)
    where = environment(torch.device("cpu"))
    tasks = [Task(name, seed, args.steps, str(args.folder)) for seed in args.seeds for name in args.only]
    runs = []
    for run in _trained(tasks, args.workers):
        runs.append(run)
        print(f"{run.name}, seed {run.seed}: reward {run.reward[0]:.2f} -> {run.reward[-1]:.2f}", flush=True)
    print(f"\n{learning_table([asdict(run) for run in runs])}")
    result = {
        "benchmark": "selection_learning",
        "smoke": args.smoke,
        "clock": "cpu",
        "steps": args.steps,
        "selections": {name: SELECTIONS[name] for name in args.only},
        **where,
        "runs": [asdict(run) for run in runs],
    }
    if args.output:
        write_json(args.output, result)
    if args.plot:
        draw(result["runs"], args.plot)


def _trained(tasks: list[Task], workers: int) -> Iterator[Run]:
    """The runs as they come, in the order of the tasks."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_train, tasks)


def _train(task: Task) -> Run:
    from recipes.quickstart.speed import build_trainer

    torch.set_num_threads(1)
    overrides = {
        "model_name_or_path": f"{task.folder}/model",
        "dataset_name": f"{task.folder}/data",
        "seed": task.seed,
        "max_steps": task.steps,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    with tempfile.TemporaryDirectory() as output:
        flags = [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
        trainer = build_trainer(str(RECIPE), *flags, "--output_dir", output)
        trainer.remove_callback(PrinterCallback)
        updates = Updates(trainer)
        trainer.add_callback(updates)
        dta_plugin.enable(TreeConfig(**SELECTIONS[task.name]))
        trainer.train()
        dta_plugin.disable()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    return Run(
        name=task.name,
        seed=task.seed,
        reward=[entry["reward"] for entry in log],
        grad_norm=[entry["grad_norm"] for entry in log],
        tree_tokens=[entry["dta/tree_tokens"] for entry in log],
        kept_fraction=[entry.get("dta/kept_fraction") for entry in log],
        seconds=updates.seconds,
        saved_bytes=updates.saved_bytes,
    )


if __name__ == "__main__":
    main()
