"""Timing side by side, tables and result files: what the benchmarks of this folder share.

Contenders are timed interleaved: every round runs each of them once, in an order that rotates, with garbage collected
before each run. Speed-ups are medians of the ratios within a round, so a machine that slows down for a while slows
both sides of a ratio. Two clocks run: wall time, and the process's CPU time, which is the one to trust with one thread
on a machine that other processes use too.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import dta_plugin

PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "prefix-grouper", "flash-attn", "numpy")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def interleaved(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    before: Callable[[], None],
    after: Callable[[int, str, Any], None],
    device: torch.device,
) -> dict[str, dict[str, list[float]]]:
    """{"wall": seconds per round of every contender, "cpu": the same}.

    before: called before each run, untimed. after: called with (round, name, result) after each run, untimed.
    """
    names = list(contenders)
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in names} for clock in CLOCKS}
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            before()
            gc.collect()
            synchronize(device)
            start = {clock: read() for clock, read in CLOCKS.items()}
            result = contenders[name]()
            synchronize(device)
            for clock, read in CLOCKS.items():
                seconds[clock][name].append(read() - start[clock])
            after(index, name, result)
            del result
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mark(device: torch.device) -> torch.cuda.Event | float:
    """This moment on the device's own clock: an event in the GPU's queue, or the CPU's time."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start: torch.cuda.Event | float, stop: torch.cuda.Event | float) -> float:
    """Between two marks; call `synchronize` first."""
    return 1e3 * (stop - start) if isinstance(start, float) else start.elapsed_time(stop)


def median_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over rounds of how many times faster `fast` was."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table, columns padded."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in [lines[0], rule, *lines[1:]])


def environment(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the commit that a result belongs to."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "driver": _driver() if device.type == "cuda" else None,
            "system": platform.system(),
        },
        "versions": {
            "python": platform.python_version(),
            "dta-plugin": dta_plugin.__version__,
            **{name: _version(name) for name in PACKAGES},
        },
        "commit": _commit(),
    }


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark whose contenders take turns on a CPU."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, 2 rounds")
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="the clock that the table shows")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Its arguments, which torch's threads follow."""
    args = parser.parse_args()
    args.rounds = min(args.rounds, 2) if args.smoke else args.rounds
    torch.set_num_threads(args.threads)
    return args


def header(benchmark: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a result file of such a benchmark begins with."""
    asked = {"smoke": args.smoke, "rounds": args.rounds, "clock": args.clock}
    return {"benchmark": benchmark, **asked, **environment(torch.device("cpu"))}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    family, model = fields.get("cpu family", "?").strip(), fields.get("model", "?").strip()
    return f"{fields.get('model name', platform.machine()).strip()} (family {family}, model {model})"


def _driver() -> str | None:
    """NVIDIA's, of the first GPU."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Short hash, with "-dirty" where package or benchmarks differ from it; None if the package is in no checkout."""
    root = Path(dta_plugin.__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "dta_plugin", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
