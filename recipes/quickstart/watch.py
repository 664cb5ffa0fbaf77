"""Turn the log of TRL or verl into one short line per entry:

    trl grpo --config recipes/trl/quickstart.yaml | python recipes/quickstart/watch.py
    recipes/verl/quickstart.sh 2>&1 | python recipes/quickstart/watch.py

Log entries become a reward bar; the plugin's own lines pass, and so do errors; everything else is dropped.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass

WIDTH = 40
VERL_ENTRY = re.compile(r"step:\d+ - .*")  # `name:value - name:value - ...`, after the name of a Ray process
SAID = re.compile(r"dta: .*")
ERROR = re.compile(r"(\S*\(.+ pid=\d+\)\S* )?(\w+\.)*\w*(Error|Exception)\b")  # at the start of what a process says


@dataclass(frozen=True)
class Entry:
    """What is shown of a log entry."""

    reward: float
    seconds: float
    ratio: float | None

    @classmethod
    def parse(cls, line: str) -> Entry | None:
        """From a line of either log; None if it is no entry."""
        if line.startswith("{") and "'reward'" in line:
            trl = ast.literal_eval(line)
            ratio = trl.get("dta/compression_ratio")
            return cls(float(trl["reward"]), float(trl["step_time"]), None if ratio is None else float(ratio))
        if found := VERL_ENTRY.search(line):
            verl = dict(field.split(":", 1) for field in found[0].split(" - "))
            ratio = verl.get("actor/dta/compression_ratio")
            seconds = float(verl["timing_s/step"])
            return cls(float(verl["critic/score/mean"]), seconds, None if ratio is None else float(ratio))
        return None

    def __str__(self) -> str:
        bar = "█" * round(WIDTH * self.reward)
        line = f"reward {self.reward:.2f} {bar:<{WIDTH}} {self.seconds:.2f} s/step"
        return line if self.ratio is None else f"{line}, {self.ratio:.1f}x shared"


def main() -> None:
    said = set()  # several processes say the same
    for line in sys.stdin:
        if entry := Entry.parse(line):
            print(entry, flush=True)
        elif found := SAID.search(line):
            if found[0] not in said:
                print(found[0], flush=True)
            said.add(found[0])
        elif line.startswith("dta") or ERROR.match(line):
            print(line, end="", flush=True)


if __name__ == "__main__":
    main()
