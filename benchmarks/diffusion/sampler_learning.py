"""What approximations of the sampler cost in learning: caches under full attention, and a confidence threshold.

    python recipes/quickstart/diffusion.py --output runs/quickstart_diffusion
    python -m benchmarks.diffusion.sampler_learning            # about 10 minutes on 2 CPU cores
    python -m benchmarks.diffusion.sampler_learning --smoke    # 2 steps, 1 seed

Trains recipes/trl/quickstart_diffusion.yaml (sums of two digits, a canvas of 4 tokens in blocks of 2, full attention)
with BGPO and with the trajectory objective, and samples in four ways. What is scored is the whole model in every case;
what is sampled is that of the approximation. `+-`: the standard deviation over seeds.
"""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from benchmarks.common.curves import Runs, arguments, by_name, reward_cells
from benchmarks.common.harness import environment, table, write_json
from benchmarks.diffusion.learning import RECIPE, Run, trained

ROOT = Path(__file__).resolve().parents[2]
CALLS = ["--diffusion_steps", "4"]
SAMPLERS = {
    "kv_cache none": [*CALLS, "--kv_cache", "none"],
    "prefix": [*CALLS, "--kv_cache", "prefix"],
    "dual": [*CALLS, "--kv_cache", "dual"],
    "confidence_threshold 0.9": ["--confidence_threshold", "0.9"],
}
OBJECTIVES = ("bgpo", "trajectory")


def main() -> None:
    args = arguments(__doc__, steps=120, folder=ROOT / "runs" / "quickstart_diffusion")
    if not (args.folder / "model").is_dir():
        sys.exit(f"{args.folder} has no model. Make one: python recipes/quickstart/diffusion.py --output {args.folder}")
    where = environment(torch.device("cpu"))
    tasks = [(seed, objective, name) for seed in args.seeds for objective in OBJECTIVES for name in SAMPLERS]
    runs: Runs = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.workers) as pool:
        recipe = _without_steps(Path(folder))

        def train(task: tuple[int, str, str]) -> Run:
            seed, objective, name = task
            options = ["--objective", objective, *SAMPLERS[name]]
            return trained(f"{objective}, {name}", seed, options, args.steps, args.folder, recipe)

        for run in pool.map(train, tasks):
            runs.append(asdict(run))
            print(f"{run.name}, seed {run.seed}: reward {run.reward[0]:.2f} -> {run.reward[-1]:.2f}", flush=True)
    print(f"\n{sampler_table(runs)}")
    content = {"benchmark": "diffusion_sampler_learning", "smoke": args.smoke, "steps": args.steps, **where}
    if args.output:
        write_json(args.output, content | {"runs": runs})


def _without_steps(folder: Path) -> Path:
    """The recipe without `diffusion_steps`, which does not go with a threshold."""
    options = yaml.safe_load(RECIPE.read_text())
    del options["diffusion_steps"]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def sampler_table(runs: Runs) -> str:
    """One line per objective and sampler, over its seeds."""
    header = ("objective, sampler", "reward, first 10 %", "last 10 %", "all steps")
    return table(header, [(name, *reward_cells(found)) for name, found in by_name(runs).items()])


if __name__ == "__main__":
    main()
