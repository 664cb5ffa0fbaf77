"""Who imports whom: the rooms of the package from the top down, and the imports that break their order.

    python -m tests.support.arrows                                   # this checkout
    python -m tests.support.arrows --package ../other/dta_plugin     # another one, to compare

Per room it prints the rooms that it imports, and how often; then the imports that run up, and the circles. A circle is
a set of rooms, or of modules, of which each imports every other, directly or through others. Counted are imports that
run when a module is loaded; late ones, within functions or for type checkers, are counted apart.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "dta_plugin"
# Each may import what stands below it. Modules of the package itself are rooms of their own.
ORDER = (
    "run",
    "run_yaml",
    "run_options",
    "cli",
    "adapters",
    "calibrate",
    "training",
    "__init__",
    "activation",
    "api",
    "verify",
    "sharing",
    "diffusion",
    "balance",
    "execution",
    "models",
    "attention",
    "recurrent",
    "tree",
    "config",
    "token_selection",
    "option_places",
    "option_types",
    "dtypes",
    "upload",
    "decline",
    "errors",
)
# Switching on is where imports run up, when it is called.
UP = {("activation", "adapters")}


@dataclass(frozen=True, slots=True)
class Import:
    """source, target: modules without the package's name. late: within a function, or for type checkers."""

    source: str
    target: str
    line: int
    late: bool

    @property
    def rooms(self) -> tuple[str, str]:
        return room_of(self.source), room_of(self.target)


def room_of(module: str) -> str:
    return module.split(".")[0]


def runs_up(room: str, other: str) -> bool:
    return ORDER.index(other) < ORDER.index(room)


def imports(package: Path = PACKAGE) -> list[Import]:
    """Every import of the package by itself."""
    files = {_module(file.relative_to(package)): file for file in sorted(package.rglob("*.py"))}
    found: dict[Import, None] = {}  # one that names several things of a module counts once
    for source, file in files.items():
        for name, line, late in _names(ast.parse(file.read_text(encoding="utf-8")), package.name, False):
            target = name if name in files else name.rpartition(".")[0] or "__init__"
            if target != source:
                found[Import(source, target, line, late)] = None
    return list(found)


def circles(arrows: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Sets of more than one name that reach each other."""
    below: dict[str, set[str]] = defaultdict(set)
    for name, other in arrows:
        below[name].add(other)
    reached = {name: _reached(name, below) for name in list(below)}
    together = {
        tuple(sorted(other for other in others if name in reached.get(other, ()))) for name, others in reached.items()
    }
    return sorted(list(names) for names in together if len(names) > 1)


def _reached(name: str, below: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    todo = [name]
    while todo:
        new = below.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def _names(node: ast.AST, package: str, late: bool) -> Iterator[tuple[str, int, bool]]:
    """(what is imported, without the package's name, line, late) of the imports of the package below a node."""
    if isinstance(node, ast.ImportFrom) and node.module:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    for name in names:
        if name.split(".")[0] == package:
            yield name.partition(".")[2] or "__init__", node.lineno, late
    for child in ast.iter_child_nodes(node):
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from _names(child, package, late or inside or for_types)


def up(found: Iterable[Import]) -> list[Import]:
    return [arrow for arrow in found if not unknown([arrow]) and runs_up(*arrow.rooms)]


def unknown(found: Iterable[Import]) -> list[str]:
    """Rooms that have no place in the order."""
    return sorted({room for arrow in found for room in arrow.rooms} - set(ORDER))


def report(found: list[Import]) -> str:
    counts = Counter(arrow.rooms for arrow in found if arrow.rooms[0] != arrow.rooms[1])
    order = (*ORDER, *unknown(found))
    lines = []
    for room in order:
        below = [f"{other} {counts[room, other]}" for other in order if counts[room, other]]
        lines += [f"{room:16}{', '.join(below)}"] if below else []
    lines += [f"no place in the order of tests/support/arrows.py: {room}" for room in unknown(found)]
    lines += [f"up: {arrow.source}:{arrow.line} imports {arrow.target}" for arrow in up(found)]
    totals = []
    for note, counted in (("", [arrow for arrow in found if not arrow.late]), (", with late imports", found)):
        of_rooms = circles(arrow.rooms for arrow in counted)
        of_modules = circles((arrow.source, arrow.target) for arrow in counted)
        lines += [f"circle of rooms{note}: {', '.join(names)}" for names in of_rooms]
        lines += [f"circle of modules{note}: {', '.join(names)}" for names in of_modules]
        totals.append(len(of_rooms) + len(of_modules))
    sources = ", ".join(sorted({arrow.source for arrow in up(found)}))
    ups = f"{len(up(found))} ({sources})" if sources else "0"
    lines.append(f"up-imports: {ups}, circles: {totals[0]} ({totals[1]} with late imports)")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=PACKAGE, help="the package's folder")
    print(report(imports(parser.parse_args().package.resolve())))
