"""Table and plot of the results, and the project's own targets for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.harness import table

BASELINES = ("contiguous", "longest first", "random")
CONTENDERS = ("ours", "equal counts", *BASELINES)
COLOURS = dict(zip(CONTENDERS, ("#2f5d8c", "#6fa3d8", "#c0392b", "#8a8a8a", "#c9c9c9"), strict=True))
MOST_OVER_BOUND, GROUPS_PER_BIN = 1.05, 4
MOST_SECONDS = 2.0
_ROUNDING = 1e-9

Row = dict[str, Any]


def result_table(rows: list[Row]) -> str:
    """One line per batch and number of bins; see __main__.py for how to read it."""
    header = ("batch", "groups", "sequences", "tokens flat -> tree", "bins", *CONTENDERS)
    body = [
        (
            row["name"],
            str(row["groups"]),
            str(row["sequences"]),
            f"{row['flat_tokens']} -> {row['tree_tokens']}",
            str(row["bins"]),
            *(_cell(row["contenders"].get(name)) for name in CONTENDERS),
        )
        for row in rows
    ]
    return table(header, body)


def checks(rows: list[Row], large: dict[str, float]) -> list[dict[str, Any]]:
    """What balancing should give: the claim, the worst value, whether it holds, and every exception."""
    found = []
    for name in ("ours", "equal counts"):
        claim = f"{name}: at most {MOST_OVER_BOUND}x the bound with {GROUPS_PER_BIN} or more groups per bin"
        many = [row for row in rows if row["groups"] >= GROUPS_PER_BIN * row["bins"] and name in row["contenders"]]
        values = {_where(row): row["contenders"][name]["over_bound"] for row in many}
        found.append(_check(claim, values, lambda value: value <= MOST_OVER_BOUND))
    found += [_below(rows, "ours", baseline) for baseline in BASELINES]
    found.append(_below([row for row in rows if "equal counts" in row["contenders"]], "equal counts", "random"))
    claim = f"{large['sequences']} sequences of {large['tokens']} tokens in {large['bins']} bins: CPU seconds at most"
    found.append(_check(f"{claim} {MOST_SECONDS}", {"seconds": large["cpu"]}, lambda value: value <= MOST_SECONDS))
    return found


def shown(check: dict[str, Any]) -> str:
    """One line, and one more for every exception."""
    if check["worst"] is None:
        return f"{check['claim']}: no such row"
    exceptions = check["exceptions"]
    verdict = f"NOT MET in {len(exceptions)} of {check['rows']} rows" if exceptions else "met"
    return "\n".join([f"{check['claim']}: worst {check['worst']:.4f}, {verdict}", *(f"    {e}" for e in exceptions)])


def draw(rows: list[Row], path: Path) -> None:
    """One panel per batch: the costliest bin over the lower bound against the number of bins. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["name"] for row in rows))
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.1 * columns, 2.6 * lines), squeeze=False, sharey=True)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        for contender in reversed(CONTENDERS):  # ours above the others
            points = [(r["bins"], r["contenders"].get(contender)) for r in rows if r["name"] == name]
            line = [(bins, result["over_bound"]) for bins, result in points if result]
            if line:
                axis.plot(*zip(*line, strict=True), marker="o", markersize=3, color=COLOURS[contender], label=contender)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    axes[0][0].legend(handles[::-1], labels[::-1], frameon=False, fontsize=7)
    figure.supxlabel("bins", fontsize=8)
    figure.supylabel("costliest bin / lower bound", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", dpi=150)
    plt.close(figure)


def _cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "-"
    return f"{result['over_bound']:.3f}, {result['repeated']:.1%}, {result['seconds']['cpu']:.2f} s"


def _below(rows: list[Row], name: str, other: str) -> dict[str, Any]:
    """Whether `name`'s costliest bin costs less than `other`'s, in rows in which not both cost the least possible."""
    values, ties = {}, 0
    for row in rows:
        ours, theirs = (row["contenders"][key]["max_load"] for key in (name, other))
        if max(ours, theirs) <= row["lower_bound"] * (1 + _ROUNDING):
            ties += 1
        else:
            values[_where(row)] = ours / theirs
    claim = f"{name}: costliest bin below {other}'s, but for {ties} rows with both at the lower bound"
    return _check(claim, values, lambda value: value < 1 - _ROUNDING)


def _check(claim: str, values: dict[str, float], holds: Callable[[float], bool]) -> dict[str, Any]:
    exceptions = [f"{where}: {value:.4f}" for where, value in values.items() if not holds(value)]
    return {
        "claim": claim,
        "rows": len(values),
        "worst": max(values.values(), default=None),
        "met": not exceptions if values else None,
        "exceptions": exceptions,
    }


def _where(row: Row) -> str:
    return f"{row['name']} in {row['bins']} bins"
