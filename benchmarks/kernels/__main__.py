"""Each Triton kernel alone, with every candidate row of the launch table: which is the fastest? For one GPU.

    python -m benchmarks.kernels --output kernels.json       # under three minutes on an H200
    python -m benchmarks.kernels --dims 128 --trees star     # some of it
    python -m benchmarks.kernels --device cpu --smoke        # seconds, under Triton's interpreter: checks this script

For every head dim and tree, one kernel after the other runs with its row of the table and with each candidate in its
place; the other kernels keep their rows. A row's `ms` is the median time of that kernel's own launches (a key gradient
is all that is launched for dK and dV, the sums of split tiles included), TFLOP/s count visible query-key pairs: 4 FLOPs
per pair, dimension and query head forward, 6 for dQ, 8 for dK and dV. `difference` is to the result of the table's row.
A row that does not fit the GPU says so and stops nothing. Before anything is timed, all variants are compiled side by
side by --workers processes. Heads are Qwen3-8B's: 32 query heads over 8; dtype bfloat16.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.harness import environment, table, write_json
from benchmarks.common.workloads import star, unrelated
from benchmarks.kernels.bench import Bench, Row

Candidates = dict[int, dict[str, tuple[Row, ...]]]  # by head dim and kernel, beside the table's own rows
CANDIDATES: Candidates = {
    64: {
        "forward": ((128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2)),
        "query_gradient": ((128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 2)),
        "key_gradient": ((128, 64, 4, 2), (64, 128, 8, 2), (64, 64, 4, 2)),
    },
    128: {
        "forward": ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)),
        "query_gradient": ((128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2)),
        "key_gradient": ((64, 64, 4, 2), (64, 128, 8, 2), (128, 64, 4, 2), (64, 64, 8, 3)),
    },
    256: {
        "forward": ((128, 64, 8, 3), (128, 64, 8, 2)),
        "query_gradient": ((128, 32, 8, 3), (128, 64, 8, 2), (64, 32, 4, 2)),
        "key_gradient": ((64, 64, 8, 1), (64, 64, 4, 1), (32, 64, 4, 1)),
    },
}
SMOKE_CANDIDATES: Candidates = {16: {kernel: ((32, 16, 4, 2), (16, 32, 4, 2)) for kernel in CANDIDATES[64]}}
FLOPS = {"forward": 4, "query_gradient": 6, "key_gradient": 8}
TREES: dict[str, Callable[[], list[torch.Tensor]]] = {
    "star": lambda: star(16384, 2048, 16, 8192).sequences,
    "chain": lambda: unrelated(0, 16384, 1, 8192).sequences,
    "apart": lambda: unrelated(0, 2048, 16, 8192).sequences,
}
SMOKE_TREES = {"star": lambda: star(40, 24, 3, 512).sequences}
ROUNDS = 7


def main() -> None:
    args = _arguments()
    device = torch.device(args.device)
    candidates = SMOKE_CANDIDATES if args.smoke else {dim: CANDIDATES[dim] for dim in args.dims}
    trees = SMOKE_TREES if args.smoke else {name: TREES[name] for name in args.trees}
    if args.share is not None:
        _compile(candidates, device, args.share, args.workers)
        return
    start = time.monotonic()
    if device.type == "cuda" and args.workers:
        _compile_side_by_side(args)
        print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    content = {
        "benchmark": "kernels",
        "smoke": args.smoke,
        "dtype": "float32" if args.smoke else "bfloat16",
        **environment(device),
        "rows": [],
    }
    rows: list[dict[str, Any]] = content["rows"]
    for dim, kernels in candidates.items():
        for name, sequences in trees.items():
            if time.monotonic() - start > args.seconds:
                print(f"head dim {dim}, {name}: left out, {args.seconds:.0f} s are over", flush=True)
                continue
            tiny = {"heads": (2, 1), "dtype": torch.float32} if args.smoke else {}
            bench = Bench(dim, sequences(), device, **tiny)
            for kernel, others in kernels.items():
                rows += _compare(bench, name, kernel, others, 1 if args.smoke else ROUNDS)
            if args.output:
                write_json(args.output, content)
    print("\n" + _table(rows))
    measured = sum("ms" in row for row in rows)
    print(f"\n{measured} of {len(rows)} rows measured")
    if not measured or any(row["of_table"] and "ms" not in row for row in rows):
        sys.exit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu needs --smoke")
    parser.add_argument("--smoke", action="store_true", help="one tiny tree, head dim 16")
    parser.add_argument("--dims", type=int, nargs="+", choices=tuple(CANDIDATES), default=[128, 256, 64])
    parser.add_argument("--trees", nargs="+", choices=tuple(TREES), default=list(TREES))
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no other tree after that")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile beforehand")
    parser.add_argument("--output", type=Path, help="JSON file, written after every tree")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)  # this process compiles that share
    args = parser.parse_args()
    if args.device == "cpu" and not args.smoke:
        parser.error("the full shapes need a GPU; add --smoke to run tiny ones under Triton's interpreter")
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when it is first imported, which is later
    return args


def _compare(bench: Bench, tree: str, kernel: str, others: tuple[Row, ...], rounds: int) -> Iterator[dict[str, Any]]:
    """The table's row, then the candidates that are not in it."""
    about = {"dim": bench.dim, "tree": tree, "kernel": kernel}
    flops = FLOPS[kernel] * bench.dim * bench.heads[0] * bench.pairs
    expected: list[torch.Tensor] = []
    own: Row | None = None
    for row in (None, *others):
        if row is not None and row == own:
            continue
        try:
            found, _, taken = bench.run(kernel, row)
            times = [bench.run(kernel, row)[1] for _ in range(rounds)]
        except Exception as error:  # too large for this GPU, or a compiler that gives up
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            yield {
                **about,
                "row": row,
                "of_table": row is None,
                "unavailable": f"{type(error).__name__}: {reason[:160]}",
            }
            continue
        if row is None:
            expected, own = found, taken
        yield {
            **about,
            "row": taken,
            "of_table": row is None,
            "ms": statistics.median(times),
            "tflops": flops / statistics.median(times) / 1e9,
            "difference": _difference(found, expected or found),
            "runs": times,
        }


