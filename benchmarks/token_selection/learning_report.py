"""Table and plot of learning.py's runs: dicts as its result file holds them."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.common.curves import Runs, by_name, draw_bands, reward_cells, with_deviation
from benchmarks.common.harness import table


def learning_table(runs: Runs) -> str:
    """One line per selection, over its seeds; see learning.py for how to read it."""
    header = (
        "selection",
        "reward, first 10 %",
        "last 10 %",
        "all steps",
        "at equal tokens",
        "kept",
        "tokens run",
        "update s",
        "of all tokens'",
        "saved MB",
        "grad norm",
    )
    found = by_name(runs)
    whole = _over_all(next(iter(found.values())), "seconds")
    tokens = min(sum(run["tree_tokens"]) for run in runs)
    return table(header, [_line(name, runs, whole, tokens) for name, runs in found.items()])


def _line(name: str, runs: Runs, seconds_of_all: float, tokens: float) -> tuple[str, ...]:
    kept = [value for run in runs for value in run["kept_fraction"] if value is not None]
    seconds = _over_all(runs, "seconds")
    return (
        name,
        *reward_cells(runs),
        with_deviation([_reward_at(run, tokens) for run in runs]),
        f"{statistics.fmean(kept):.0%}" if kept else "100%",
        f"{_over_all(runs, 'tree_tokens'):.0f}",
        f"{seconds:.3f}",
        f"{seconds / seconds_of_all:.2f}x",
        f"{_over_all(runs, 'saved_bytes') / 1e6:.1f}",
        f"{_over_all(runs, 'grad_norm'):.2f}",
    )


def _reward_at(run: dict[str, Any], tokens: float) -> float:
    """Mean over the steps of the last tenth of so many tokens."""
    run_by_then = np.cumsum(run["tree_tokens"])
    last = (run_by_then > 0.9 * tokens) & (run_by_then <= tokens)
    return float(np.array(run["reward"])[last].mean())


def draw(runs: Runs, path: Path) -> None:
    """Reward over steps, a mean curve per selection in a band of one standard deviation over seeds; tokens per step."""
    figure, (reward, tokens) = plt.subplots(1, 2, figsize=(8.4, 3.4), width_ratios=[2.0, 1.0], layout="constrained")
    draw_bands(reward, runs, "reward")
    draw_bands(tokens, runs, "tree_tokens")
    seeds = len({run["seed"] for run in runs})
    reward.set(title=f"Reward, mean of {seeds} seeds (over 5 steps)", xlabel="step", ylim=(0, 1.03))
    reward.legend(frameon=False, loc="lower right")
    tokens.set(title="Tokens run per step", xlabel="step", ylim=(0, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _over_all(runs: Runs, key: str) -> float:
    """Mean over steps and seeds."""
    return statistics.fmean(value for run in runs for value in run[key])
