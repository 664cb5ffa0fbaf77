"""Lines and the table of the results."""

from __future__ import annotations

from typing import Any

from benchmarks.common.harness import table

NAMES = {
    "trl": "TRL",
    "dense": "lean dense",
    "prefix_grouper": "PrefixGrouper",
    "flex": "FlexAttention",
    "nodes": "node by node",
    "tree_recurrence": "tree-recurrence",
    "tree": "ours",
}


def summary(row: dict[str, Any]) -> str:
    """One line while the benchmark runs."""
    times = ", ".join(f"{name} {value:.0f} ms" for name, value in row["milliseconds"].items())
    missing = "".join(f"; {name} {reason}" for name, reason in row["unavailable"].items())
    note = f" ({row['note']})" if row["note"] else ""
    return f"{row['name']}{note}: {times}{missing}"


def update_table(rows: list[dict[str, Any]]) -> str:
    """One line per row, with a column for every contender that ran in any of them."""
    names = [name for name in NAMES if any(name in row["milliseconds"] for row in rows)]
    others = [name for name in names if name != "tree"]
    pairs = (
        [("prefix_grouper_over_trl", "PrefixGrouper vs TRL")] if "prefix_grouper" in names and "trl" in names else []
    )
    memory = any(row["peak_bytes"] for row in rows)

    def milliseconds(row: dict[str, Any], name: str) -> str:
        return f"{row['milliseconds'][name]:.0f}" if name in row["milliseconds"] else "-"

    def times(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}x"

    def share_of_ceiling(row: dict[str, Any]) -> str:
        faster = row["speed_up_over"].get("dense")
        return "-" if faster is None else f"{faster / row['ceiling']:.0%}"

    def gigabytes(row: dict[str, Any], name: str) -> str:
        return f"{row['peak_bytes'][name] / 1e9:.1f}" if name in row["peak_bytes"] else "-"

    header = [
        "row",
        "tokens flat -> tree",
        "ceiling",
        *(f"{NAMES[name]} ms" for name in names),
        *(f"ours vs {NAMES[name]}" for name in others),
        *(["% of ceiling"] if "dense" in names else []),
        *(title for _, title in pairs),
        *(f"{NAMES[name]} GB" for name in names if memory),
        "max error",
    ]
    body = [
        [
            row["name"],
            f"{row['flat_tokens']} -> {row['tree_tokens']}",
            times(row["ceiling"]),
            *(milliseconds(row, name) for name in names),
            *(times(row["speed_up_over"].get(name)) for name in others),
            *([share_of_ceiling(row)] if "dense" in names else []),
            *(times(row[key]) for key, _ in pairs),
            *(gigabytes(row, name) for name in names if memory),
            f"{max(row['error'].values(), default=0.0):.0e}",
        ]
        for row in rows
    ]
    return table(header, body)


def last_line(rows: list[dict[str, Any]]) -> str:
    """How many times faster than the first contender the tree was."""
    faster = [(row["name"], *next(iter(row["speed_up_over"].items()), ("", None))) for row in rows]
    return "; ".join(f"{name}: {ratio:.2f}x as fast as {NAMES[other]}" for name, other, ratio in faster if ratio)
