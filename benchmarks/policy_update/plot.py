"""Bars of a policy-update result: speed-up over stock TRL and over the lean dense path, and the FLOP ceiling.

    python -m benchmarks.policy_update.plot benchmarks/results/policy_update_cpu.json --output docs/policy_update.svg

Needs matplotlib (the `plot` extra). The suffix of the output picks the format.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SERIES = (("trl", "stock TRL", "#b8c4d6"), ("dense", "lean dense path", "#2f5d8c"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON written by the benchmark")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    figure = draw(json.loads(args.result.read_text()))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, bbox_inches="tight", dpi=150, metadata={"Date": None} if _is_svg(args.output) else None)


def draw(result: dict[str, Any]) -> plt.Figure:
    rows = result["rows"]
    figure, axis = plt.subplots(figsize=(1.1 * len(rows) + 1.5, 3.4))
    width = 0.8 / len(SERIES)
    for index, (key, label, colour) in enumerate(SERIES):
        places = [place + (index - (len(SERIES) - 1) / 2) * width for place in range(len(rows))]
        bars = axis.bar(places, [row["speed_up_over"][key] for row in rows], width, label=f"over {label}", color=colour)
        axis.bar_label(bars, fmt="%.2f", fontsize=7)
    for place, row in enumerate(rows):
        ceiling = axis.hlines(row["ceiling"], place - 0.42, place + 0.42, colors="#c0392b", linewidth=1.5)
    ceiling.set_label("FLOP ceiling")
    axis.axhline(1.0, color="black", linewidth=0.6, linestyle=":")
    axis.set_xticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axis.set_xlabel("prompt / completion / group", fontsize=8)
    axis.set_ylabel("times faster, forward + backward", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return figure


def _is_svg(path: Path) -> bool:
    return path.suffix == ".svg"


if __name__ == "__main__":
    main()
