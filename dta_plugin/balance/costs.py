"""What any set of sequences costs as a prefix tree, without building the tree.

In depth-first order a sequence adds the tokens it does not share with the one before it. So the cost of a run of
neighbours is a difference of prefix sums, and two runs that are not neighbours share what the smallest overlap between
them says. A partitioner can try thousands of sets per second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.cost import ModelCost
from dta_plugin.tree.trie import TokenSequence, depth_first, token_rows

# Linear layers, and one token's attention worth as much as a token's linear layers at a context of 8k, about what
# models of 1 to 8 billion parameters have.
TYPICAL = ModelCost(per_token=1.0, per_pair=1.0 / 8192, per_scored=0.0)
# What token budgets count: tree tokens.
TOKENS = ModelCost(per_token=1.0, per_pair=0.0, per_scored=0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Neighbours in depth-first order: places [start, stop)."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, eq=False)
class SequenceCosts:
    """Costs of sequences by their place in depth-first order. S = sequences; costs are float64.

    order: int64 [S] sequence of each place. path: [S] cost of each sequence alone. shared: [S] what it shares with the
    place before, 0 where a new tree begins. per_call: cost of a bin that is not empty, whatever it holds.
    """

    order: np.ndarray
    path: np.ndarray
    shared: np.ndarray
    per_call: float = 0.0
    _before: np.ndarray = field(init=False)  # [S + 1] cost of the places before, each without what it shares
    _least: np.ndarray = field(init=False)  # [levels, S] least of the 2 ** level entries of `shared` that begin there

    def __post_init__(self) -> None:
        object.__setattr__(self, "_before", np.concatenate([[0.0], np.cumsum(self.path - self.shared)]))
        levels = [self.shared]
        while 1 << len(levels) <= len(self):
            half = 1 << len(levels) - 1
            levels.append(np.minimum(levels[-1], np.append(levels[-1][half:], np.zeros(half))))
        object.__setattr__(self, "_least", np.stack(levels))

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[TokenSequence],
        cost: ModelCost = TYPICAL,
        first_scored: Sequence[int] | None = None,
        beside: ModelCost | None = None,
    ) -> SequenceCosts:
        """cost: FLOPs, or seconds, of a model's parts. first_scored: per sequence, where its completion begins.

        beside: those of another model, which runs every sequence by itself.

        A shared token is scored once if one of two neighbours scores it; of more sequences, perhaps more than once.
        """
        rows = token_rows(sequences)
        if first_scored is not None and len(first_scored) != len(rows):
            raise InvalidInputError(
                f"Got {len(first_scored)} entries of first_scored for {len(rows)} sequences. Expected one per sequence."
            )
        order, lcp = depth_first(rows)
        lengths = np.array([len(row) for row in rows], dtype=np.int64)[order]
        begin = lengths if first_scored is None else np.asarray(first_scored, dtype=np.int64)[order]

        both_score = np.maximum(begin, np.roll(begin, 1))

        def alone(tokens: np.ndarray, begin: np.ndarray) -> np.ndarray:
            return cost.path_flops(tokens) + cost.per_scored * np.maximum(tokens - begin, 0)

        path = alone(lengths, begin)
        if beside is not None:
            path += beside.path_flops(lengths)
        return cls(order, path, alone(lcp, both_score), cost.per_call)

    def __len__(self) -> int:
        return len(self.order)

    @property
    def common_prefix(self) -> float:
        """Cost of what all sequences share: a system prompt, a chat template's first tokens."""
        return float(self.shared[1:].min()) if len(self) > 1 else 0.0

    @property
    def fixed_cost(self) -> float:
        """What every bin pays that is not empty, whatever it gets: a model call and the common prefix."""
        return self.per_call + self.common_prefix

    def without_fixed_cost(self) -> SequenceCosts:
        """The same sequences without that: what balancing can change."""
        shared = self.shared - self.common_prefix
        shared[0] = 0.0
        return SequenceCosts(self.order, self.path - self.common_prefix, shared)

    def subset(self, places: np.ndarray) -> SequenceCosts:
        """Some of the sequences. places: int64 [R], ascending, at least one."""
        shared = np.append(0.0, self.overlap(places[:-1] + 1, places[1:]))
        return SequenceCosts(self.order[places], self.path[places], shared, self.per_call)

    @property
    def total(self) -> float:
        """Cost of all sequences as one tree, in one call."""
        return self.per_call + float(self._before[-1])

    def nodes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per node of the trees, float64 [nodes]: cost of its path to where it begins and ends, and of all below it."""
        starts, stops = np.array(sorted(subtrees(self.shared[1:].tolist(), len(self))), dtype=np.int64).T
        begin = np.maximum(self.shared[starts], np.append(self.shared, 0.0)[stops])
        end = self.path[starts]
        inner = stops - starts > 1
        end[inner] = self.overlap(starts[inner] + 1, stops[inner] - 1)
        return begin, end, self._before[stops] - self._before[starts] + self.shared[starts] - end

    @property
    def trees(self) -> list[Run]:
        """The runs that share nothing with each other."""
        starts = np.flatnonzero(self.shared == 0).tolist()
        return [Run(a, b) for a, b in zip(starts, [*starts[1:], len(self)], strict=True)]

    def overlap(self, stop: np.ndarray, start: np.ndarray) -> np.ndarray:
        """What a run that ends at `stop` shares with a later one that begins at `start`, elementwise: int64 [...]."""
        level = np.frexp((start - stop + 1).astype(np.float64))[1] - 1
        return np.minimum(self._least[level, stop], self._least[level, start + 1 - (1 << level)])

    def of_run(self, run: Run) -> float:
        return self.per_call + float(self._before[run.stop] - self._before[run.start] + self.shared[run.start])

    def of_places(self, places: np.ndarray) -> float:
        """Cost of a bin with these sequences; of none: 0. places: int64 [R], ascending."""
        if not len(places):
            return 0.0
        return self.per_call + float(self.path[places].sum() - self.overlap(places[:-1] + 1, places[1:]).sum())

    def longest_within(self, run: Run, budget: float) -> Run:
        """The run's first part that costs at most `budget`, cut where little is shared; empty if one is too much."""
        most = self._before[run.start] - self.shared[run.start] + budget - self.per_call
        stop = min(int(np.searchsorted(self._before, most, side="right")) - 1, run.stop)
        if stop <= run.start:
            return Run(run.start, run.start)
        if stop == run.stop:
            return run
        # A cut costs what both sides share; giving up some of the budget costs too, though others may use it.
        near = np.arange(max(run.start + 1, stop - (stop - run.start) // 4), stop + 1)
        price = self.shared[near] + 0.5 * (most - self._before[near])
        return Run(run.start, int(near[price.argmin()]))


def loads(costs: SequenceCosts, bins: Iterable[Sequence[int]]) -> list[float]:
    """Cost of each bin of sequences as one tree."""
    place = np.empty(len(costs), dtype=np.int64)
    place[costs.order] = np.arange(len(costs))
    return [costs.of_places(np.sort(place[list(rows)])) for rows in bins]


def subtrees(shared: list[float], count: int) -> set[tuple[int, int]]:
    """Neighbours [start, stop) that share more with each other than with those around them, and every one alone.

    They are the nodes of the tree of `count` sequences. shared: [count - 1] what each shares with the next.
    """
    found = {(place, place + 1) for place in range(count)}
    opened: list[tuple[float, int]] = []  # what is shared within, first place
    for place, least in enumerate([*shared, -1.0] if shared else []):
        start = place
        while opened and opened[-1][0] > least:
            start = opened.pop()[1]
            found.add((start, place + 1))
        if not opened or opened[-1][0] < least:
            opened.append((least, start))
    return found
