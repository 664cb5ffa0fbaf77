"""The entry points of this checkout, as pip would write them: an environment may have those of another release."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]


def written_to(folder: Path) -> Path:
    """A folder for PYTHONPATH."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    groups = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["entry-points"]
    info = folder / "dta_plugin_here-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dta-plugin-here\nVersion: 0\n")
    lines = [f"[{group}]\n{name} = {value}\n" for group, own in groups.items() for name, value in own.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder
