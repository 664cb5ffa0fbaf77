"""What updates of diffusion LMs tell, and how what micro-batches and ranks have seen is put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Value = torch.Tensor | float
Gather = Callable[[torch.Tensor], torch.Tensor]
"""float32 [N] of this rank -> [ranks, N]; a collective."""

PREFIX = "diffusion/"
SHARES = 4  # buckets of the histogram of mask levels


_BUCKETS = [f"masked_{100 * i // SHARES}_to_{100 * (i + 1) // SHARES}" for i in range(SHARES)]


@dataclass(slots=True, eq=False)
class Statistics:
    """One rank's share. means: per name the sum of values and their number. maxima, sums: per name the value.

    Names are those of `training.metrics` without their prefix. Every rank has the same in the same order, also where it
    has nothing to tell.
    """

    means: dict[str, tuple[Value, Value]] = field(default_factory=dict)
    sums: dict[str, Value] = field(default_factory=dict)
    maxima: dict[str, Value] = field(default_factory=dict)

    def __add__(self, other: Statistics) -> Statistics:
        """Of both; they have the same names."""
        return Statistics(
            {name: (total + other.means[name][0], n + other.means[name][1]) for name, (total, n) in self.means.items()},
            {name: value + other.sums[name] for name, value in self.sums.items()},
            {name: max(value, other.maxima[name]) for name, value in self.maxima.items()},
        )

    def over_ranks(self, gather: Gather, device: torch.device) -> dict[str, float]:
        """Per prefixed name the value of all ranks, exchanged in one collective; no mean of nothing."""
        totals = [total for total, _ in self.means.values()]
        weights = [weight for _, weight in self.means.values()]
        own = [*totals, *weights, *self.sums.values(), *self.maxima.values()]
        packed = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device).detach() for value in own])
        ranks = gather(packed).cpu()
        total, weight, sums, maxima = ranks.split([len(totals), len(weights), len(self.sums), len(self.maxima)], dim=1)
        found = {
            name: float(t / w)
            for name, t, w in zip(self.means, total.sum(dim=0), weight.sum(dim=0), strict=True)
            if w > 0
        }
        found |= dict(zip(self.sums, sums.sum(dim=0).tolist(), strict=True))
        found |= dict(zip(self.maxima, maxima.amax(dim=0).tolist() if self.maxima else [], strict=True))
        return {f"{PREFIX}{name}": value for name, value in found.items()}


def run_statistics(ran: torch.Tensor, lengths: torch.Tensor, d: torch.Tensor) -> Statistics:
    """What every objective tells. ran: bool [B]. lengths: [B]. d: log-ratios, any shape, of what has run."""
    size = d.abs()
    statistics = Statistics(
        means={"mean_abs_d": (size.sum(), size.numel())},
        sums={
            "rows_kept": ran.sum(),
            "rows_skipped": (~ran).sum(),
            "scored_tokens": lengths[ran].sum(),
        },
        maxima={"max_abs_d": size.max() if size.numel() else 0.0},
    )
    if lengths.device.type == "cuda":
        statistics.maxima["peak_memory_gib"] = torch.cuda.max_memory_allocated(lengths.device) / 2**30
    return statistics


def mask_histogram(counts: list[int]) -> dict[str, tuple[Value, Value]]:
    """Means of how many samples are in each of `SHARES` buckets of the share of masked tokens."""
    return {name: (count, sum(counts)) for name, count in zip(_BUCKETS, counts, strict=True)}
