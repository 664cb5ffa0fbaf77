"""What `dta doctor` found, and how it is printed: a line each, in columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

_WIDTH = 100
_NAME, _VALUE = 17, 14  # columns, wider where a section needs it


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ok: False if prefix-tree training would not work because of it."""

    name: str
    value: str
    note: str = ""
    ok: bool = True


def printed(findings: Iterable[Finding]) -> str:
    """A section of the report."""
    found = list(findings)
    name_width = max([_NAME, *(len(finding.name) + 2 for finding in found)])
    value_width = max([_VALUE, *(len(finding.value) + 2 for finding in found if finding.note)])
    return "\n".join(line for finding in found for line in _lines(finding, name_width, value_width))


def _lines(finding: Finding, name_width: int, value_width: int) -> list[str]:
    """The finding in columns, its note wrapped; "!" marks what would not work."""
    start = f"{' ' if finding.ok else '!'} {finding.name:<{name_width}}{finding.value:<{value_width}}"
    notes = textwrap.wrap(finding.note, max(_WIDTH - len(start), 40)) or [""]
    return [(start + notes[0]).rstrip(), *(" " * len(start) + note for note in notes[1:])]
