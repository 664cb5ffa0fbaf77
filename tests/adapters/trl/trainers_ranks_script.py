"""Run by test_trainers_on_ranks.py under torchrun: trainers stock and with the flag, on every rank.

torchrun --nproc-per-node 2 -m tests.adapters.trl.trainers_ranks_script <model> <folder> <ddp or fsdp2>
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from tests.adapters.trl import all_trainers
from tests.adapters.trl.all_trainers import trainers_of_trl
from tests.adapters.trl.around_the_tree import FORWARDS, with_such_a_layer
from tests.adapters.trl.support import Run
from tests.adapters.trl.trainer_table import Outcome, compare, lora
from tests.support.recipes import fsdp_on_cpus

SFT, DPO, KTO = NAMES = [f"trl.trainer.{name}_trainer.{name.upper()}Trainer" for name in ("sft", "dpo", "kto")]
CASES = {"full": compare, "lora": lora, "unprobed": partial(compare, dta={"probe": "off"})}
# What the last layer does, and the first rank on which it does; under FSDP2, ranks with other code wait for each other.
AROUND = {"ddp": [*((kind, 0) for kind in FORWARDS), ("around the tree", 1)], "fsdp2": [(kind, 0) for kind in FORWARDS]}
Outcomes = dict[tuple[str, str], Outcome]


def trained(model: str, output: Path) -> Outcomes:
    known = trainers_of_trl()
    return {(name, case): whole(run(known[name], model, output)) for name in NAMES for case, run in CASES.items()}


def trained_around(model: str, output: Path, wrapper: str) -> Outcomes:
    """SFT of models with a layer that cannot run as a tree, on both ranks or on the second alone."""
    own, outcomes, trainer_class = all_trainers._model, {}, trainers_of_trl()[SFT]
    for kind, first in AROUND[wrapper]:
        is_whole = distributed.get_rank() < first
        build = own if is_whole else lambda folder, kind=kind: with_such_a_layer(own(folder), kind)
        with patch.object(all_trainers, "_model", build):
            outcomes[SFT, f"{kind}, {first}"] = whole(compare(trainer_class, model, output, {"probe": "off"}))
    return outcomes


def whole(outcome: Outcome | None) -> Outcome:
    assert outcome is not None
    return replace(outcome, stock=_whole(outcome.stock), flagged=_whole(outcome.flagged))


def _whole(run: Run) -> Run:
    """With the weights of all ranks."""
    assert all(isinstance(weight, DTensor) == ("fsdp2" in sys.argv) for weight in run.weights.values())
    weights = {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in run.weights.items()}
    return replace(run, weights=weights)


def main(model: str, folder: str, wrapper: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if wrapper == "fsdp2":
        fsdp_on_cpus()
    output = Path(folder)
    outcomes = trained(model, output) | trained_around(model, output, wrapper)
    torch.save(outcomes, output / f"rank{distributed.get_rank()}.pt")
    sys.stdout.flush()
    os._exit(0)  # as in tests/support/recipes.py


if __name__ == "__main__":
    main(*sys.argv[1:])
