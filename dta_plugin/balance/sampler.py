"""`SiblingSampler`: an order of a data set in which the members of a batch share their prefixes.

Siblings, neighbours in depth-first order that share a good part of their cost, form families; a family larger than a
batch is cut where little is shared. Each epoch deals the families out to batches anew, at random: a batch takes the
largest family that fits, and cuts one only where none does. Batches that run at the same time on different ranks cost
alike: they are neighbours in the order of their costs. All of it is linear in the number of sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from torch.utils.data import Sampler

from dta_plugin.balance.costs import TYPICAL, Run, SequenceCosts
from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.cost import ModelCost
from dta_plugin.tree.trie import TokenSequence


class SiblingSampler(Sampler[int]):
    """Indices of sequences; every `batch_size` in a row are a batch, with siblings next to each other.

    Args:
        sequences: token ids, ints [len], of each example of the data set; they are not kept.
        batch_size: examples in a batch on one rank.
        world_size: ranks; batches are dealt to them in turn, as accelerate does, so that rank r gets batch
            ``i * world_size + r`` in step i.
        seed: an epoch's order is a function of seed and epoch.
        shuffle: without it the order is a function of neither.
        drop_last: leave out, in each epoch others, the sequences that would make a smaller last batch.
        least_shared: neighbours are siblings if what they share, beyond what all sequences do, is at least this part,
            in [0, 1], of what the cheaper one costs. The lower, the more is shared and the less random batches are.
        cost: what tokens and pairs cost, see `models.introspection.model_cost`; any unit.

    Raises:
        InvalidInputError: no sequences, sizes below 1, or least_shared outside [0, 1].
    """

    def __init__(
        self,
        sequences: Sequence[TokenSequence],
        batch_size: int,
        *,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        least_shared: float = 0.1,
        cost: ModelCost = TYPICAL,
    ) -> None:
        if not len(sequences) or batch_size < 1 or world_size < 1:
            raise InvalidInputError(
                f"Got {len(sequences)} sequences, batch_size={batch_size}, world_size={world_size}. Expected at least "
                "1 of each."
            )
        if not 0 <= least_shared <= 1:
            raise InvalidInputError(f"Got least_shared={least_shared}. Expected a share in [0, 1].")
        self.batch_size, self.world_size = batch_size, world_size
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.epoch = 0
        self._costs = SequenceCosts.from_sequences(sequences, cost)
        self._families = _sibling_runs(self._costs.without_fixed_cost(), batch_size, least_shared)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        count = len(self._costs)
        return count - count % self.batch_size if self.drop_last else count

    def __iter__(self) -> Iterator[int]:
        for batch in self.batches():
            for run in batch:
                yield from self._costs.order[run.start : run.stop].tolist()

    def batches(self) -> list[list[Run]]:
        """The epoch's batches, in order, as runs of depth-first order."""
        generator = np.random.default_rng((self.seed, self.epoch)) if self.shuffle else None
        batches = _dealt_to_batches(self._families, self.batch_size, generator)
        last = [] if sum(map(len, batches[-1])) == self.batch_size else [batches.pop()]
        return self._in_turns(batches, generator) + ([] if self.drop_last else last)

    def _cost_of(self, batch: list[Run]) -> float:
        return self._costs.of_places(np.concatenate([np.arange(run.start, run.stop) for run in batch]))

    def _in_turns(self, batches: list[list[Run]], generator: np.random.Generator | None) -> list[list[Run]]:
        """Full batches such that each turn of `world_size` ones costs alike; turns in random order, short one last."""
        over = len(batches) % self.world_size
        if over and generator is not None:  # in each epoch others, since a short turn may be left out
            batches = [batches[index] for index in generator.permutation(len(batches))]
        short = [batches[len(batches) - over :]] if over else []
        batches = batches[: len(batches) - over]
        if self.world_size > 1:
            batches = sorted(batches, key=self._cost_of, reverse=True)
        turns = [batches[i : i + self.world_size] for i in range(0, len(batches), self.world_size)]
        order = range(len(turns)) if generator is None else generator.permutation(len(turns))
        return [batch for turn in [*(turns[i] for i in order), *short] for batch in turn]


def _sibling_runs(costs: SequenceCosts, most: int, least_shared: float) -> list[Run]:
    """Runs of siblings, of at most `most` sequences each."""
    cheaper = np.minimum(costs.path[1:], costs.path[:-1])
    parts = (costs.shared[1:] < least_shared * cheaper) | (costs.shared[1:] <= 0)
    starts = [0, *(np.flatnonzero(parts) + 1).tolist(), len(costs)]
    families = []
    for start, stop in pairwise(starts):
        while stop - start > most:
            near = np.arange(start + most, start + most // 2, -1)  # of equal cuts, the one that leaves most together
            cut = int(near[costs.shared[near].argmin()])
            families.append(Run(start, cut))
            start = cut
        families.append(Run(start, stop))
    return families


def _dealt_to_batches(families: list[Run], batch_size: int, generator: np.random.Generator | None) -> list[list[Run]]:
    """Families in batches of exactly `batch_size`, the last one perhaps smaller; each takes the largest that fits."""
    order = range(len(families)) if generator is None else generator.permutation(len(families))
    waiting: list[list[Run]] = [[] for _ in range(batch_size + 1)]  # by size
    for index in order:
        waiting[len(families[index])].append(families[index])
    left = sum(map(len, families))
    batches = []
    while left:
        batch: list[Run] = []
        room = min(batch_size, left)
        while room:
            run = next((waiting[size].pop() for size in range(room, 0, -1) if waiting[size]), None)
            if run is None:  # only larger ones are left: cut the smallest
                whole = next(waiting[size].pop() for size in range(room + 1, batch_size + 1) if waiting[size])
                run, rest = Run(whole.start, whole.start + room), Run(whole.start + room, whole.stop)
                waiting[len(rest)].append(rest)
            batch.append(run)
            room -= len(run)
            left -= len(run)
        batches.append(sorted(batch, key=lambda run: run.start))
    return batches
