"""Table and plot of selection_learning.py's runs: dicts as its result file holds them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from harness import table

COLOURS = ("#5b6b7f", "#c0562b", "#2f5d8c")
SMOOTHED = 5

Runs = list[dict[str, Any]]


def learning_table(runs: Runs) -> str:
    """One line per selection, over its seeds; see selection_learning.py for how to read it."""
    header = (
        "selection",
        "reward, first 10 %",
        "last 10 %",
        "all steps",
        "kept",
        "tokens run",
        "update s",
        "of all tokens'",
        "saved MB",
        "grad norm",
    )
    by_name = _by_name(runs)
    whole = _over_all(next(iter(by_name.values())), "seconds")
    return table(header, [_line(name, found, whole) for name, found in by_name.items()])


def _line(name: str, runs: Runs, seconds_of_all: float) -> tuple[str, ...]:
    tenth = max(1, len(runs[0]["reward"]) // 10)
    kept = [value for run in runs for value in run["kept_fraction"] if value is not None]
    seconds = _over_all(runs, "seconds")
    return (
        name,
        _with_deviation([statistics.fmean(run["reward"][:tenth]) for run in runs]),
        _with_deviation([statistics.fmean(run["reward"][-tenth:]) for run in runs]),
        _with_deviation([statistics.fmean(run["reward"]) for run in runs]),
        f"{statistics.fmean(kept):.0%}" if kept else "100%",
        f"{_over_all(runs, 'tree_tokens'):.0f}",
        f"{seconds:.3f}",
        f"{seconds / seconds_of_all:.2f}x",
        f"{_over_all(runs, 'saved_bytes') / 1e6:.1f}",
        f"{_over_all(runs, 'grad_norm'):.2f}",
    )


def draw(runs: Runs, path: Path) -> None:
    """Reward over steps, a mean curve per selection in a band of one standard deviation over seeds; tokens per step."""
    figure, (reward, tokens) = plt.subplots(1, 2, figsize=(8.4, 3.4), width_ratios=[2.0, 1.0], layout="constrained")
    for (name, found), colour in zip(_by_name(runs).items(), COLOURS, strict=True):
        _band(reward, [smoothed(run["reward"]) for run in found], name, colour)
        _band(tokens, [smoothed(run["tree_tokens"]) for run in found], name, colour)
    seeds = len({run["seed"] for run in runs})
    reward.set(title=f"Reward, mean of {seeds} seeds (over {SMOOTHED} steps)", xlabel="step", ylim=(0, 1.03))
    reward.legend(frameon=False, loc="lower right")
    tokens.set(title="Tokens run per step", xlabel="step", ylim=(0, None))
    for axis in (reward, tokens):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Mean of each value and up to SMOOTHED - 1 before it."""
    return np.array([np.mean(values[max(0, end - SMOOTHED) : end]) for end in range(1, len(values) + 1)])


def _band(axis: plt.Axes, curves: list[np.ndarray], name: str, colour: str) -> None:
    mean, deviation = np.mean(curves, axis=0), np.std(curves, axis=0, ddof=min(1, len(curves) - 1))
    steps = np.arange(1, len(mean) + 1)
    axis.plot(steps, mean, label=name, color=colour)
    axis.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0)


def _by_name(runs: Runs) -> dict[str, Runs]:
    return {name: [run for run in runs if run["name"] == name] for name in dict.fromkeys(run["name"] for run in runs)}


def _over_all(runs: Runs, key: str) -> float:
    """Mean over steps and seeds."""
    return statistics.fmean(value for run in runs for value in run[key])


def _with_deviation(values: list[float]) -> str:
    deviation = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"
