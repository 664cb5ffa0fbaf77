"""Run by test_ranks.py, one process per rank: both engines over the same steps, ranks that disagree, and drawn tokens.

python -m tests.adapters.verl.ranks_script <folder> <strategy:full|lora> ...

Each rank saves, by these texts, the differences per step and the plugin's metrics as <folder>/rank<n>.pt.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from verl.utils import tensordict_utils as tu

from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError, UnsupportedError
from tests.adapters.verl import critics, pictures, recurrent
from tests.adapters.verl.steps import DYNAMIC, SMALL_BUDGET, STATIC, STREAMED, TEMPERATURES
from tests.adapters.verl.support import (
    Setup,
    Step,
    actor_config,
    build,
    difference,
    differences,
    log_probs,
    mini_batch,
    nested,
    save_model,
    train,
)
from tests.adapters.verl.updates import sampled, updated, without_regularisers

STEPS = {
    "fsdp:full": [*DYNAMIC, *STATIC, *SMALL_BUDGET],
    "fsdp:lora": [*DYNAMIC, *TEMPERATURES],
    "fsdp2:full": [*DYNAMIC, *STATIC, *SMALL_BUDGET, *STREAMED],
    "fsdp2:lora": [*DYNAMIC, *TEMPERATURES, *STREAMED],
}


def disagreeing(folder: Path) -> dict[str, Any]:
    """Only rank 1 replays a router: both fall back, or both raise. And the gate, which adds up what both save."""
    engine = build(Setup(), folder, tree=True)
    step = Step(shape="turns")
    expected = log_probs(engine, mini_batch(step))["log_probs"]
    data = mini_batch(step)
    if distributed.get_rank() == 1:
        data["routed_experts"] = torch.zeros(len(data), 1)
    engine.configure(TreeConfig(on_unsupported="dense"))
    dense = log_probs(engine, data.copy())["log_probs"]
    rows = zip(expected.unbind(), dense.unbind(), data["prompts"].offsets().diff().tolist(), strict=True)
    worst = max((a - b)[begin - 1 : -1].abs().max().item() for a, b, begin in rows)
    engine.configure(TreeConfig())
    try:
        log_probs(engine, data.copy())
        error = ""
    except UnsupportedError as found:
        error = str(found)
    ran = []
    for min_saving in (0.1, 0.9):
        engine.configure(TreeConfig(min_saving=min_saving))
        log_probs(engine, mini_batch(step))
        ran.append(engine._dta_calls)
    return {"difference": worst, "error": error, "calls": ran}


def selecting(folder: Path) -> dict[str, Any]:
    """Rank 1 has nothing to learn from; then only rank 1 wants all log-probs, which selection cannot give."""
    engine = build(Setup(), folder, tree=True)
    data, config = sampled(engine, Step(extra={"calculate_entropy": False})), TreeConfig(token_selection="rpc")
    if distributed.get_rank() == 1:
        data["advantages"] = nested([row * 0 for row in data["advantages"].unbind()])
    update = updated(engine, data, config, without_regularisers(actor_config(Step())))
    if distributed.get_rank() == 1:
        tu.assign_non_tensor(data, return_model_output=True)
    try:
        updated(engine, data, config)
        error = ""
    except InvalidInputError as found:
        error = str(found)
    return {"metrics": update.metrics, "gradient": update.gradient, "error": error}


def with_critic(folder: Path) -> dict[str, Any]:
    """Values and updates of a critic, different trees on each rank."""
    steps = [*DYNAMIC, *STATIC]
    found = {}
    for strategy in ("fsdp", "fsdp2"):
        tree, stock = (
            critics.train(critics.build_critic(Setup(strategy), folder / "critic", tree), steps)
            for tree in (True, False)
        )
        found[strategy] = [critics.difference(a, b) for a, b in zip(tree, stock, strict=True)]
    return {"differences": found, "metrics": [step["dta"] for step in tree]}


def with_recurrent_layers(folder: Path, further: bool = False) -> dict[str, Any]:
    """Qwen3.5, checkpointed; further: more steps, in chunks, too, and LoRA by the other strategy.

    verl's own path keeps packed rows apart, as it does with kernels.
    """
    if distributed.get_rank() == 0:
        recurrent.save_recurrent(folder / "qwen3_5")
    distributed.barrier()
    steps = [recurrent.PACKED_ROWS[0], recurrent.PADDED_ROWS[0]]
    more = [recurrent.PACKED_ROWS[1], recurrent.STREAMED] if further else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrent.modeling_qwen3_5, "torch_chunk_gated_delta_rule", recurrent.rule_that_takes_no_rows)
        found, results = differences(Setup("fsdp2"), [*steps, *more], folder / "qwen3_5")
        if further:
            found += differences(Setup("fsdp", lora=True, checkpointing=False), steps, folder / "qwen3_5")[0]
    return {"differences": found, "metrics": [step["dta"] for step in results]}


def with_pictures(folder: Path, family: str, strategies: Sequence[str] = ("fsdp2",)) -> dict[str, Any]:
    """Different pictures on each rank; on one of them in some micro-batches only; on one of them none at all."""
    if distributed.get_rank() == 0:
        pictures.save_vision(folder / family, family)
    distributed.barrier()
    common = Step(shape="pictures", position_rows=4, remove_padding=False, budget=500)
    small = replace(common, budget=60, stock_budget=500, temperature=None)
    steps = [common, replace(small, shape="one-sided"), small]
    found, weights = [], []
    for strategy in strategies:
        stock, tree = (build(Setup(strategy), folder / family, tree=tree) for tree in (False, True))
        expected, results = train(stock, steps), train(tree, steps)
        found += [difference(a, b) for a, b in zip(results, expected, strict=True)]
        weights.append((pictures.weights(tree) - pictures.weights(stock)).abs().max().item())
    return {"differences": [*found, *weights], "metrics": [step["dta"] for step in results]}


def main() -> None:
    folder, jobs = Path(sys.argv[1]), sys.argv[2:]
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    if rank == 0:
        critics.save_critic(save_model(folder / "model"))
    distributed.barrier()
    results: dict[str, Any] = {}
    special = {
        "disagreeing": disagreeing,
        "selecting": selecting,
        "critic": with_critic,
        "recurrent": with_recurrent_layers,
        "recurrent further": functools.partial(with_recurrent_layers, further=True),
        "pictures": functools.partial(with_pictures, family="qwen3_vl"),
        "pictures further": functools.partial(with_pictures, family="qwen3_5", strategies=("fsdp", "fsdp2")),
    }
    for job in jobs:
        if job in special:
            results[job] = special[job](folder / "model")
            continue
        strategy, _, kind = job.partition(":")
        found, steps = differences(Setup(strategy, lora=kind == "lora"), STEPS[job], folder / "model")
        results[job] = {"differences": found, "metrics": [step["dta"] for step in steps]}
    torch.save(results, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
