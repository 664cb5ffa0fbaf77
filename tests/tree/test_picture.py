"""Pictures: every token is accounted for, size is bounded, every sequence has its row."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from dta_plugin.tree import PrefixTree
from dta_plugin.tree.picture import _SVG_MARGIN, draw_svg, draw_text
from tests.support.trees import SHAPES, WIDE, Sequences, branching_comb, comb, run, star

ALL = {**SHAPES, **WIDE}


def text(sequences: Sequences, **options: int | bool) -> str:
    return draw_text(PrefixTree.from_sequences(sequences), **options)  # type: ignore[arg-type]


def counted_tokens(picture: str) -> int:
    """Tokens of all nodes that have a line, and of those that are left out."""
    labels = (re.match(r"[│├└─ ]*(?:… [\d,]+ more: )?([\d,]+)", line) for line in picture.splitlines()[1:])
    return sum(int(label[1].replace(",", "")) for label in labels if label)


@pytest.mark.parametrize("max_lines", [3, 8, 40])
@pytest.mark.parametrize("name", ALL)
def test_text_is_short_and_counts_every_token(name: str, max_lines: int) -> None:
    tree = PrefixTree.from_sequences(ALL[name])
    picture = draw_text(tree, max_lines=max_lines)
    assert len(picture.splitlines()) <= max_lines
    assert counted_tokens(picture) == tree.tree_tokens


def test_small_tree_in_full() -> None:
    shared, one, other = run(40), run(30, seed=1), run(10, seed=2)
    assert text([shared, shared + one, shared + other], width=62) == "\n".join(
        [
            "tokens  sequences  position 0 to 70 (█ shared, ░ one sequence)",
            "40      x3         █████████████████████████",
            "├─10    x1                                  ░░░░░░",
            "└─30    x1                                  ░░░░░░░░░░░░░░░░░░",
        ]
    )


def test_sequences_that_end_inside_lighten_the_bar() -> None:
    line = text(comb(2, turn=10)).splitlines()[1]
    assert line.startswith("20      x2→1") and abs(line.count("█") - line.count("░")) <= 1


def test_largest_subtrees_are_kept() -> None:
    picture = text([[3, *run(5)], [4, *run(500, seed=1)], [5, *run(7)], [6, *run(6)]], max_lines=3)
    assert "501" in picture and "… 3 more: 21" in picture


@pytest.mark.parametrize("name", ALL)
def test_ascii_only(name: str) -> None:
    assert text(ALL[name], ascii_only=True).isascii()


@pytest.mark.parametrize("width", [60, 100])
def test_width_is_kept(width: int) -> None:
    assert all(len(line) <= width + 1 for line in text(branching_comb(9, 20), width=width).splitlines()[1:])


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "one_token_trees"])
def test_svg_draws_every_token_of_every_sequence_once(name: str) -> None:
    tree = PrefixTree.from_sequences(SHAPES[name])
    painted = np.zeros((tree.num_sequences, int(tree.depth.max()) + 1), dtype=int)
    row = min(max(600 / tree.num_sequences, 1.0), 20.0)
    for box in ElementTree.fromstring(draw_svg(tree)):
        title = box.find("{*}title")
        if title is None or title.text is None:
            continue
        length, position, sequences = (
            int(number.replace(",", "")) for number in re.findall(r"[\d,]+(?= |,)", title.text)
        )
        top = round((float(box.attrib["y"]) - _SVG_MARGIN) / row)
        painted[top : top + sequences, position : position + length] += 1
    lengths = np.diff(tree.offsets)[tree.order]
    assert (painted == (np.arange(painted.shape[1]) < lengths[:, None])).all()


def test_svg_escapes_its_title_and_is_self_contained() -> None:
    svg = draw_svg(PrefixTree.from_sequences(star(5)), title="group <a> & co")
    assert "group &lt;a&gt; &amp; co: 5 sequences" in svg
    ElementTree.fromstring(svg)
    assert "href" not in svg
