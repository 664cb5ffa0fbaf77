"""Turn TRL's log into one short line per entry:

    trl grpo --config recipes/trl/quickstart.yaml | python recipes/quickstart/watch.py

Log entries become a reward bar; the plugin's own lines pass as they are; everything else on standard output is dropped.
"""

from __future__ import annotations

import ast
import sys
from typing import Any

WIDTH = 40


def short(entry: dict[str, Any]) -> str:
    """One log entry as a line; TRL writes its numbers as strings."""
    reward = float(entry["reward"])
    line = f"reward {reward:.2f} {'█' * round(WIDTH * reward):<{WIDTH}} {float(entry['step_time']):.2f} s/step"
    ratio = entry.get("dta/compression_ratio")
    return line if ratio is None else f"{line}, {float(ratio):.1f}x shared"


def main() -> None:
    for line in sys.stdin:
        if line.startswith("{") and "'reward'" in line:
            print(short(ast.literal_eval(line)), flush=True)
        elif line.startswith("dta"):
            print(line, end="", flush=True)


if __name__ == "__main__":
    main()
