"""Read what a quickstart run logged: print a short table, draw the reward curve.

    python recipes/quickstart/report.py runs/quickstart                # the full fine-tune
    python recipes/quickstart/report.py runs/quickstart --run lora     # the LoRA variant
    python recipes/quickstart/report.py runs/quickstart --run verl     # the same task with verl

Promises: it reads only `<folder>/<run>/checkpoint-*/trainer_state.json` (TRL's own log, the newest
checkpoint) or `<folder>/<run>/metrics.jsonl` (verl's own log), and writes only `<folder>/reward.png`
(`reward_<run>.png` for another run than `grpo`); it needs neither torch nor TRL nor verl. `dta/*` metrics
are shown when the log holds them, and the speed-up where speed.py has measured it
(`<folder>/<run>/speed.json`), so it works alike for stock runs and for the plugin.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

History = list[dict[str, Any]]  # one entry per log line, as in trainer_state.json
SHARING = "dta/compression_ratio"
FROM_VERL = {  # verl's names of what is shown
    "critic/score/mean": "reward",
    "response_length/mean": "completions/mean_length",
    "timing_s/step": "step_time",
}


def read_history(run: Path) -> History:
    """The training log lines (those with a reward) of a verl run, or of the newest checkpoint of a TRL run."""
    if (verl := run / "metrics.jsonl").exists():
        return [from_verl(json.loads(line)) for line in verl.read_text().splitlines()]
    states = sorted(run.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if not states:
        raise SystemExit(
            f"neither checkpoint-*/trainer_state.json nor metrics.jsonl in {run}: did the training finish?"
        )
    history = [line for line in json.loads(states[-1].read_text())["log_history"] if "reward" in line]
    if not history:
        raise SystemExit(f"no reward in {states[-1]}")
    return history


def from_verl(line: dict[str, Any]) -> dict[str, Any]:
    """A line of verl's log under TRL's names; the policy update's `actor/dta/*` become `dta/*`."""
    renamed = {FROM_VERL.get(name, name.removeprefix("actor/")): value for name, value in line["data"].items()}
    return {"step": line["step"], **renamed}


def series(history: History, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the log lines that hold `key`."""
    lines = [line for line in history if key in line]
    return [line["step"] for line in lines], [float(line[key]) for line in lines]


def ends(values: list[float]) -> tuple[float, float]:
    """The means of the first and of the last tenth."""
    tenth = max(1, round(len(values) / 10))
    return fmean(values[:tenth]), fmean(values[-tenth:])


def summary(history: History) -> list[tuple[str, str]]:
    """The rows of the table, as (name, value)."""
    _, rewards = series(history, "reward")
    _, lengths = series(history, "completions/mean_length")
    _, seconds = series(history, "step_time")
    rows = [
        ("steps", f"{history[-1]['step']}"),
        ("reward, first 10% -> last 10%", "{:.2f} -> {:.2f}".format(*ends(rewards))),
        ("completion tokens, likewise", "{:.1f} -> {:.1f}".format(*ends(lengths))),
        ("seconds per step (median)", f"{median(seconds):.2f}"),
    ]
    for key in sorted({key for line in history for key in line if key.startswith("dta/")}):
        rows.append((f"{key} (mean)", f"{fmean(series(history, key)[1]):.2f}"))
    return rows


def read_speed(run: Path) -> dict[str, float] | None:
    """What speed.py measured for this run: seconds of one update, stock and tree, and their ratio."""
    path = run / "speed.json"
    return json.loads(path.read_text()) if path.exists() else None


def plot(history: History, speed: dict[str, float] | None, path: Path) -> None:
    """Draw the reward, and one small panel each for the sharing and the update's time, where known."""
    steps, ratios = series(history, SHARING)
    panels = 1 + bool(ratios) + bool(speed)
    widths = [2.0] + [1.0] * (panels - 1)
    figure, axes = plt.subplots(
        1, panels, figsize=(2.6 * sum(widths), 3.4), width_ratios=widths, squeeze=False, layout="constrained"
    )
    reward, *small = axes[0]

    reward.plot(*series(history, "reward"), marker=".", color="tab:blue")
    reward.set(title="Reward: share of right answers", xlabel="step", ylim=(0, 1.03))
    if ratios:
        axis = small.pop(0)
        axis.plot(steps, ratios, color="tab:green")
        axis.set(title="Sharing", xlabel="step", ylabel="dense tokens / tree tokens", ylim=(0, None))
    if speed:
        axis = small.pop(0)
        seconds = [speed["stock_seconds"], speed["tree_seconds"]]
        bars = axis.bar(["stock TRL", "tree"], seconds, color=["tab:gray", "tab:orange"])
        axis.bar_label(bars, fmt="%.2f s")
        axis.set(title=f"Policy update: {speed['speedup']:.1f}x faster", ylabel="seconds, same batches")
        axis.margins(y=0.12)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what build.py was given as --output")
    parser.add_argument("--run", default="grpo", help="the run's folder in it (default: grpo)")
    args = parser.parse_args()

    history = read_history(args.folder / args.run)
    speed = read_speed(args.folder / args.run)
    rows = summary(history)
    if speed:
        seconds = "{stock_seconds:.2f} s -> {tree_seconds:.2f} s".format(**speed)
        rows.append(("policy update, stock TRL -> tree", seconds))
        rows.append(("measured speed-up of the update", f"{speed['speedup']:.2f}x on the same batches"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    path = args.folder / ("reward.png" if args.run == "grpo" else f"reward_{args.run}.png")
    plot(history, speed, path)
    print(f"\nThe reward curve is in {path}.")


if __name__ == "__main__":
    main()
