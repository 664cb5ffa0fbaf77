"""The table of options in docs/options.md, from the fields of TreeConfig.

`python -m tests.docs.option_table` writes the page anew; `test_pages.py` fails where it is not the table of today.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from dta_plugin.config import TreeConfig
from dta_plugin.option_places import Scope

PAGE = Path(__file__).resolve().parents[2] / "docs" / "options.md"
_HEAD = "| option | default | for | |\n|---|---|---|---|\n"
# Who has what an option needs.
_FOR = {
    Scope.CALL: "all",
    Scope.BATCH: "all but model calls",
    Scope.TRAINING: "all trainers",
    Scope.LOSS: "GRPO, RLOO; verl",
    Scope.WINDOW: "GRPO, RLOO",
}


def option_table() -> str:
    """A row per field: name, default, who it is for, and the help that the command line prints."""
    rows = [
        f"| `{field.name}` | `{field.default}` | {_FOR[field.metadata['applies_to']]} | {field.metadata['help']} |"
        for field in fields(TreeConfig)
    ]
    return _HEAD + "\n".join(rows)


def page_with(table: str, page: str) -> str:
    """`page` with its table of options replaced. Raises ValueError if it has none."""
    start = page.index(_HEAD)
    end = page.find("\n\n", start)
    return page[:start] + table + (page[end:] if end >= 0 else "\n")


if __name__ == "__main__":
    PAGE.write_text(page_with(option_table(), PAGE.read_text("utf-8")), "utf-8")
