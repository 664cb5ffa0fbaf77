"""Tables of the results, and the project's own targets for them."""

from __future__ import annotations

from typing import Any

from benchmarks.common.harness import table

MOST_OVER_PACKED, LEAST_OVER_STREAMED = 1.35, 1.3


def checks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What streaming should give on these trees, and whether it does."""
    found = []
    for row in rows:
        value = row["over_packed"]["streamed 1/2"]
        claim = f"{row['name']}: streamed at half the tree takes at most {MOST_OVER_PACKED}x packed's time"
        found.append({"claim": claim, "value": value, "met": value <= MOST_OVER_PACKED})
        for budget, value in row["one_path_over_streamed"].items():
            claim = f"{row['name']}: one path at a time at {budget} takes at least {LEAST_OVER_STREAMED}x streamed's"
            found.append({"claim": claim, "value": value, "met": value >= LEAST_OVER_STREAMED})
    return found


def summary(row: dict[str, Any]) -> str:
    """One line while the benchmark runs."""
    note = f" ({row['note']})" if row["note"] else ""
    return f"{row['name']}{note}: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in row["milliseconds"].items())


def contender_table(rows: list[dict[str, Any]]) -> str:
    """One line per tree and contender; see __main__.py for how to read it."""
    header = (
        "tree",
        "tokens flat -> tree",
        "contender",
        "ms",
        "vs packed",
        "one path / streamed",
        "chunks",
        "tokens per call",
        "again",
        "saved MB",
        "arena MB",
        "error",
        "device MB",
    )
    body = [_line(row, name) for row in rows for name in row["examined"]]
    columns = slice(None if any(line[-1] for line in body) else -1)
    return table(header[columns], [line[columns] for line in body])


def _line(row: dict[str, Any], name: str) -> tuple[str, ...]:
    examined = row["examined"][name]
    budget = name.removeprefix("streamed ")
    ratio = row["one_path_over_streamed"].get(budget)
    return (
        row["name"],
        f"{row['flat_tokens']} -> {row['tree_tokens']}",
        name,
        f"{row['milliseconds'][name]:.0f}",
        f"{row['over_packed'][name]:.2f}x",
        "-" if ratio is None else f"{ratio:.2f}x",
        str(examined["chunks"]),
        f"{examined['tokens'] / examined['calls']:.0f}",
        f"{examined['tokens'] / row['tree_tokens'] - 1:.0%}",
        _megabytes(examined["saved_bytes"]),
        _megabytes(examined["arena_bytes"]),
        f"{examined['error']:.0e}",
        "" if examined["device_bytes"] is None else _megabytes(examined["device_bytes"]),
    )


def growth_table(rows: list[dict[str, Any]]) -> str:
    """What each contender keeps for the backward pass, one line per tree."""
    names = list(rows[0]["examined"])
    header = ("tree tokens", "longest path", *(f"{name} MB" for name in names))
    body = [
        (
            str(row["tree_tokens"]),
            str(row["longest_path"]),
            *(_megabytes(row["examined"][name]["saved_bytes"]) for name in names),
        )
        for row in rows
    ]
    return table(header, body)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"
