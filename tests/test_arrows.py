"""Imports run one way: from translation to what is translated, from calling models to knowing them, down to trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dta_plugin"
# Each room may import those that stand after it, and what all may: modules of the package itself in `COMMON`.
ROOMS = (
    "cli",
    "adapters",
    "training",
    "sharing",
    "diffusion",
    "balance",
    "execution",
    "models",
    "attention",
    "tree",
    "token_selection",
)
COMMON = {"errors", "upload", "config"}
# What users call, and what adapters and the command line build on.
TOP = {"api", "verify", "calibrate", "__init__"}
# Switching on is where imports run up, when it is called.
UP = {"activation", "run", "run_options", "run_yaml"}


def imports(file: Path) -> Iterator[tuple[str, ast.AST]]:
    """(room or module of the package, node) of every import of the package in a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name == "dta_plugin" or name.startswith("dta_plugin."):
                yield [*name.split("."), "__init__"][1], node


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def runs_up(room: str, other: str) -> bool:
    if room == other or other in COMMON or room in UP:
        return False
    if room in TOP:
        return other in {"cli", "adapters", *UP} and room != "__init__"
    if room in COMMON:
        return (room, other) != ("config", "token_selection")
    if other in TOP:
        return room not in ("cli", "adapters")
    return other in UP or ROOMS.index(other) < ROOMS.index(room)


def test_imports_run_one_way() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    found = [
        f"{file.relative_to(PACKAGE)}:{node.lineno} imports {other}"
        for file in files
        for other, node in imports(file)
        if runs_up(room_of(file), other)
    ]
    assert len(files) > 150 and not found, "\n".join(found)


@pytest.mark.parametrize("room", ["tree", "token_selection"])
def test_rooms_that_know_of_no_framework(room: str) -> None:
    for file in (PACKAGE / room).rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert not any(f"import {name}" in text or f"from {name}" in text for name in ("transformers", "trl", "verl"))


@pytest.mark.parametrize(
    ("room", "other"), [("tree", "attention"), ("models", "execution"), ("execution", "adapters"), ("config", "tree")]
)
def test_negative_control(room: str, other: str) -> None:
    assert (runs_up(room, other) and not runs_up(other, room)) or (room, other) == ("config", "tree")