def _difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest relative L2 difference; infinite for NaN."""
    pairs = [(f.float(), e.float()) for f, e in zip(found, expected, strict=True)]
    largest = max(float((f - e).norm() / e.norm()) for f, e in pairs)
    return largest if math.isfinite(largest) else math.inf


def _table(rows: list[dict[str, Any]]) -> str:
    def line(row: dict[str, Any]) -> tuple[str, ...]:
        shape = "x".join(map(str, row["row"] or ("table's",))) + (" *" if row["of_table"] else "")
        if "unavailable" in row:
            return str(row["dim"]), row["tree"], row["kernel"], shape, "-", "-", row["unavailable"][:60]
        figures = f"{row['ms']:.3f}", f"{row['tflops']:.0f}", f"{row['difference']:.0e}"
        return str(row["dim"]), row["tree"], row["kernel"], shape, *figures

    header = ("D", "tree", "kernel", "tiles x warps x stages (* the table's)", "ms", "TFLOP/s", "difference")
    return table(header, [line(row) for row in rows])


def _compile_side_by_side(args: argparse.Namespace) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.kernels",
        "--workers",
        str(args.workers),
        "--dims",
        *map(str, args.dims),
    ]
    workers = [subprocess.Popen([*command, "--share", str(index)]) for index in range(args.workers)]
    for worker in workers:
        worker.wait()


def _compile(candidates: Candidates, device: torch.device, share: int, of: int) -> None:
    """Every `of`-th variant, into Triton's cache. What fails here fails again, and is told, where it is timed."""
    short = star(4096, 128, 4, 8192).sequences  # long enough that the work of key tiles is split
    variants = [
        (dim, kernel, row)
        for dim, kernels in candidates.items()
        for kernel, rows in kernels.items()
        for row in (None, *rows)
    ]
    for dim, kernel, row in variants[share::of]:
        with suppress(Exception):
            Bench(dim, short, device).run(kernel, row)


if __name__ == "__main__":
    main()
