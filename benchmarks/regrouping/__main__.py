"""Which of TRL's metrics change where rows are dealt out anew, and by how much?

    python recipes/quickstart/build.py --output runs/quickstart
    python -m benchmarks.regrouping            # three minutes on one CPU core
    python -m benchmarks.regrouping --smoke    # one loss, one optimizer step

Trains the quickstart's model with GRPO, once as stock TRL does and once with siblings brought together (`regroup`,
without `merge_window` and `prune`, which are other matters), both with the same seed: the same completions, 3 to 20
tokens long, in other micro-batches. A generation batch is used for two optimizer steps of eight micro-batches of eight
rows, so that the second is off-policy and clips.

How to read the table: what stock TRL logs, as a mean over optimizer steps, and how far the other training's entries are
from it, relative to that mean, on average and at most. `loss` and `grad_norm` say that it is the same training: their
differences are rounding, which Adam makes grow from step to step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback

import dta_plugin
from benchmarks.common.harness import environment, table, write_json

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "trl" / "quickstart.yaml"
LOSSES = ("grpo", "dapo", "cispo", "vespo")
STEPS = 8
TRAINING = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 8,
    "steps_per_generation": 16,
    "beta": 0.04,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
}
COMPARED = ("loss", "grad_norm", "kl", "entropy", "clip_ratio/", "cispo_clip_ratio", "vespo/")
Log = list[dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one loss, one optimizer step")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "quickstart", help="what build.py wrote")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    if not (args.folder / "model").is_dir():
        sys.exit(f"{args.folder} has no model. Make one: python recipes/quickstart/build.py --output {args.folder}")
    torch.set_num_threads(1)
    where = environment(torch.device("cpu"))
    losses, steps = (LOSSES[-1:], 1) if args.smoke else (LOSSES, STEPS)
    rows = []
    for loss in losses:
        stock, regrouped = (_train(args.folder, loss, steps, with_flag) for with_flag in (False, True))
        rows += [{"loss_type": loss, **row} for row in compared(stock, regrouped)]
    header = ["loss_type", "metric", "stock, mean", "difference, mean", "largest"]
    print(table(header, [_cells(row) for row in rows]))
    if args.output:
        write_json(args.output, {"benchmark": "regrouping", "smoke": args.smoke, "steps": steps, **where, "rows": rows})


def compared(stock: Log, regrouped: Log) -> list[dict[str, Any]]:
    """A row per metric. Differences are relative to the mean of stock's absolute values; metrics that stay 0 are out.

    Raises:
        RuntimeError: the trainings have sampled different completions, so that their metrics say nothing.
    """
    for name in ("reward", "completions/mean_length"):
        ours, theirs = ([entry[name] for entry in log if name in entry] for log in (regrouped, stock))
        if ours != theirs:
            raise RuntimeError(f"The trainings are not the same any more: {name} is {ours} instead of {theirs}.")
    rows = []
    for name in (name for name in stock[0] if name.startswith(COMPARED)):
        values = [entry[name] for entry in stock]
        apart = [abs(value - entry[name]) for value, entry in zip(values, regrouped, strict=True)]
        scale = statistics.fmean(map(abs, values))
        if scale:
            row = {"stock": statistics.fmean(values), "mean": statistics.fmean(apart) / scale}
            rows.append({"metric": name, **row, "largest": max(apart) / scale})
    return rows


def _cells(row: dict[str, Any]) -> list[str]:
    return [row["loss_type"], row["metric"], f"{row['stock']:.3g}", _share(row["mean"]), _share(row["largest"])]


def _share(value: float) -> str:
    return f"{value:.1%}" if value > 5e-4 else f"{value:.0e}"


def _train(folder: Path, loss: str, steps: int, with_flag: bool) -> Log:
    from recipes.quickstart.speed import build_trainer

    overrides = {
        **TRAINING,
        "model_name_or_path": f"{folder}/model",
        "dataset_name": f"{folder}/data",
        "loss_type": loss,
        "max_steps": steps,
    }
    with tempfile.TemporaryDirectory() as output:
        flags = [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
        trainer = build_trainer(str(RECIPE), *flags, "--output_dir", output)
        trainer.remove_callback(PrinterCallback)
        for model in (trainer.model, trainer.ref_model):
            model.double()  # rounding, amplified step by step, would sample another token somewhere
        if with_flag:
            dta_plugin.enable(merge_window="never", prune="never")
        trainer.train()
        dta_plugin.disable()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
