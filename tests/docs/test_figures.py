"""The speed-ups that README and docs quote are those of the result files: whoever measures anew changes both."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.docs.commands import ROOT

UPDATE = {
    "recorded agent, 53 turns of one task": "rollouts",
    "8 short answers to a long prompt": "1024/64/8",
    "nothing shared at all": "no sharing",
    "real agent rollouts, one task, 53 turns": "rollouts",
    "nothing shared": "no sharing",
}


def rows(name: str) -> dict[str, dict[str, Any]]:
    content = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return {row["name"]: row for row in content["rows"]}


def table_cells(page: str, begins: str) -> list[list[str]]:
    """The cells of the page's table rows whose first cell begins so, without bold print."""
    lines = (ROOT / page).read_text("utf-8").replace("**", "").splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith(f"| {begins}")]
    assert found, f"{page} has no row that begins with {begins!r}"
    return found


def close(quoted: str, measured: float) -> bool:
    """Whether `measured` is rounded to what is quoted, to its own number of digits."""
    digits = len(quoted.rstrip("x").partition(".")[2])
    return quoted == f"{measured:.{digits}f}x"


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
@pytest.mark.parametrize("label", list(UPDATE)[:3])
def test_first_screens(page: str, label: str) -> None:
    ((_, tokens, stock, lean, *_),) = table_cells(page, label)
    row = rows("policy_update_cpu")[UPDATE[label]]
    assert tokens == f"{row['flat_tokens']:,} to {row['tree_tokens']:,}"
    assert close(stock, row["speed_up_over"]["trl"]) and close(lean, row["speed_up_over"]["dense"])


def test_policy_update() -> None:
    for name, row in rows("policy_update_cpu").items():
        label = next((label for label, of in list(UPDATE.items())[3:] if of == name), name.replace("/", " / "))
        cells = table_cells("docs/benchmarks.md", f"{label} |")[0]
        _, tokens, ceiling, lean, stock, peer = cells
        assert tokens == f"{row['flat_tokens']:,} to {row['tree_tokens']:,}"
        assert close(ceiling, row["ceiling"])
        for quoted, contender in ((lean, "dense"), (stock, "trl"), (peer, "prefix_grouper")):
            assert close(quoted, row["speed_up_over"][contender]) if quoted else contender not in row["speed_up_over"]


def test_whole_steps() -> None:
    measured = rows("whole_step_cpu")
    labels = {"1024/64/8 x 4": "the same, four updates"}
    for name, row in measured.items():
        (cells,) = table_cells("docs/benchmarks.md", labels.get(name, f"{name.replace('/', ' / ')} | "))[-1:]
        shares = ", ".join(
            f"{row['shares'][part]:.0%}".replace("%", " %") for part in ("sampling", "scoring", "update")
        )
        assert cells[1] == shares
        assert close(cells[2], row["speed_up"]["update"]) and close(cells[3], row["speed_up"]["step"])
    slowest, fastest = (of(row["speed_up"]["step"] for row in measured.values()) for of in (min, max))
    assert f"were {slowest:.1f}x to {fastest:.1f}x as fast" in " ".join((ROOT / "README.md").read_text("utf-8").split())
