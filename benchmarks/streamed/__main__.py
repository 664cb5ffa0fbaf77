"""Streamed execution: what a bounded memory costs, against packed execution and against one path at a time.

    python -m benchmarks.streamed                     # about 15 minutes on one CPU core
    python -m benchmarks.streamed --rows bushy comb   # some trees
    python -m benchmarks.streamed --smoke             # seconds: tiny shapes, checks the benchmark itself

Measured: one forward pass, a weighted sum of the completions' log-probs and its backward pass, on a 4-layer Qwen3,
without sampling and without the optimizer. The contenders are described in contenders.py; budgets are 1/2, 1/4
and 1/8 of the tree's tokens. Trees: `star`, one prompt and its completions; `bushy`, a prompt, branches, and answers to
each; `comb`, a conversation of which every turn is a sequence, with a second answer to every turn; recorded agent
rollouts. Gradients of all contenders are compared before anything is timed; the run stops if they differ.

How to read the first table: `vs packed` is the time over that of packed execution; `one path / streamed` how many times
longer one path at a time takes under the same budget, as the median over rounds. `again` is the tokens that run forward
more than once (or, dense, that are shared), over those of the tree. `saved` is the most that autograd keeps for the
backward pass at a time, `arena` the keys, values and gradients of one path beside it. How much faster streaming is
than one path at a time depends on how many tokens a path has for itself: compare `tokens per call`.

Both streamed contenders run forward twice what they do not keep, so that any loss can be computed in between; AReaL-DTA
itself saves that for leaves, and requires a loss that it can compute sequence by sequence.

The second table is about memory alone: trees of the same depth that grow wider, under one budget, on a tiny model.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config

from benchmarks.common.harness import CLOCKS, environment, interleaved, median_ratio, write_json
from benchmarks.common.models import MODEL_KEYS, qwen3, random_model
from benchmarks.common.workloads import ROLLOUTS, Workload, rollouts, star
from benchmarks.streamed.contenders import Contender, Disagreement, contenders, examine
from benchmarks.streamed.report import checks, contender_table, growth_table, summary
from benchmarks.streamed.workloads import bushy, comb
from dta_plugin import PrefixTree

VOCAB, TINY_VOCAB = 8192, 512
BUDGETS = {"1/2": 2, "1/4": 4, "1/8": 8}
Shapes = dict[str, tuple[Callable[..., Workload], tuple[int, ...]]]
# How each tree is built, and from which arguments (common/workloads.py, workloads.py).
SHAPES: Shapes = {
    "star": (star, (512, 128, 24)),
    "star-short": (star, (512, 48, 32)),
    "bushy": (bushy, (256, 64, 96, 6, 5)),
    "bushy-short": (bushy, (256, 64, 48, 8, 6)),
    "comb": (comb, (256, 64, 16)),
}
SMOKE_SHAPES: Shapes = {"star": (star, (24, 8, 6)), "bushy": (bushy, (16, 8, 8, 3, 3)), "comb": (comb, (16, 8, 5))}
ROLLOUT_ROUNDS = 2
# The second table: budget; branches behind a prompt of 64, each of 64 tokens with three answers of 128.
GROWTH, SMOKE_GROWTH = (1024, (9, 36, 146)), (256, (2, 8))
# Largest relative difference between contenders that rounding explains.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def main() -> None:
    args = _arguments()
    gc.freeze()  # garbage is collected before every run, but not searched for among all that was imported
    atexit.register(gc.unfreeze)  # compiled modules complain of what they find alive at exit
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    where = environment(device)
    config = qwen3(2, 64, TINY_VOCAB) if args.smoke else qwen3(4, 256, VOCAB)
    workloads = _workloads(args, config.vocab_size)
    if unknown := sorted(set(args.rows or ()) - set(workloads)):
        sys.exit(f"No row named {', '.join(unknown)}. Expected among: {', '.join(workloads)}.")

    rows = []
    try:
        for name in args.rows or workloads:
            work = workloads[name]()
            if work is not None:
                rounds = min(args.rounds, ROLLOUT_ROUNDS) if name == "rollouts" else args.rounds
                rows.append(_measure(work.to(device), config, dtype, rounds, args.clock))
                print(summary(rows[-1]), flush=True)
        print(f"\n{contender_table(rows)}\n", flush=True)
        budget, branches = SMOKE_GROWTH if args.smoke else GROWTH
        growth = [_grown(bushy(64, 64, 128, count, 3, TINY_VOCAB).to(device), budget, dtype) for count in branches]
    except Disagreement as error:
        sys.exit(str(error))
    print(f"Kept for the backward pass with {budget} tokens at a time:\n\n{growth_table(growth)}\n")
    found = checks(rows)
    for check in found:
        print(f"{check['claim']}: {check['value']:.2f}, {'met' if check['met'] else 'NOT MET'}")
    if args.output:
        content = {
            "benchmark": "streamed",
            "smoke": args.smoke,
            "device": args.device,
            "dtype": args.dtype,
            "clock": args.clock,
            "model": {key: getattr(config, key) for key in MODEL_KEYS},
            **where,
            "rows": rows,
            "growth": {"budget": budget, "rows": growth},
            "checks": found,
        }
        write_json(args.output, content)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny model and shapes, 2 rounds, no rollouts")
    parser.add_argument("--rows", nargs="+", help="names of the trees to run, as the table prints them; default: all")
    parser.add_argument("--rounds", type=int, default=3, help=f"of every tree but the rollouts: {ROLLOUT_ROUNDS} there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), help="the clock that the table shows; default: cpu with one thread on a CPU"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rollouts", type=Path, default=ROLLOUTS, help="recorded trajectories, gzipped JSON lines")
    args = parser.parse_args()
    if args.smoke:
        args.rounds = min(args.rounds, 2)
    if args.clock is None:
        args.clock = "cpu" if args.device == "cpu" and args.threads == 1 else "wall"
    return args


def _workloads(args: argparse.Namespace, vocab: int) -> dict[str, Callable[[], Workload | None]]:
    def recorded() -> Workload | None:
        if not args.rollouts.exists():
            print(f"rollouts: skipped, {args.rollouts.name} not found; give its path with --rollouts")
            return None
        return rollouts(args.rollouts, vocab)

    def made(name: str) -> Workload:
        build, shape = shapes[name]
        return replace(build(*shape, vocab), name=name)

    shapes = SMOKE_SHAPES if args.smoke else SHAPES
    found: dict[str, Callable[[], Workload | None]] = {name: partial(made, name) for name in shapes}
    return found if args.smoke else found | {"rollouts": recorded}


def _measure(work: Workload, config: Qwen3Config, dtype: torch.dtype, rounds: int, clock: str) -> dict[str, Any]:
    """Compare, then time all contenders on one tree."""
    tree = PrefixTree.from_sequences(work.sequences)
    budgets = {name: tree.tree_tokens // divisor for name, divisor in BUDGETS.items()}
    steps = _contenders(work, config, dtype, budgets)
    examined = examine(steps, TOLERANCE[dtype])

    def clear() -> None:
        for contender in steps.values():
            contender.model.zero_grad(set_to_none=True)

    # Dense is far from the others, and slow: its one run above is its time.
    timed = {name: contender.step for name, contender in steps.items() if name != "dense"}
    clocks = interleaved(timed, rounds, clear, lambda *_: None, work.advantages.device)
    seconds = clocks[clock]
    milliseconds = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    milliseconds["dense"] = 1e3 * examined["dense"].seconds[clock]
    over_packed = {name: median_ratio(values, seconds["packed"]) for name, values in seconds.items()}
    over_packed["dense"] = milliseconds["dense"] / milliseconds["packed"]
    return {
        "name": work.name,
        "note": work.note,
        "sequences": tree.num_sequences,
        "flat_tokens": tree.flat_tokens,
        "tree_tokens": tree.tree_tokens,
        "rounds": rounds,
        "budgets": budgets,
        "milliseconds": milliseconds,
        "over_packed": over_packed,
        "one_path_over_streamed": {
            name: median_ratio(seconds[f"one path {name}"], seconds[f"streamed {name}"]) for name in budgets
        },
        "examined": {name: asdict(found) for name, found in examined.items()},
        "seconds": clocks,
    }


def _grown(work: Workload, budget: int, dtype: torch.dtype) -> dict[str, Any]:
    """What all contenders keep on one tree of the second table."""
    tree = PrefixTree.from_sequences(work.sequences)
    steps = _contenders(work, qwen3(2, 64, TINY_VOCAB), dtype, {"": budget})
    examined = {name.strip(): asdict(found) for name, found in examine(steps, TOLERANCE[dtype]).items()}
    return {"tree_tokens": tree.tree_tokens, "longest_path": int(tree.depth.max()) + 1, "examined": examined}


def _contenders(
    work: Workload, config: Qwen3Config, dtype: torch.dtype, budgets: dict[str, int]
) -> dict[str, Contender]:
    models = [random_model(config).to(work.advantages.device, dtype) for _ in range(2)]
    return contenders(*models, work, budgets)


if __name__ == "__main__":
    main()
