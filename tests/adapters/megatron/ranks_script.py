"""Run by test_ranks.py, one process per rank: both engines over the same updates, for every way to use two ranks.

python -m tests.adapters.megatron.ranks_script <folder> <name in LAYOUTS or SPECIAL> ...

Each rank saves, by these names, the differences per step and the plugin's metrics as <folder>/rank<n>.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import distributed

from dta_plugin.adapters.verl_plugin.megatron import engine as engine_module
from dta_plugin.config import TreeConfig
from dta_plugin.errors import UnsupportedError
from tests.adapters.megatron.models import save_models
from tests.adapters.megatron.support import RECOMPUTATION, Setup, build, difference, differences, inferred, train
from tests.adapters.verl.support import Step, mini_batch

TENSOR = {"tensor_model_parallel_size": 2}
PIPELINE = {"pipeline_model_parallel_size": 2}
EXPERTS = {"expert_model_parallel_size": 2}
LAYOUTS = {
    "tensor": Setup(engine=TENSOR | {"sequence_parallel": False}, transformer={"sequence_parallel": False}),
    "sequence": Setup(engine=TENSOR),
    "sequence recomputed": Setup("tied", engine=TENSOR, transformer=RECOMPUTATION["full"]),
    "experts": Setup("moe", engine=TENSOR),
    "expert parallel": Setup("moe", engine=EXPERTS),
    "pipeline": Setup(engine=PIPELINE),
    "pipeline recomputed": Setup(engine=PIPELINE, transformer=RECOMPUTATION["selective"]),
    "virtual pipeline": Setup("deep", engine=PIPELINE | {"virtual_pipeline_model_parallel_size": 2}),
    "data": Setup(),
    "padded": Setup(packed=False, engine=TENSOR),
}
STEPS = [
    Step(),
    Step(shape="turns"),
    Step(shape="corners", temperature=None),
    Step(dynamic=False),
    Step(shape="turns", budget=40, stock_budget=90),
]


def disagreeing_data(folder: Path) -> dict[str, Any]:
    """Only rank 1 replays a router."""
    engine = build(Setup(), folder, tree=True)
    data = mini_batch(Step())
    if distributed.get_rank() == 1:
        data["routed_experts"] = torch.zeros(len(data), 1)
    return {"error": _refusal(engine, data)}


def disagreeing_pipeline(folder: Path) -> dict[str, Any]:
    """Only the second stage has a layer that is not covered; then both take verl's own path."""
    setup, step = LAYOUTS["pipeline"], Step(config=TreeConfig(on_unsupported="dense"))
    stock = train(build(setup, folder, tree=False), [step])
    with pytest.MonkeyPatch.context() as patch:
        if distributed.get_rank() == 1:
            patch.setattr(engine_module, "engine_obstacle", lambda _: "layer 2 attends by GatedDeltaNet")
        engine = build(setup, folder, tree=True)
    error = _refusal(engine, mini_batch(step, share=(0, 1)))
    return {"error": error, "dense": difference(train(engine, [step])[0], stock[0])}


def exported(folder: Path) -> dict[str, Any]:
    """Whether the weights that ranks give to a rollout are those that they have loaded, and change with an update."""
    found = {}
    for name in ("tensor", "pipeline", "virtual pipeline", "expert parallel"):
        setup = LAYOUTS[name]
        loaded = load_file(folder / setup.model / "model.safetensors")
        engine = build(setup, folder, tree=True)
        before = _exported(engine)
        train(engine, STEPS[:1])
        after = _exported(engine)
        found[name] = {
            "same": before.keys() == loaded.keys() and all(torch.equal(before[n], loaded[n]) for n in loaded),
            "unmoved": [n for n in loaded if torch.equal(after[n], loaded[n])],
        }
        parallel_state.destroy_model_parallel()
    return found


def _exported(engine: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in engine.get_per_tensor_param()[0]}


def _refusal(engine: Any, data: TensorDict) -> str:
    try:
        inferred(engine, data)
    except UnsupportedError as found:
        return str(found)
    return ""


SPECIAL = {"exported": exported, "disagreeing data": disagreeing_data, "disagreeing pipeline": disagreeing_pipeline}


def main() -> None:
    folder, jobs = Path(sys.argv[1]), sys.argv[2:]
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    if rank == 0:
        save_models(folder)
    distributed.barrier()
    results: dict[str, Any] = {}
    for job in jobs:
        if job in SPECIAL:
            results[job] = SPECIAL[job](folder)
        else:
            found, steps = differences(LAYOUTS[job], STEPS, folder)
            results[job] = {"differences": found, "metrics": [step.get("dta") for step in steps]}
        parallel_state.destroy_model_parallel()
    torch.save(results, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
