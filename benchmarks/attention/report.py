"""Tables of the results, figures that others published, and the project's own targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.common.harness import table

# DualKV's milliseconds forward + backward: FlashAttention-2 (None: out of memory), DualKV. Qwen3-8B's heads.
# A100: the paper's table, float16. H100: the README of its code, which does not say how it differs from the paper.
PUBLISHED: dict[str, dict[str, tuple[float | None, float]]] = {
    "4096/2048/28": {"A100": (172.2, 104.2), "H100": (215.3, 133.1)},
    "16384/2048/28": {"A100": (1441.0, 371.7), "H100": (1750.8, 467.7)},
    "32768/2048/16": {"A100": (2883.4, 525.8), "H100": (3503.4, 679.4)},
    "65536/2048/16": {"A100": (None, 1357.8), "H100": (None, 1731.8)},
}
PARTS = ("forward", "backward", "total")
RATES = {"forward": 400, "backward": 300}  # TFLOP/s on visible pairs that the target is to reach


def summary(row: dict[str, Any]) -> str:
    """One line while the benchmark runs."""
    times = (f"{name} {_number(_total(row, name), '.2f', 'none')}" for name in row["contenders"])
    return f"{row['name']}, {row['rounds']} rounds, forward + backward ms: {', '.join(times)}"


def contender_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per workload and contender."""
    header = (
        "workload",
        "tokens flat -> tree",
        "contender",
        *(f"{part} ms" for part in PARTS),
        *(f"{part} TFLOP/s" for part in PARTS),
        "of matmul",
        "memory GB",
        "tree's speed-up",
        "ceiling",
        "note",
    )
    return table(header, [_line(row, name) for row in rows for name in row["contenders"]])


def published_table(rows: Sequence[dict[str, Any]]) -> str | None:
    """DualKV's figures beside ours, where a workload has its shape."""
    lines = []
    for row in rows:
        here = [_total(row, name) for name in ("dense flash", "tree")]
        for machine, (flash, dualkv) in PUBLISHED.get(row["name"], {}).items():
            shown = [_number(value, ".1f", "OOM") for value in (flash, dualkv)]
            lines.append(
                (row["name"], machine, *shown, _ratio(flash, dualkv), *(_number(x) for x in here), _ratio(*here))
            )
    header = (
        "workload",
        "their GPU",
        "FA2 ms",
        "DualKV ms",
        "DualKV's speed-up",
        "dense flash ms here",
        "tree ms here",
        "tree's speed-up here",
    )
    return table(header, lines) if lines else None


def checks(rows: Sequence[dict[str, Any]], target: str, unshared: Sequence[str]) -> list[dict[str, Any]]:
    """The project's targets for this op: the claim, the measured value and whether it holds (None: not measured)."""
    by_name = {row["name"]: row for row in rows}
    found = []

    def check(claim: str, value: float | None, holds: Callable[[float], bool], form: str) -> None:
        met = None if value is None else holds(value)
        found.append({"claim": claim, "value": value, "met": met, "shown": _number(value, form, "not measured")})

    def speed_up(workload: str, over: str) -> float | None:
        return by_name[workload]["speed_up_over"].get(over) if workload in by_name else None

    value = speed_up(target, "dense flash")
    limit = f" (ceiling {by_name[target]['ceiling']:.2f}x)" if target in by_name else ""
    check(f"{target}: at least 5x faster than dense flash{limit}", value, lambda x: x >= 5, ".2f")
    for part, least in RATES.items():
        rate = by_name[target]["contenders"]["tree"].get("tflops", {}).get(part) if target in by_name else None
        check(f"{target}: {part} at least {least} TFLOP/s, on an H200", rate, lambda x, y=least: x >= y, ".0f")
    share = None
    if value is not None:
        rates = {name: contender.get("tflops") for name, contender in by_name[target]["contenders"].items()}
        share = rates["tree"]["total"] / rates["dense flash"]["total"]
    check(f"{target}: at least 60% of dense flash's TFLOP/s on visible pairs", share, lambda x: x >= 0.6, ".0%")
    for name in unshared:
        value = speed_up(name, "varlen flash")
        cost = None if value is None else 1 / value
        check(f"{name}: at most 1.15x varlen flash's time", cost, lambda x: x <= 1.15, ".2f")
    return found


def _line(row: dict[str, Any], name: str) -> tuple[str, ...]:
    contender = row["contenders"][name]
    start = (row["name"], f"{row['flat_tokens']} -> {row['tree_tokens']}", name)
    if "unavailable" in contender:
        return (*start, *["-"] * (2 * len(PARTS) + 4), contender["unavailable"])
    memory = contender["peak_bytes"]
    faster = row["speed_up_over"].get(name)
    return (
        *start,
        *(f"{contender['milliseconds'][part]:.2f}" for part in PARTS),
        *(f"{contender['tflops'][part]:.1f}" for part in PARTS),
        f"{contender['share_of_matmul']:.0%}",
        "-" if memory is None else f"{memory / 1e9:.2f}",
        "-" if faster is None else f"{faster:.2f}x",
        f"{row['ceiling']:.2f}x" if name.endswith("flash") else "-",
        contender["note"],
    )


def _total(row: dict[str, Any], name: str) -> float | None:
    return row["contenders"][name].get("milliseconds", {}).get("total")


def _number(value: float | None, form: str = ".2f", missing: str = "-") -> str:
    return missing if value is None else format(value, form)


def _ratio(slow: float | None, fast: float | None) -> str:
    return f"{slow / fast:.2f}x" if slow and fast else "-"
