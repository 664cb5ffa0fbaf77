"""Tests and measurements on a GPU, step by step, in ten minutes.

    python -m benchmarks.gpu op --output out          # `make gpu`: kernels and attention; needs no TRL
    python -m benchmarks.gpu trl --output out         # `make gpu-trl`: whole policy updates
    python -m benchmarks.gpu op --output out --dry    # `make gpu-dry`: no GPU, all of it tiny, kernels compiled

A bare machine with torch, Triton, transformers and pytest is enough: nothing is installed or downloaded, the package is
taken from this checkout. The steps are in plan.py. One that fails, or runs out of its time, does not stop the next.
Each leaves `<output>/gpu_<plan>_<step>.json`: how it ended, and what it measured, on which machine, with which
versions, at which commit; all that is printed goes to `<output>/gpu_<plan>.log`, too. The last thing printed is a short
table, and the exit status is 1 if a step failed. Without --dry, a machine without a CUDA device is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from benchmarks.gpu.plan import PLANS, RESULT, Setting, Step

ROOT = Path(__file__).resolve().parents[2]
ROLLOUTS = ROOT.parent / "shared" / "data" / "tau_airline_gpt4o.jsonl.gz"
SEES_A_GPU = "import sys, torch; sys.exit(not torch.cuda.is_available())"
DRY_PATIENCE = 10  # a CPU takes longer: so many times a step's seconds
PATIENCE = 5.0  # seconds between asking a step to end and ending it


@dataclass(frozen=True, slots=True)
class Ending:
    """How a step ended. outcome: "passed", "failed" or "out of time". note: the last line that it printed."""

    step: str
    outcome: str
    seconds: float
    limit: float
    note: str
    returncode: int
    command: list[str]


def main() -> None:
    args = _arguments()
    if not args.dry and subprocess.run([sys.executable, "-c", SEES_A_GPU]).returncode != 0:
        sys.exit("torch sees no CUDA device. Expected one; --dry tries every step without.")
    args.output.mkdir(parents=True, exist_ok=True)
    rollouts = args.rollouts.resolve() if args.rollouts.exists() else None
    steps = PLANS[args.plan](Setting(args.dry, args.site, args.wheels, rollouts))
    if args.dry:
        steps = [replace(step, seconds=DRY_PATIENCE * step.seconds) for step in steps]
    if unknown := sorted(set(args.only or ()) - {step.name for step in steps}):
        sys.exit(f"No step named {', '.join(unknown)}. Expected among: {', '.join(step.name for step in steps)}.")
    endings: list[Ending] = []
    about: dict[str, Any] = {}
    with (args.output / f"gpu_{args.plan}.log").open("w") as log:
        if rollouts is None:
            _say(log, f"no recorded rollouts at {args.rollouts}: give their path with --rollouts")
        for step in steps:
            if args.only and step.name not in args.only:
                continue
            _say(log, f"\n== {step.name}, at most {step.seconds} s")
            ending, result = _run(step, _environment(args.site), log)
            endings.append(ending)
            about = about or _about(result, args.commit)
            content = {"plan": args.plan, "dry": args.dry, **asdict(ending), **about, "result": result}
            path = args.output / f"gpu_{args.plan}_{step.name}.json"
            path.write_text(json.dumps(content, indent=2) + "\n")
        _say(log, "\n" + _table(endings))
    if any(ending.outcome != "passed" for ending in endings):
        sys.exit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", choices=tuple(PLANS))
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--dry", action="store_true", help="no GPU: everything that needs none, at tiny sizes")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="some of the plan's steps")
    parser.add_argument("--rollouts", type=Path, default=ROLLOUTS, help="recorded trajectories, gzipped JSON lines")
    parser.add_argument("--commit", help="for a copy that is no git checkout: what it is a copy of")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", help="what `make gpu-wheels` downloaded")
    parser.add_argument("--site", type=Path, default=ROOT / "build" / "gpu-site", help="where they are unpacked")
    return parser.parse_args()


def _environment(site: Path) -> dict[str, str]:
    """This checkout before everything else, then what was unpacked from wheels; one thread per process, no hub."""
    path = [str(ROOT), str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(path)}


def _run(step: Step, environment: dict[str, str], log: TextIO) -> tuple[Ending, Any]:
    """How it ended, and the JSON that it wrote, if any."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "result.json"
        command = [sys.executable, *(str(written) if part == RESULT else part for part in step.command)]
        start = time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, errors="replace", start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        timer = threading.Timer(step.seconds, _stop, [process])
        timer.start()
        note = ""
        assert process.stdout is not None
        for line in process.stdout:
            _say(log, line.rstrip("\n"))
            note = line.strip() or note
        process.wait()
        seconds = time.monotonic() - start
        timer.cancel()
        outcome = "passed" if process.returncode == 0 else "failed" if seconds < step.seconds else "out of time"
        ending = Ending(step.name, outcome, seconds, step.seconds, note, process.returncode, step.command)
        return ending, _read(written)


def _stop(process: subprocess.Popen[str]) -> None:
    """The step and all that it started: first with a chance to say what it has, then without."""
    for wish in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, wish)
            process.wait(PATIENCE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _read(path: Path) -> Any:
    """What a step wrote; None if nothing, or only half of it."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _about(result: Any, commit: str | None) -> dict[str, Any]:
    """Machine, versions and commit, from the first step that tells."""
    if not isinstance(result, dict) or "machine" not in result:
        return {}
    return {"machine": result["machine"], "versions": result["versions"], "commit": commit or result["commit"]}


def _say(log: TextIO, line: str) -> None:
    print(line, flush=True)
    log.write(line + "\n")
    log.flush()


def _table(endings: list[Ending]) -> str:
    rows = [(e.step, e.outcome, f"{e.seconds:.0f} of {e.limit:.0f} s", e.note[:100]) for e in endings]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    total = f"{sum(e.seconds for e in endings):.0f} s in all"
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    return "\n".join([*lines, total])


if __name__ == "__main__":
    main()
