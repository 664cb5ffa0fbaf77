"""Tables of the results of updates.py; see there for how to read them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.common.harness import table


def summary(row: dict[str, Any]) -> str:
    """One line while the benchmark runs."""
    note = f" ({row['note']})" if row["note"] else ""
    times = ", ".join(f"{name} {statistics.median(ms):.0f} ms" for name, ms in row["milliseconds"].items())
    return f"{row['name']}{note}: {times}"


def update_table(rows: list[dict[str, Any]]) -> str:
    """Time and memory of an update, one line per row and contender."""
    header = (
        "row",
        "contender",
        "tokens",
        "run",
        "scored",
        "kept",
        "ms",
        "vs dense",
        "vs tree",
        "saved MB",
        "device MB",
    )
    body = [_line(row, name) for row in rows for name in row["updates"]]
    columns = slice(None if any(line[-1] for line in body) else -1)
    return table(header[columns], [line[columns] for line in body])


def _line(row: dict[str, Any], name: str) -> tuple[str, ...]:
    updates = row["updates"][name]
    sizes = [update["size"] for update in updates]
    runs_tree = sizes[0]["tree_tokens"] is not None
    devices = [update["device_bytes"] for update in updates]
    return (
        row["name"],
        name,
        _range([size["flat_tokens"] for size in sizes], "{:.0f}".format),
        _range([size["tree_tokens"] if runs_tree else size["flat_tokens"] for size in sizes], "{:.0f}".format),
        _range([size["scored_tokens"] for size in sizes], "{:.0f}".format),
        _range([size["kept_fraction"] for size in sizes], "{:.0%}".format),
        _range(row["milliseconds"][name], "{:.0f}".format),
        f"{row['faster_than']['dense'][name]:.2f}x",
        f"{row['faster_than']['tree'][name]:.2f}x",
        _range([update["saved_bytes"] / 1e6 for update in updates], "{:.1f}".format),
        "" if devices[0] is None else _range([size / 1e6 for size in devices], "{:.1f}".format),
    )


def gradient_table(rows: list[dict[str, Any]]) -> str:
    """How the drawings' gradients and their mean relate to all tokens' gradient."""
    header = ("row", "selection", "drawings", "error of one", "error of the mean", "expected", "budget 1")
    body = [
        (
            row["name"],
            name,
            f"{found['drawings']:.0f}",
            f"{found['one']:.2f}",
            f"{found['mean']:.3f}",
            f"{found['expected']:.3f}",
            f"{row['error'][f'{name}, budget 1']:.0e}",
        )
        for row in rows
        for name, found in row["gradient"].items()
    ]
    return table(header, body)


def _range(values: Sequence[float], text: Callable[[float], str]) -> str:
    """The mean, and the range where values differ."""
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{text(statistics.fmean(values))} ({low}-{high})"
