"""Run by test_image_ranks.py, one process per rank: the dense path under DDP, where not every rank has images.

python -m tests.execution.image_ranks_script <folder>

Each rank saves its gradients, by case, as <folder>/rank<n>.pt.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import dta_plugin
from dta_plugin import TreeConfig
from tests.support.oracle import functional, gradients
from tests.support.vision_images import Rows
from tests.support.vision_models import SCENARIOS, rows_of, vision_model
from tests.support.widened import widened

FAMILY = "gemma4"  # all of whose parameters take part, as DDP expects
DENSE = TreeConfig(min_saving=0.99)


def side_by_side() -> Rows:
    """What no tree can have: two images without text between them."""
    rows = rows_of(FAMILY, SCENARIOS["two"])
    apart = [[token for token in row if token not in (94, 95)] for row in rows.sequences]
    return Rows([row[:6] + row[7:] for row in apart], rows.images)


ROWS = {name: rows_of(FAMILY, SCENARIOS[name]) for name in ("one", "two", "in some branches")}
TEXT, NOTHING = rows_of(FAMILY, [[[1, 2, 3]], [[4, 5]]]), Rows([], [])
# Rows of both ranks.
CASES: dict[str, tuple[list[Rows], TreeConfig]] = {
    "images and text": ([ROWS["in some branches"], TEXT], DENSE),
    "nothing and images": ([NOTHING, ROWS["two"]], DENSE),
    "no tree and a tree": ([side_by_side(), ROWS["one"]], TreeConfig(on_unsupported="dense", probe="off")),
}


def main(folder: Path) -> None:
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = distributed.get_rank()
    found = {}
    for name, (batches, config) in CASES.items():
        rows, model = batches[rank], DistributedDataParallel(vision_model(FAMILY))
        with widened():
            out = dta_plugin.sequence_logprobs(model, rows.sequences, config, 1.0, True, images=rows.images)
            assert out.report.executor == "dense" and out.entropies is not None
            loss = out.anchor + functional(out.logprobs, out.entropies)
            found[name] = gradients(model.module, loss)
    torch.save(found, folder / f"rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    assert "RANK" in os.environ
    main(Path(sys.argv[1]))
