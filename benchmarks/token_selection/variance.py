"""How noisy is the gradient of an update on half of the tokens? Relative variance of every design, at equal tokens run.

    python -m benchmarks.token_selection.variance            # a minute on one CPU core; needs `make quickstart`'s model
    python -m benchmarks.token_selection.variance --smoke    # seconds: short rows, no model

Variances over drawings, exact (exact.py), divided by the square of the full gradient. Every design runs the same share
of the completions' tokens, counted up to a row's last one that is drawn: budgets are solved for that. `urs` cannot run
fewer than nearly all, and runs on random rows where it has to.

Lengths: completions of recorded agents, in groups of 4, 8 and 16. `unrelated`: gradients of tokens at right angles,
which on-policy ones are on average, since each has mean 0 given what is before it. `row alike`: those of a row are all
the same, and rows at right angles. `alike, sum 0` and `alike`: those of a group are all the same, advantages add up to
0 (then relative to the sum of rows' squares), or are equal.

Gradients: real ones, of the quickstart's base model, for its own completions and their advantages (gradients.py).
`apart` draws cuts row by row, `spread` evenly over siblings.

Hybrids: rows of 12 parts, all drawings of each enumerated. `given run`: the mean of its weights over the drawings that
run as far. It runs the same tokens, varies no more, and is a law of prefixes: no hybrid can beat all of those.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.harness import environment, write_json
from benchmarks.common.workloads import ROLLOUTS, encoder, turns_of
from benchmarks.token_selection.exact import (
    Outcomes,
    cut_moments,
    prefixes,
    single_variance,
    thinned,
    with_segment,
)
from benchmarks.token_selection.gradients import sampled
from benchmarks.token_selection.variance_report import gradient_table, hybrid_table, length_table
from dta_plugin.token_selection.designs import PrefixCut
from dta_plugin.token_selection.select import TokenSelection

ROOT = Path(__file__).resolve().parents[2]
RUN = 0.5
GROUPS = (4, 8, 16)
FLOORS = (0.04, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PREFIXES = (2, 8, 32)
PARTS = 12


@dataclass(frozen=True, slots=True)
class Way:
    """A kind of design. floor: as a share of the budget."""

    scheme: str
    floor: float = 1.0
    min_prefix: int = 1

    @property
    def name(self) -> str:
        prefix = f", prefix {self.min_prefix}" if self.min_prefix > 1 else ""
        return self.scheme + (f", floor {self.floor:g}" if self.scheme == "rpc" else "") + prefix

    def selection(self, budget: float) -> TokenSelection:
        return TokenSelection(scheme=self.scheme, budget=budget, min_prefix=self.min_prefix, floor=self.floor * budget)

    def at_run(self, lengths: Sequence[int], share: float) -> TokenSelection:
        """With the budget at which rows of such lengths run such a share of their tokens, or the nearest there is."""

        def run(budget: float) -> float:
            return _run(self.selection(budget), lengths)

        return self.selection(_solved(run, share, 0.5 if self.scheme == "rpc-uniform" else 0.01))


WAYS = (
    *(Way("rpc", floor) for floor in FLOORS),
    *(Way("rpc", floor, prefix) for prefix in PREFIXES for floor in (0.5, 0.8)),
    Way("rpc-uniform"),
)


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"benchmark": "selection_variance", "smoke": args.smoke, "run": RUN}
    result |= environment(torch.device("cpu"))
    lengths = [9, 2, 17, 30] * 8 if args.smoke else _recorded_lengths(args.rollouts)
    if lengths:
        result["lengths"] = {"rows": len(lengths), "tokens": [min(lengths), int(np.median(lengths)), max(lengths)]}
        result["by_length"] = [_of_lengths(way, lengths) for way in WAYS]
        print(f"\nLengths {result['lengths']}\n\n{length_table(result['by_length'], GROUPS)}")
    if not args.smoke and (args.folder / "model").is_dir():
        result["by_gradient"] = _of_gradients(args.folder)
        print(f"\n{gradient_table(result['by_gradient'], GROUPS)}")
    elif not args.smoke:
        print(f"gradients: skipped, {args.folder} has no model; see recipes/quickstart/build.py")
    result["hybrids"] = _of_hybrids()
    print(f"\n{hybrid_table(result['hybrids'])}")
    if args.output:
        write_json(args.output, result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="short rows, no model")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "quickstart", help="what build.py wrote")
    parser.add_argument("--rollouts", type=Path, default=ROLLOUTS, help="recorded trajectories, gzipped JSON lines")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    return parser.parse_args()


def _recorded_lengths(path: Path) -> list[int]:
    """Tokens that the policy wrote in each trial, tasks in order."""
    if not path.exists():
        print(f"lengths: skipped, {path.name} not found; give its path with --rollouts")
        return []
    with gzip.open(path, "rt") as file:
        recorded = sorted(map(json.loads, file), key=lambda trial: (trial["task_id"], trial["trial"]))
    encode = encoder(recorded, 8192)
    return [sum(len(tokens) - start for tokens, start, _ in turns_of(trial, encode)) for trial in recorded]


def _run(selection: TokenSelection, lengths: Sequence[int]) -> float:
    """Share of the tokens that cuts run on average."""
    return sum(float(selection.design(length).probabilities.sum()) for length in lengths) / sum(lengths)


def _solved(rising: Callable[[float], float], value: float, low: float) -> float:
    high = 1.0
    for _ in range(25):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return high


def _cuts(selection: TokenSelection, lengths: Sequence[int]) -> list[PrefixCut]:
    designs = [selection.design(length) for length in lengths]
    return [design for design in designs if isinstance(design, PrefixCut)]


def _described(way: Way, selection: TokenSelection, lengths: Sequence[int]) -> dict[str, Any]:
    return {
        "way": way.name,
        "budget": selection.budget,
        "run": _run(selection, lengths),
        "weight": max(1 / float(selection.design(length).probabilities.min()) for length in lengths),
        "weight_of_second": 1 / float(selection.design(2).probabilities[1]),
    }


def _of_lengths(way: Way, lengths: Sequence[int]) -> dict[str, Any]:
    selection = way.at_run(lengths, RUN)
    probabilities = np.concatenate([design.probabilities for design in _cuts(selection, lengths)])
    found = _described(way, selection, lengths) | {"unrelated": float((1 / probabilities - 1).mean())}
    for size in GROUPS:
        groups = [lengths[first : first + size] for first in range(0, len(lengths) - size + 1, size)]
        moments = [cut_moments(_cuts(selection, group), [np.ones((length, 1)) for length in group]) for group in groups]
        own, cross = (sum(values) for values in zip(*moments, strict=True))
        squares = sum(length**2 for group in groups for length in group)
        found[f"row alike, {size}"] = own / squares
        found[f"alike, sum 0, {size}"] = (own - cross / (size - 1)) / squares
        found[f"alike, {size}"] = (own + cross) / sum(sum(group) ** 2 for group in groups)
    return found


def _of_gradients(folder: Path) -> list[dict[str, Any]]:
    prompts = sampled(folder, prompts=16, completions=max(GROUPS))
    groups = {size: [group for prompt in prompts for group in prompt.groups(size)] for size in GROUPS}
    lengths = [len(row) for prompt in prompts for row in prompt.rows]
    whole = {size: sum(_square(sum(row.sum(0) for row in group)) for group in groups[size]) for size in GROUPS}
    rows = {size: [row for group in groups[size] for row in group] for size in GROUPS}
    found = []
    for way in WAYS:
        if way.min_prefix > 2:  # most of a guess, which has 3 tokens
            continue
        selection = way.at_run(lengths, RUN)
        line = _described(way, selection, lengths)
        for size in GROUPS:
            moments = [cut_moments(_cuts(selection, [len(row) for row in group]), group) for group in groups[size]]
            own, cross = (sum(values) for values in zip(*moments, strict=True))
            line |= {f"apart, {size}": own / whole[size], f"spread, {size}": (own + cross) / whole[size]}
        found.append(line)
    of_tokens = {size: sum(float(np.square(row).sum()) for row in rows[size]) / whole[size] for size in GROUPS}
    of_rows = {size: sum(_square(row.sum(0)) for row in rows[size]) / whole[size] for size in GROUPS}
    single = {size: sum(map(_single, rows[size])) / whole[size] for size in GROUPS}
    # Rows drawn with the chance RUN, then single tokens of them with 0.5: E[w^2] is the product.
    on_rows = {size: (single[size] + of_rows[size]) / RUN - of_rows[size] for size in GROUPS}
    for name, values, run in (
        ("urs", single, 1.0),
        ("urs on random rows", on_rows, RUN),
        ("squares of tokens", of_tokens, None),
        ("squares of rows", of_rows, None),
    ):
        found.append({"way": name, "run": run} | {f"apart, {size}": value for size, value in values.items()})
    return found


def _square(vector: np.ndarray) -> float:
    return float(np.square(vector).sum())


def _single(row: np.ndarray) -> float:
    return single_variance(TokenSelection(scheme="urs").design(len(row)).probabilities, row)


def _of_hybrids() -> list[dict[str, Any]]:
    """Each at the same run. Their laws of cuts are rpc's, with the default floor."""
    laws: dict[str, Callable[[Outcomes], Outcomes]] = {
        "rpc": lambda cuts: cuts,
        "rpc, each token of the prefix with 0.75": lambda cuts: thinned(cuts, 0.75),
        "rpc, each token of the prefix with 0.5": lambda cuts: thinned(cuts, 0.5),
        "rpc, and a later segment with 0.1": lambda cuts: with_segment(cuts, 0.1, 3),
        "rpc, and a later segment with 0.25": lambda cuts: with_segment(cuts, 0.25, 3),
        "rpc, and a later segment with 0.5": lambda cuts: with_segment(cuts, 0.5, 3),
    }
    found = []
    for name, law in laws.items():

        def drawn(budget: float, law: Callable[[Outcomes], Outcomes] = law) -> Outcomes:
            return law(prefixes(TokenSelection(scheme="rpc", budget=budget).design(PARTS).probabilities))

        def run(budget: float, drawn: Callable[[float], Outcomes] = drawn) -> float:
            outcomes = drawn(budget)
            return float(outcomes.chances @ outcomes.run) / PARTS

        outcomes = drawn(_solved(run, RUN, 0.01))
        line = {"way": name, "run": float(outcomes.chances @ outcomes.run) / PARTS, "drawings": len(outcomes.chances)}
        for label, weights in (("", outcomes.weights()), (", given run", outcomes.weights_given_run())):
            line[f"unrelated{label}"] = outcomes.variance(weights, alike=False)
            line[f"row alike{label}"] = outcomes.variance(weights, alike=True)
        found.append(line)
    return found


if __name__ == "__main__":
    main()
