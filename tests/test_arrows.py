"""Imports run one way: from translation to what is translated, from calling models to knowing them, down to trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.arrows import PACKAGE, UP, circles, imports, report, runs_up, unknown, up


def test_imports_run_one_way() -> None:
    found = imports()
    assert len(found) > 500 and not unknown(found), report(found)
    assert {arrow.rooms for arrow in up(found)} == UP, report(found)


def test_nothing_imports_itself_through_others() -> None:
    found = [arrow for arrow in imports() if not arrow.late]
    assert not circles(arrow.rooms for arrow in found), report(found)
    assert not circles((arrow.source, arrow.target) for arrow in found), report(found)


@pytest.mark.parametrize("room", ["tree", "token_selection"])
def test_rooms_that_know_of_no_framework(room: str) -> None:
    for file in (PACKAGE / room).rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert not any(f"import {name}" in text or f"from {name}" in text for name in ("transformers", "trl", "verl"))


@pytest.mark.parametrize(
    ("room", "other"),
    [("tree", "attention"), ("models", "execution"), ("execution", "training"), ("training", "adapters")],
)
def test_negative_control(room: str, other: str) -> None:
    assert runs_up(room, other) and not runs_up(other, room)


def test_circles_are_found() -> None:
    arrows = [("a", "b"), ("b", "c"), ("c", "b"), ("c", "d"), ("d", "d"), ("e", "f"), ("f", "g"), ("g", "e")]
    assert circles(arrows) == [["b", "c"], ["e", "f", "g"]]


def test_what_is_read_of_a_package(tmp_path: Path) -> None:
    package = tmp_path / "some"
    (package / "tree").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "tree" / "__init__.py").write_text("from some.tree.trie import Trie, build\n")
    (package / "tree" / "trie.py").write_text("import some\n\ndef late():\n    from some import api\n")
    (package / "api.py").write_text("import os\nfrom some.tree import trie\nif TYPE_CHECKING:\n    import some.tree\n")
    found = [(arrow.source, arrow.target, arrow.line, arrow.late) for arrow in imports(package)]
    assert sorted(found) == [
        ("api", "tree", 4, True),
        ("api", "tree.trie", 2, False),
        ("tree", "tree.trie", 1, False),
        ("tree.trie", "__init__", 1, False),
        ("tree.trie", "api", 4, True),
    ]
