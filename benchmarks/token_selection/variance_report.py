"""Tables of variance.py's results; see there for how to read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.common.harness import table


def length_table(lines: list[dict[str, Any]], groups: Sequence[int]) -> str:
    kinds = ("row alike", "alike, sum 0", "alike")
    columns = [f"{kind}, {size}" for kind in kinds for size in (groups[:1] if kind == "row alike" else groups)]
    header = ("design", "budget", "run", "weight", "of a 2nd of 2", "unrelated", *columns)
    body = [
        (*_described(line), f"{line['weight_of_second']:.1f}", *(_cell(line, key) for key in ("unrelated", *columns)))
        for line in lines
    ]
    return table(header, body)


def gradient_table(lines: list[dict[str, Any]], groups: Sequence[int]) -> str:
    columns = [f"{sharing}, {size}" for size in groups for sharing in ("apart", "spread")]
    body = [(*_described(line), *(_cell(line, key) for key in columns)) for line in lines]
    return table(("design", "budget", "run", "weight", *columns), body)


def hybrid_table(lines: list[dict[str, Any]]) -> str:
    columns = [f"{kind}{given}" for kind in ("unrelated", "row alike") for given in ("", ", given run")]
    body = [
        (line["way"], f"{line['run']:.2f}", str(line["drawings"]), *(_cell(line, key) for key in columns))
        for line in lines
    ]
    return table(("design", "run", "drawings", *columns), body)


def _described(line: dict[str, Any]) -> tuple[str, str, str, str]:
    run = "" if line["run"] is None else f"{line['run']:.2f}"
    budget, weight = (
        f"{line[key]:.{digits}f}" if key in line else "" for key, digits in (("budget", 2), ("weight", 1))
    )
    return line["way"], budget, run, weight


def _cell(line: dict[str, Any], key: str) -> str:
    return f"{line[key]:.3f}" if key in line else ""
