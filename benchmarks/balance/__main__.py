"""Sequences dealt out to bins (ranks, micro-batches): how much the costliest bin costs, against other ways to deal.

    python -m benchmarks.balance                                # under a minute on one CPU core
    python -m benchmarks.balance --rows "64 x 8" "one tree" --bins 8 64
    python -m benchmarks.balance --plot balance.png             # needs matplotlib (the `plot` extra)
    python -m benchmarks.balance --smoke                        # seconds: tiny batches, checks the benchmark itself

Nothing is trained. A bin's load is the cost of its prefix tree under `dta_plugin.balance.costs.TYPICAL`: tokens, and
attention on visible pairs. Batches (workloads.py): `groups x size`, stars; the same behind one system prompt;
`combs prompts x trials`, conversations of which every turn is a sequence; one tree; recorded agent rollouts, one
sequence per assistant turn. The contenders are described in contenders.py.

How to read the table: a contender's figures are its costliest bin over the lower bound, the cost of prefixes that
several bins compute over that of the whole batch as one tree, and the CPU time it took. No way to deal has a costliest
bin below the bound (see dta_plugin/balance/bound.py), but the bound may be out of reach.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.balance.contenders import Bins, contenders
from benchmarks.balance.report import checks, draw, result_table, shown
from benchmarks.balance.workloads import VOCAB, Batch, all_tasks, one_task, synthetic
from benchmarks.common.harness import CLOCKS, environment, interleaved, write_json
from benchmarks.common.workloads import ROLLOUTS
from dta_plugin.balance import partition
from dta_plugin.balance.bound import lower_bound
from dta_plugin.balance.costs import TOKENS, TYPICAL, SequenceCosts, loads

BINS, SMOKE_BINS = (2, 4, 8, 16, 32, 64), (2, 4)
# Sequences, tokens of each, sequences per group, bins.
LARGE, SMOKE_LARGE = (10_000, 4_000, 8, 64), (200, 40, 8, 4)
CPU = torch.device("cpu")


def main() -> None:
    args = _arguments()
    gc.freeze()  # garbage is collected before every run, but not searched for among all that was imported
    torch.set_num_threads(1)
    where = environment(CPU)
    batches = _batches(args)
    if unknown := sorted(set(args.rows or ()) - set(batches)):
        sys.exit(f"No row named {', '.join(unknown)}. Expected among: {', '.join(batches)}.")

    rows = []
    for name in args.rows or batches:
        batch = batches[name]()
        rows += _measure(batch, args.bins)
        print(f"{name}: {len(batch.sequences)} sequences, {batch.groups} groups", flush=True)
    large = _large(*(SMOKE_LARGE if args.smoke else LARGE))
    found = checks(rows, large)
    print(f"\n{result_table(rows)}\n")
    for check in found:
        print(shown(check))
    if args.plot:
        draw(rows, args.plot)
    if args.output:
        content = {
            "benchmark": "balance",
            "smoke": args.smoke,
            **where,
            "model": asdict(TYPICAL),
            "rows": rows,
            "large": large,
            "checks": found,
        }
        write_json(args.output, content)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny batches in 2 and 4 bins, no rollouts")
    parser.add_argument("--rows", nargs="+", help="names of the batches to run, as the table prints them; default: all")
    parser.add_argument("--bins", nargs="+", type=int, help=f"default: {' '.join(map(str, BINS))}")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--plot", type=Path, help="PNG file for the plot")
    parser.add_argument("--rollouts", type=Path, default=ROLLOUTS, help="recorded trajectories, gzipped JSON lines")
    args = parser.parse_args()
    args.bins = args.bins or (SMOKE_BINS if args.smoke else BINS)
    return args


def _batches(args: argparse.Namespace) -> dict[str, Callable[[], Batch]]:
    found = synthetic(args.smoke)
    if args.smoke:
        return found
    if not args.rollouts.exists():
        print(f"rollouts: skipped, {args.rollouts.name} not found; give its path with --rollouts")
        return found
    recorded = {"rollouts, all tasks": all_tasks, "rollouts, one task": one_task}
    return found | {name: lambda build=build: build(args.rollouts) for name, build in recorded.items()}


def _measure(batch: Batch, counts: list[int]) -> list[dict[str, Any]]:
    """A row for every number of bins."""
    costs = SequenceCosts.from_sequences(batch.sequences)
    described = {
        "name": batch.name,
        "sequences": len(batch.sequences),
        "groups": batch.groups,
        "flat_tokens": sum(map(len, batch.sequences)),
        "tree_tokens": int(SequenceCosts.from_sequences(batch.sequences, TOKENS).total),
        "cost": costs.total,
    }
    return [described | _dealt(batch, costs, bins) for bins in counts]


def _dealt(batch: Batch, costs: SequenceCosts, bins: int) -> dict[str, Any]:
    """All contenders, timed once each."""
    dealt: dict[str, Bins] = {}

    def keep(index: int, name: str, result: Bins) -> None:
        dealt[name] = result

    clocks = interleaved(contenders(batch.sequences, bins), 1, lambda: None, keep, CPU)
    bound = lower_bound(costs, bins)
    results = {}
    for name, result in dealt.items():
        if sorted(place for members in result for place in members) != list(range(len(costs))):
            sys.exit(f"{batch.name} in {bins} bins: {name} did not put every sequence into one bin.")
        found = loads(costs, result)
        results[name] = {
            "max_load": max(found),
            "over_bound": max(found) / bound,
            "repeated": sum(found) / costs.total - 1,
            "sequences": [min(map(len, result)), max(map(len, result))],
            "seconds": {clock: seconds[name][0] for clock, seconds in clocks.items()},
        }
    return {"bins": bins, "lower_bound": bound, "contenders": _with_mean_of_seeds(results)}


def _with_mean_of_seeds(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Contenders "random 0", "random 1" and so on as one."""
    seeds = [result for name, result in results.items() if name.startswith("random ")]
    figures = ("max_load", "over_bound", "repeated")
    mean: dict[str, Any] = {key: statistics.mean(seed[key] for seed in seeds) for key in figures}
    mean["sequences"] = seeds[0]["sequences"]
    mean["seconds"] = {clock: statistics.mean(seed["seconds"][clock] for seed in seeds) for clock in CLOCKS}
    return {name: result for name, result in results.items() if not name.startswith("random ")} | {"random": mean}


def _large(count: int, length: int, group: int, bins: int) -> dict[str, float]:
    """Seconds for one large batch of groups that share a quarter of their tokens."""
    generator = np.random.default_rng(0)
    rows = generator.integers(VOCAB, size=(count, length))
    for first in range(0, count, group):
        rows[first : first + group, : length // 4] = rows[first, : length // 4]
    sequences = list(rows)
    start = {clock: read() for clock, read in CLOCKS.items()}
    partition(sequences, bins)
    seconds = {clock: read() - start[clock] for clock, read in CLOCKS.items()}
    return {"sequences": count, "tokens": length, "bins": bins, **seconds}


if __name__ == "__main__":
    main()
