"""Learning curves of several ways to train, each with several seeds: a mean and a band per way, and table cells.

A run is a dict with `name`, `seed` and lists of one number per step, `reward` among them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

COLOURS = ("#5b6b7f", "#c0562b", "#2f5d8c", "#7a9a3a")
SMOOTHED = 5

Runs = list[dict[str, Any]]


def arguments(
    description: str | None, steps: int, folder: Path, ways: Sequence[str] | None = None
) -> argparse.Namespace:
    """The command line of a learning benchmark. steps: of every training. folder: where its model and data are.

    ways: names that `--only` chooses from; None where there is no such choice.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="2 steps, 1 seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time")
    parser.add_argument("--folder", type=Path, default=folder, help="what the recipe's build script wrote")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--plot", type=Path, help="PNG file for the curves")
    if ways is not None:
        parser.add_argument("--only", nargs="+", choices=ways, default=list(ways), help="some of what is trained")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.steps = args.seeds[:1], 2
    return args


def by_name(runs: Runs) -> dict[str, Runs]:
    """The runs of each way, in the order in which ways come first."""
    return {name: [run for run in runs if run["name"] == name] for name in dict.fromkeys(run["name"] for run in runs)}


def reward_cells(runs: Runs) -> tuple[str, str, str]:
    """Mean reward of the first tenth of the steps, of the last, and of all, with the standard deviation over seeds."""
    tenth = max(1, len(runs[0]["reward"]) // 10)
    parts = (slice(tenth), slice(-tenth, None), slice(None))
    first, last, whole = ([statistics.fmean(run["reward"][part]) for run in runs] for part in parts)
    return with_deviation(first), with_deviation(last), with_deviation(whole)


def with_deviation(values: Sequence[float]) -> str:
    deviation = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def draw_bands(axis: plt.Axes, runs: Runs, key: str) -> None:
    """Per way the smoothed mean over seeds, in a band of one standard deviation."""
    for (name, found), colour in zip(by_name(runs).items(), COLOURS, strict=False):
        curves = [smoothed(run[key]) for run in found]
        mean, deviation = np.mean(curves, axis=0), np.std(curves, axis=0, ddof=min(1, len(curves) - 1))
        steps = np.arange(1, len(mean) + 1)
        axis.plot(steps, mean, label=name, color=colour)
        axis.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0)
    axis.spines[["top", "right"]].set_visible(False)


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Mean of each value and up to SMOOTHED - 1 before it."""
    return np.array([np.mean(values[max(0, end - SMOOTHED) : end]) for end in range(1, len(values) + 1)])
