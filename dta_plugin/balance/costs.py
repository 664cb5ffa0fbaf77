"""What any set of sequences costs as a prefix tree, without building the tree.

In depth-first order a sequence adds the tokens it does not share with the one before it. So the cost of a run of
neighbours is a difference of prefix sums, and two runs that are not neighbours share what the smallest overlap between
them says. A partitioner can try thousands of sets per second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.cost import ModelCost
from dta_plugin.tree.trie import TokenSequence, depth_first, token_rows

# Linear layers, and one token's attention worth as much as a token's linear layers at a context of 8k, about what
# models of 1 to 8 billion parameters have.
TYPICAL = ModelCost(per_token=1.0, per_pair=1.0 / 8192, per_scored=0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Neighbours in depth-first order: ranks [start, stop)."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, eq=False)
class SequenceCosts:
    """Costs of sequences by rank, their place in depth-first order. S = sequences; costs are float64.

    order: int64 [S] sequence of each rank. path: [S] cost of each sequence alone. shared: [S] what it shares with the
    rank before, 0 where a new tree begins.
    """

    order: np.ndarray
    path: np.ndarray
    shared: np.ndarray
    _before: np.ndarray = field(init=False)  # [S + 1] cost of the ranks before, each without what it shares

    def __post_init__(self) -> None:
        object.__setattr__(self, "_before", np.concatenate([[0.0], np.cumsum(self.path - self.shared)]))

    @classmethod
    def of(
        cls, sequences: Sequence[TokenSequence], model: ModelCost = TYPICAL, first_scored: Sequence[int] | None = None
    ) -> SequenceCosts:
        """model: FLOPs, or seconds, of a model's parts. first_scored: per sequence, where its completion begins.

        A shared token that is scored in one sequence and not in another counts as in the one that comes first.
        """
        rows = token_rows(sequences)
        if first_scored is not None and len(first_scored) != len(rows):
            raise InvalidInputError(
                f"Got {len(first_scored)} entries of first_scored for {len(rows)} sequences. Expected one per sequence."
            )
        order, lcp = depth_first(rows)
        lengths = np.array([len(row) for row in rows], dtype=np.int64)[order]
        begin = lengths if first_scored is None else np.asarray(first_scored, dtype=np.int64)[order]

        def cost(tokens: np.ndarray) -> np.ndarray:
            return model.path_flops(tokens) + model.per_scored * np.maximum(tokens - begin, 0)

        return cls(order, cost(lengths), cost(lcp))

    def __len__(self) -> int:
        return len(self.order)

    @property
    def trunk(self) -> float:
        """Cost of what all sequences share: a system prompt, a chat template's first tokens."""
        return float(self.shared[1:].min()) if len(self) > 1 else 0.0

    def without_trunk(self) -> SequenceCosts:
        """The same sequences without what all of them share, which every bin pays whatever it gets."""
        shared = self.shared - self.trunk
        shared[0] = 0.0
        return SequenceCosts(self.order, self.path - self.trunk, shared)

    @property
    def total(self) -> float:
        """Cost of all sequences as one tree."""
        return float(self._before[-1])

    @property
    def trees(self) -> list[Run]:
        """The runs that share nothing with each other."""
        starts = np.flatnonzero(self.shared == 0).tolist()
        return [Run(a, b) for a, b in zip(starts, [*starts[1:], len(self)], strict=True)]

    def of_run(self, run: Run) -> float:
        return float(self._before[run.stop] - self._before[run.start] + self.shared[run.start])

    def of_runs(self, runs: Sequence[Run]) -> float:
        """Cost of disjoint runs as one tree."""
        ordered = sorted(runs, key=lambda run: run.start)
        overlaps = (self.shared[a.stop : b.start + 1].min() for a, b in pairwise(ordered))
        return sum(map(self.of_run, ordered)) - float(sum(overlaps))

    def longest_within(self, run: Run, budget: float) -> Run:
        """The run's first part that costs at most `budget`, cut where little is shared; empty if one is too much."""
        most = self._before[run.start] - self.shared[run.start] + budget
        stop = min(int(np.searchsorted(self._before, most, side="right")) - 1, run.stop)
        if stop <= run.start:
            return Run(run.start, run.start)
        if stop == run.stop:
            return run
        # A cut costs what both sides share; giving up some of the budget costs too, though others may use it.
        near = np.arange(max(run.start + 1, stop - (stop - run.start) // 4), stop + 1)
        price = self.shared[near] + 0.5 * (most - self._before[near])
        return Run(run.start, int(near[price.argmin()]))
