"""The tests that need a CUDA device, dealt out to several processes: what `make gpu` runs first.

    python -m benchmarks.gpu.tests --output tests.json
    python -m benchmarks.gpu.tests --select strides --processes 2     # some; without a GPU, in Triton's interpreter

Most of the time goes into compiling kernels, one variant per test, which is why tests run side by side; pytest alone
is enough for that. Only files whose tests use the device are run, and none that compiles for GPUs that are not there.
Outcomes are written as they come: those of a run that is stopped at --seconds count, and what did not run is a failure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "tests/gpu",
    "tests/attention/test_self_check.py",
    "tests/attention/test_triton.py",
    "tests/attention/test_triton_blocks.py",
    "tests/attention/test_triton_random.py",
    "tests/execution/test_waits.py",
)
SHOWN_LINES = 25  # of a failure's traceback


class Share:
    """pytest plugin: keeps one share of the tests, and writes a line of JSON per outcome."""

    def __init__(self, index: int, count: int, report: TextIO) -> None:
        self.index, self.count, self.report = index, count, report

    @pytest.hookimpl(trylast=True)  # after those that the markers deselect are gone
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self.index :: self.count]
        self._write(collected=len(items))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(id=report.nodeid, outcome="failed", seconds=0.0, text=report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            text = report.longreprtext if report.failed else ""
            self._write(id=report.nodeid, outcome=report.outcome, seconds=report.duration, text=text)

    def _write(self, **line: Any) -> None:
        self.report.write(json.dumps(line) + "\n")
        self.report.flush()


def main() -> None:
    args = _arguments()
    if args.share is not None:
        with args.output.open("w") as report:
            plugin = Share(args.share, args.processes, report)
            options = ["-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", "-m", "not slow", "-k", args.select]
            sys.exit(pytest.main([*options, *FILES], plugins=[plugin]))
    with tempfile.TemporaryDirectory() as folder:
        result = _summary(_run(args, Path(folder)))
    for failure in result["failed"]:
        print(f"\n{failure['id']} {failure['outcome']}\n" + "\n".join(failure["text"].splitlines()[-SHOWN_LINES:]))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    counts = ", ".join(f"{number} {outcome}" for outcome, number in result["outcomes"].items())
    print(f"\n{counts or 'nothing'} of {result['collected']} collected")
    if result["failed"] or sum(result["outcomes"].values()) < max(1, result["collected"]):
        sys.exit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=600.0, help="what still runs then is stopped")
    parser.add_argument("--select", default="", help="an expression for pytest's -k")
    parser.add_argument("--output", type=Path, help="JSON file for the outcomes")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)  # this process runs that share of the tests
    return parser.parse_args()


def _run(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The lines that all shares wrote, and one more for every share that failed without a test that did."""
    stop = time.monotonic() + args.seconds
    reports = [folder / f"{index}.jsonl" for index in range(args.processes)]
    logs = [folder / f"{index}.txt" for index in range(args.processes)]
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.tests",
        "--processes",
        str(args.processes),
        "--select",
        args.select,
    ]
    shares = []
    for index, (report, log) in enumerate(zip(reports, logs, strict=True)):
        with log.open("w") as out:
            one = ["--share", str(index), "--output", str(report)]
            shares.append(subprocess.Popen([*command, *one], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT))
    lines: list[dict[str, Any]] = []
    for index, share in enumerate(shares):
        try:
            share.wait(max(0.0, stop - time.monotonic()))
            said = f"ended with {share.returncode}\n{logs[index].read_text()}"
        except subprocess.TimeoutExpired:
            share.kill()
            share.wait()
            said = f"stopped after {args.seconds:.0f} s"
        own = [json.loads(line) for line in reports[index].read_text().splitlines()] if reports[index].exists() else []
        if share.returncode not in (0, 5) and not any(line.get("outcome") == "failed" for line in own):
            own.append({"id": f"share {index}", "outcome": "stopped", "seconds": 0.0, "text": said})
        lines += own
    return lines


def _summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    ran = [line for line in lines if "outcome" in line]
    return {
        "collected": sum(line.get("collected", 0) for line in lines),
        "outcomes": dict(Counter(line["outcome"] for line in ran)),
        "failed": [line for line in ran if line["outcome"] not in ("passed", "skipped")],
        "slowest": [[r["id"], r["seconds"]] for r in sorted(ran, key=lambda r: -r["seconds"])[:20]],
    }


if __name__ == "__main__":
    main()
