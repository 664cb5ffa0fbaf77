"""Metrics of one micro-step: means and maxima over all ranks, exchanged in one collective, under `diffusion/`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dta_plugin.adapters.trl.protocols import DiffusionLike

Value = torch.Tensor | float


@dataclass(slots=True, eq=False)
class Statistics:
    """One rank's share. means: per name the sum of values and their number. maxima, sums: per name the value.

    Every rank has the same names in the same order, also where it has nothing to tell.
    """

    means: dict[str, tuple[Value, Value]] = field(default_factory=dict)
    sums: dict[str, Value] = field(default_factory=dict)
    maxima: dict[str, Value] = field(default_factory=dict)

    def log(self, trainer: DiffusionLike) -> None:
        """Add the metrics to those that TRL averages until it logs. A collective: every rank takes part."""
        totals = [total for total, _ in self.means.values()]
        weights = [weight for _, weight in self.means.values()]
        own = [*totals, *weights, *self.sums.values(), *self.maxima.values()]
        device = trainer.accelerator.device
        packed = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device).detach() for value in own])
        ranks = trainer.accelerator.gather(packed[None]).cpu()
        total, weight, sums, maxima = ranks.split([len(totals), len(weights), len(self.sums), len(self.maxima)], dim=1)
        found = {
            name: float(t / w)
            for name, t, w in zip(self.means, total.sum(dim=0), weight.sum(dim=0), strict=True)
            if w > 0
        }
        found |= dict(zip(self.sums, sums.sum(dim=0).tolist(), strict=True))
        found |= dict(zip(self.maxima, maxima.amax(dim=0).tolist() if self.maxima else [], strict=True))
        metrics = trainer._metrics["train" if trainer.model.training else "eval"]
        for name, value in found.items():
            metrics[f"diffusion/{name}"].append(value)


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
