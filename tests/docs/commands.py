"""The commands that README and docs show, and who runs each: a file of tests or of CI, by what stands in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS_GPU = re.compile(r"make gpu(-trl|-more)?$")


class Shown(NamedTuple):
    """One command. page: the file that shows it. text: without comments, one space between words."""

    page: str
    text: str


class RunBy(NamedTuple):
    """Commands that match `pattern` are run by `file`, in which `mark` stands."""

    pattern: str
    file: str
    mark: str


EVIDENCE = (
    RunBy(r"pip install (-e )?'(dta-plugin|\.)\[trl\]'", "Makefile", "--editable '.[trl,dev]'"),
    RunBy(r"pip install 'dta-plugin\[verl\]'", "Makefile", "--editable '.[verl,test]'"),
    RunBy(r"python -m dta_plugin\.run train\.py", "tests/adapters/trl/test_activation.py", "test_launcher"),
    RunBy(
        r"accelerate launch -m dta_plugin\.run train\.py", "tests/adapters/trl/test_activation.py", "test_accelerate"
    ),
    RunBy(r"trl grpo --config recipe\.yaml", "tests/adapters/trl/test_activation.py", 'site.run("trl", "grpo"'),
    RunBy(r"python -m verl\.trainer\.main_ppo", "tests/adapters/verl_cpu/test_quickstart.py", "external_lib"),
    RunBy(r"python -m dta_plugin\.adapters\.verl_cpu", "tests/adapters/verl_cpu/test_quickstart.py", "quickstart"),
    RunBy(r"python -m dta_plugin\.run --help", "tests/test_run.py", "test_help_teaches"),
    RunBy(r"make test$", ".ci/run", 'make test VENV="$scratch/venv"'),
    RunBy(r"make quickstart$", ".ci/run", "make quickstart VENV="),
    RunBy(r"make quickstart-hybrid$", "tests/recipes/test_trl.py", "test_a_hybrid_trains_as_stock_trl_does"),
    RunBy(r"make quickstart-verl$", "tests/adapters/verl_cpu/test_quickstart.py", "test_plugin"),
    RunBy(r"make gpu-dry$", "tests/benchmarks/test_gpu.py", "--dry"),
    RunBy(r"make bench$", "tests/benchmarks/test_policy_update.py", 'smoke("policy_update"'),
    RunBy(r"make bench-step$", "tests/benchmarks/test_whole_step.py", 'smoke("whole_step"'),
    RunBy(r"make bench-streamed$", "tests/benchmarks/test_streamed.py", 'smoke("streamed"'),
    RunBy(r"python -m benchmarks\.token_selection\.variance$", "tests/benchmarks/test_selection_variance.py", "smoke"),
)


def shown(path: Path) -> Iterator[Shown]:
    """Every command in the page's blocks of bash; lines that end in a backslash go on."""
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if text := " ".join(re.sub(r"(^|\s)#.*", "", line).split()):
                yield Shown(str(path.relative_to(ROOT)), text)


def evidence(text: str) -> RunBy | None:
    return next((known for known in EVIDENCE if re.match(known.pattern, text)), None)
