"""Tables, plot and the project's own targets of the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.harness import table

# Stock TRL's scoring on CPUs takes more per token the larger the batch, which four numbers cannot say; for the choice
# between two ways that differ by more it is near enough.
ALLOWED_ERROR, ALLOWED_RATIO = {"tree": 0.15, "dense": 0.30}, 1.03
_WAYS = {"tree": "#2f5d8c", "dense": "#c0392b"}

Row = dict[str, Any]


def error(row: Row, way: str) -> float:
    """Relative error of a prediction."""
    return row[way]["predicted"] / row[way]["measured"] - 1


def prediction_table(rows: list[Row]) -> str:
    header = ("batch", *(f"{way}, {what}" for way in _WAYS for what in ("measured", "predicted", "error")))
    body = [
        (
            row["name"],
            *(
                cell
                for way in _WAYS
                for cell in (
                    f"{1e3 * row[way]['measured']:.1f} ms",
                    f"{1e3 * row[way]['predicted']:.1f} ms",
                    f"{error(row, way):+.1%}",
                )
            ),
        )
        for row in rows
    ]
    return table(header, body)


def gate_table(rows: list[Row], clock: str) -> str:
    header = ("hidden size", "batch", "tokens flat -> tree", "ran", "stock TRL", "with the flag")
    body = [
        (
            str(row["hidden_size"]),
            row["name"],
            f"{row['flat_tokens']} -> {row['tree_tokens']}",
            row["ran"],
            f"{row['stock_ms']:.1f} ms",
            f"{row['ratio'][clock]:.3f} of it",
        )
        for row in rows
    ]
    return table(header, body)


def checks(predicted: list[Row], gated: list[Row], clock: str) -> list[dict[str, Any]]:
    """What a calibration should give, and the worst that was found."""
    found = [
        {
            "name": f"{way}: largest error of {len(predicted)} predictions",
            "found": max(abs(error(row, way)) for row in predicted),
            "allowed": ALLOWED_ERROR[way],
        }
        for way in _WAYS
    ]
    for size in dict.fromkeys(row["hidden_size"] for row in gated):
        ratios = [row["ratio"][clock] for row in gated if row["hidden_size"] == size]
        name = f"hidden size {size}: most time over stock TRL in {len(ratios)} batches"
        found.append({"name": name, "found": max(ratios), "allowed": ALLOWED_RATIO})
    return found


def draw(rows: list[Row], path: Path) -> None:
    """Predicted against measured seconds of every batch. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(4.2, 4.0))
    for way, colour in _WAYS.items():
        measured, predicted = ([row[way][what] for row in rows] for what in ("measured", "predicted"))
        label = {"tree": "as a tree", "dense": "stock TRL"}[way]
        axis.scatter(measured, predicted, s=14, color=colour, label=label, alpha=0.8)
    low, high = (f(row[way]["measured"] for row in rows for way in _WAYS) for f in (min, max))
    axis.plot([low, high], [low, high], color="black", linewidth=0.6)
    for factor in (1 - ALLOWED_ERROR["tree"], 1 + ALLOWED_ERROR["tree"]):
        axis.plot([low, high], [factor * low, factor * high], color="black", linewidth=0.5, linestyle=":")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("measured, seconds of forward + backward", fontsize=8)
    axis.set_ylabel("predicted", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", dpi=150)
