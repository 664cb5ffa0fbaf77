"""Pictures of a prefix tree: text for terminals, SVG for files.

Both put token positions on the horizontal axis, so a picture shows at a glance how long the common beginning is, where
the sequences part and what is left to each alone. Text draws one line per node and, in a large tree, leaves out the
smallest subtrees, counted on a line of their own. SVG draws one row per sequence: the whole coloured area is what dense
execution computes, and every box is computed once.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

import numpy as np

from dta_plugin.tree.stretches import Stretches
from dta_plugin.tree.trie import PrefixTree

_SVG_WIDTH, _SVG_MARGIN, _SVG_HEIGHT = 960, 36, 600
_SVG_BOXES = 5000  # about 1 MB
_LIGHT, _MIDDLE, _DARK = (214, 222, 232), (143, 184, 222), (8, 69, 148)  # one sequence, two, all


@dataclass(frozen=True, slots=True)
class _Glyphs:
    branch: str
    last: str
    through: str
    shared: str
    alone: str
    becomes: str
    more: str


_UNICODE = _Glyphs("├─", "└─", "│ ", "█", "░", "→", "…")
_ASCII = _Glyphs("|-", "`-", "| ", "#", ".", "->", "...")


@dataclass(frozen=True, slots=True, eq=False)
class _Nodes:
    """Int64 [M] per node: tokens, those that are shared, tokens of the subtree, first depth, and the sequences through
    its first and its last token (fewer where some end inside). children: nodes below each; roots: the topmost."""

    tokens: np.ndarray
    shared: np.ndarray
    subtree: np.ndarray
    depth: np.ndarray
    entering: np.ndarray
    leaving: np.ndarray
    children: list[list[int]]
    roots: list[int]

    @classmethod
    def from_tree(cls, tree: PrefixTree) -> _Nodes:
        starts, stops = tree.node_start[:-1], tree.node_start[1:]
        above = np.searchsorted(tree.node_start, tree.parent[starts], side="right") - 1  # -1 above a root
        children: list[list[int]] = [[] for _ in starts]
        roots: list[int] = []
        for node, parent in enumerate(above.tolist()):
            (roots if parent < 0 else children[parent]).append(node)
        return cls(
            tokens=stops - starts,
            shared=np.add.reduceat((tree.multiplicity > 1).astype(np.int64), starts),
            subtree=tree.exit[starts] - starts,
            depth=tree.depth[starts],
            entering=tree.multiplicity[starts],
            leaving=tree.multiplicity[stops - 1],
            children=children,
            roots=roots,
        )


def draw_text(tree: PrefixTree, max_lines: int = 40, width: int = 100, ascii_only: bool = False) -> str:
    """The tree as text: a heading and a line per node, at most `max_lines` lines (at least 3) of `width` columns.

    A line gives the node's tokens, the sequences through it ("x4->1": three of four end inside) and a bar at its token
    positions. A very deep tree may need more columns.
    """
    glyphs = _ASCII if ascii_only else _UNICODE
    nodes = _Nodes.from_tree(tree)
    rows = list(_rows(nodes, nodes.roots, _largest(nodes, max(max_lines, 3) - 1), glyphs, "", is_root=True))
    first = max(len("tokens"), *(len(label) for label, _ in rows)) + 2
    second = max(len("sequences"), *(len(_sequences(nodes, node, glyphs)) for _, node in rows)) + 2
    longest = int(tree.depth.max()) + 1
    scale = max(width - first - second, 10) / longest
    legend = f"position 0 to {longest:,} ({glyphs.shared} shared, {glyphs.alone} one sequence)"
    lines = [f"{'tokens':<{first}}{'sequences':<{second}}{legend}"]
    for label, node in rows:
        lines.append(f"{label:<{first}}{_sequences(nodes, node, glyphs):<{second}}{_bar(nodes, node, scale, glyphs)}")
    return "\n".join(line.rstrip() for line in lines)


def _largest(nodes: _Nodes, max_lines: int) -> set[int]:
    """The nodes that get a line: largest subtrees first, a parent before its children."""
    shown: set[int] = set()
    hidden = {-1: len(nodes.roots)}  # per shown node, children without a line; any such cost one line together
    lines = 1
    heap = [(-int(nodes.subtree[root]), root, -1) for root in nodes.roots]
    heapq.heapify(heap)
    while heap:
        _, node, parent = heapq.heappop(heap)
        children = nodes.children[node]
        added = 1 + bool(children) - (hidden[parent] == 1)
        if lines + added > max_lines:
            continue
        lines += added
        shown.add(node)
        hidden[parent] -= 1
        hidden[node] = len(children)
        for child in children:
            heapq.heappush(heap, (-int(nodes.subtree[child]), child, node))
    return shown


def _rows(
    nodes: _Nodes, siblings: list[int], shown: set[int], glyphs: _Glyphs, indent: str, is_root: bool = False
) -> Iterator[tuple[str, int | None]]:
    """(label, node) in depth-first order; node None for the line that counts siblings without a line."""
    visible = [node for node in siblings if node in shown]
    hidden = [node for node in siblings if node not in shown]
    for position, node in enumerate(visible):
        is_last = not hidden and position == len(visible) - 1
        mark = "" if is_root else glyphs.last if is_last else glyphs.branch
        below = "" if is_root else "  " if is_last else glyphs.through
        yield f"{indent}{mark}{nodes.tokens[node]:,}", node
        yield from _rows(nodes, nodes.children[node], shown, glyphs, indent + below)
    if hidden:
        tokens = int(nodes.subtree[hidden].sum())
        mark = "" if is_root else glyphs.last
        yield f"{indent}{mark}{glyphs.more} {len(hidden):,} more: {tokens:,}", None


def _sequences(nodes: _Nodes, node: int | None, glyphs: _Glyphs) -> str:
    if node is None:
        return ""
    entering, leaving = nodes.entering[node], nodes.leaving[node]
    return f"x{entering}" + (f"{glyphs.becomes}{leaving}" if leaving < entering else "")


def _bar(nodes: _Nodes, node: int | None, scale: float, glyphs: _Glyphs) -> str:
    if node is None:
        return ""
    depth, tokens, shared = int(nodes.depth[node]), int(nodes.tokens[node]), int(nodes.shared[node])
    start, middle = round(depth * scale), round((depth + shared) * scale)
    stop = max(round((depth + tokens) * scale), start + 1)
    if shared == tokens:
        middle = stop
    return " " * start + glyphs.shared * (middle - start) + glyphs.alone * (stop - middle)


def draw_svg(tree: PrefixTree, title: str = "") -> str:
    """The tree as a self-contained SVG document: one row per sequence, darker where more sequences share a box.

    Of more than 5,000 boxes the largest are drawn, and a note counts the others.
    """
    row = min(max(_SVG_HEIGHT / tree.num_sequences, 1.0), 20.0)
    bottom = 2 * _SVG_MARGIN + row * tree.num_sequences
    longest = int(tree.depth.max()) + 1
    scale = (_SVG_WIDTH - 2 * _SVG_MARGIN) / longest
    counts = (
        f"{tree.num_sequences:,} sequences, {tree.flat_tokens:,} tokens, {tree.tree_tokens:,} computed "
        f"({tree.compression_ratio:.2f}x shared)"
    )
    heading = f"{title}: {counts}" if title else counts
    boxes = Stretches.from_tree(tree)
    kept = np.sort(np.argsort(-boxes.tokens * boxes.sequences, kind="stable")[:_SVG_BOXES])
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_SVG_WIDTH} {bottom + _SVG_MARGIN:.0f}" '
            'font-family="system-ui, sans-serif" font-size="12" fill="#333">',
            f'<rect width="{_SVG_WIDTH}" height="{bottom + _SVG_MARGIN:.0f}" fill="#fff"/>',
            f'<text x="{_SVG_MARGIN}" y="24" font-size="14">{escape(heading)}</text>',
            *_boxes(tree, boxes, kept, scale, row),
            *_axis(longest, scale, bottom),
            *_note(boxes, kept, bottom),
            "</svg>\n",
        ]
    )


def _boxes(tree: PrefixTree, boxes: Stretches, kept: np.ndarray, scale: float, row: float) -> Iterator[str]:
    """A box for every stretch of tokens that is kept, of all that there are."""
    gap = 1.0 if row >= 4 else 0.0
    columns = (boxes.depth, boxes.tokens, boxes.sequences, boxes.row)
    for depth, length, sequences, first in zip(*(column[kept].tolist() for column in columns), strict=True):
        yield (
            f'<rect x="{_SVG_MARGIN + depth * scale:.2f}" y="{_SVG_MARGIN + first * row:.2f}" '
            f'width="{max(length * scale - gap, 0.5):.2f}" height="{sequences * row - gap:.2f}" '
            f'fill="{_colour(sequences, tree.num_sequences)}">'
            f"<title>{length:,} tokens from position {depth:,}, {sequences:,} sequences</title></rect>"
        )


def _note(boxes: Stretches, kept: np.ndarray, bottom: float) -> Iterator[str]:
    """What is left out, if anything is."""
    if len(kept) < len(boxes):
        tokens = int(boxes.tokens.sum() - boxes.tokens[kept].sum())
        text = f"{len(boxes) - len(kept):,} smaller boxes ({tokens:,} tokens) are left out"
        yield f'<text x="{_SVG_MARGIN}" y="{bottom + 6:.1f}">{text}</text>'


def _colour(sequences: int, most: int) -> str:
    if sequences == 1:
        return "rgb({},{},{})".format(*_LIGHT)
    share = math.log(sequences / 2) / math.log(most / 2) if most > 2 else 1.0
    return "rgb({},{},{})".format(*(round(a + share * (b - a)) for a, b in zip(_MIDDLE, _DARK, strict=True)))


def _axis(longest: int, scale: float, bottom: float) -> Iterator[str]:
    """Ticks at round token positions, at most eight or so."""
    power = 10 ** math.floor(math.log10(max(longest / 8, 1)))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= longest / 8)
    y = bottom - _SVG_MARGIN + 4
    for position in range(0, longest + 1, step):
        x = _SVG_MARGIN + position * scale
        yield f'<path d="M{x:.1f} {y:.1f}v6" stroke="#999"/>'
        yield f'<text x="{x:.1f}" y="{y + 20:.1f}" text-anchor="middle">{position:,}</text>'
    yield f'<text x="{_SVG_WIDTH - _SVG_MARGIN}" y="{y + 38:.1f}" text-anchor="end">token position</text>'
