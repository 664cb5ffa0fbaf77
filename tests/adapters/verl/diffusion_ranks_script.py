"""Run by test_diffusion_ranks.py, one process per rank: gradients of two ranks against one graph of all rows.

python -m tests.adapters.verl.diffusion_ranks_script <folder>

Each rank saves, per job, the difference and its share of what verl keeps, as <folder>/rank<n>.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from tests.adapters.verl.diffusion_support import (
    advantages_of,
    carry_terms,
    distance_gradient,
    engine_gradient,
    engine_of,
    graph_gradient,
    largest_difference,
    mini_batch,
    norm,
    save_diffusion_model,
    settings,
)


def compared(folder: Path, advantages: torch.Tensor, off_policy: bool, cut: dict[str, int]) -> dict[str, Any]:
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    engine = engine_of(folder, settings())
    data = mini_batch(rank, ranks, advantages=advantages, **cut)
    old = None
    if off_policy:
        shares: list[Any] = [None] * ranks
        distributed.all_gather_object(shares, carry_terms(engine, data, moved=0.9))
        old = torch.cat(shares)
    expected, loss = graph_gradient(folder, mini_batch(advantages=advantages), old)
    found, outputs = engine_gradient(engine, data)
    return {
        "difference": largest_difference(found, expected),
        "loss": (sum(outputs["loss"]), loss),
        "metrics": {name: metric.aggregate() for name, metric in outputs["metrics"].items()},
    }


def held(folder: Path, advantages: torch.Tensor) -> dict[str, Any]:
    """GDSD off-policy: rows without advantage count, on a rank that has no others, too."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    engine, data = engine_of(folder, settings(objective="gdsd")), mini_batch(rank, ranks, advantages=advantages)
    shares: list[Any] = [None] * ranks
    distributed.all_gather_object(shares, carry_terms(engine, data, moved=0.9))
    expected = distance_gradient(folder, mini_batch(advantages=advantages), torch.cat(shares))
    found, outputs = engine_gradient(engine, data)
    return {
        "difference": largest_difference(found, expected),
        "metrics": {name: metric.aggregate() for name, metric in outputs["metrics"].items()},
    }


def nothing(folder: Path) -> dict[str, Any]:
    """No row has an advantage: both ranks run, and the gradient is 0."""
    data = mini_batch(distributed.get_rank(), distributed.get_world_size(), rows=4, advantages=torch.zeros(16))
    found, outputs = engine_gradient(engine_of(folder, settings()), data)
    return {
        "norm": norm(found),
        "metrics": {name: metric.aggregate() for name, metric in outputs["metrics"].items()},
    }


def main() -> None:
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    if distributed.get_rank() == 0:
        save_diffusion_model(folder / "model")
    distributed.barrier()
    one_sided = advantages_of(16)
    one_sided[8:] = 0.0
    results = {
        "both": compared(folder / "model", advantages_of(16), True, {"budget": 90}),
        "one_sided": compared(folder / "model", one_sided, False, {"rows": 2}),
        "held": held(folder / "model", one_sided),
        "nothing": nothing(folder / "model"),
    }
    torch.save(results, folder / f"rank{distributed.get_rank()}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
