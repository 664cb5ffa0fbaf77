"""Runs a benchmark as a user does, at the tiny sizes of `--smoke`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG"


@dataclass(frozen=True)
class Finished:
    """result: the JSON file that the benchmark wrote."""

    printed: str
    result: dict[str, Any]


def smoke(name: str, folder: Path, *options: str) -> Finished:
    """`python -m benchmarks.<name> --smoke`, whose result says where it comes from."""
    path = folder / "result.json"
    printed = python("-m", f"benchmarks.{name}", "--smoke", "--output", str(path), *options)
    result = json.loads(path.read_text())
    assert result.keys() >= {"commit", "machine", "versions"}
    assert result["machine"].keys() >= {"cpu", "cores", "threads", "accelerator"}
    assert result["versions"].keys() >= {"python", "torch", "transformers", "dta-plugin"}
    return Finished(printed, result)


def python(*arguments: str) -> str:
    """What it prints, from the repository's root."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
