"""What leaves an engine and comes back: weights for rollouts, checkpoints, offloaded parameters and optimizer states.

All of it is verl's, with trees as without. With Megatron's distributed optimizer, which is verl's default: with the
plain one verl exports and saves nothing (its `load_megatron_model_to_gpu` reads a buffer that there is not).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoConfig, AutoModelForCausalLM
from verl.utils.megatron_utils import (
    load_megatron_model_to_gpu,
    load_megatron_optimizer,
    offload_megatron_model_to_cpu,
    offload_megatron_optimizer,
)

from tests.adapters.megatron.support import Setup, build, difference, inferred, train, weights
from tests.adapters.verl.support import Step, mini_batch, response_rows

TOLERANCE = 1e-5


def exported(engine: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in engine.get_per_tensor_param()[0]}


@pytest.mark.parametrize("model", ["qwen3", "qwen2", "tied", "moe"])
def test_exported_weights(model: str, folder: Path, tmp_path: Path) -> None:
    """Names and values are stock's; after updates as trees, a Hugging Face model of them is the engine's."""
    setup = Setup(model)
    engine = build(setup, folder, tree=True)
    before, stock = exported(engine), exported(build(setup, folder, tree=False))
    assert list(before) == list(stock)
    assert all(torch.equal(before[name], stock[name]) for name in stock)
    assert before.keys() == load_file(folder / model / "model.safetensors").keys()
    train(engine, [Step(), Step(shape="turns")])
    after = exported(engine)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    AutoConfig.from_pretrained(folder / model).save_pretrained(tmp_path)
    save_file(after, tmp_path / "model.safetensors", metadata={"format": "pt"})
    sampler = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    data = mini_batch(Step(shape="turns", temperature=1.0))
    found = response_rows(data, inferred(engine, data)["log_probs"]).unbind()
    for ids, row in zip(data["input_ids"].unbind(), found, strict=True):
        with torch.no_grad():
            log_probs = sampler(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        assert (row - log_probs[-len(row) :]).abs().max() < TOLERANCE


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "hugging face"])
def test_checkpoints(sharded: bool, folder: Path, tmp_path: Path) -> None:
    """Of what either engine has saved both make the same next update; trees leave nothing in a checkpoint."""
    saved = {}
    for kind, tree in (("stock", False), ("tree", True)):
        engine = _updated(folder, tree, sharded, Step())
        engine.save_checkpoint(str(tmp_path / kind), global_step=1)
        saved[kind] = weights(engine).clone()
    assert _contents(tmp_path / "tree") == _contents(tmp_path / "stock")
    files = [file for file in (tmp_path / "tree").rglob("*") if file.is_file()]
    assert not [file for file in files if b"dta_plugin" in file.read_bytes()]
    for kind, expected in saved.items():
        results = []
        for tree in (False, True):
            engine = _updated(folder, tree, sharded, Step(shape="corners"))  # as Megatron's load needs without Apex
            assert not torch.equal(weights(engine), expected)
            with torch.no_grad():  # which Megatron leaves out, for it expects parameters of half precision
                engine.load_checkpoint(str(tmp_path / kind), del_local_after_load=False)
            assert torch.equal(weights(engine), expected)
            results += train(engine, [Step(shape="turns")])
        assert difference(results[1], results[0]) < TOLERANCE


def _updated(folder: Path, tree: bool, sharded: bool, step: Step) -> Any:
    """An engine after a first update."""
    engine = build(Setup(), folder, tree)
    engine.checkpoint_mananager.use_dist_checkpointing = sharded
    train(engine, [step])
    return engine


def _contents(checkpoint: Path) -> dict[str, Any]:
    """Names of files, of states and their shapes, and what verl notes about them."""
    files = sorted(str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file())
    notes = {name: json.loads((checkpoint / name).read_text()) for name in files if name.endswith(".json")}
    folders = [checkpoint / name.removesuffix("/.metadata") for name in files if name.endswith("/.metadata")]
    states = [FileSystemReader(path).read_metadata().state_dict_metadata for path in folders]
    shapes = [{name: getattr(value, "size", None) for name, value in state.items()} for state in states]
    common = [sorted(dist_checkpointing.load_common_state_dict(str(path))) for path in folders]
    return {"files": files, "notes": notes, "shapes": shapes, "common": common}


def test_offloading(folder: Path) -> None:
    """Parameters and states that leave and come back between passes, by verl's functions for it."""
    steps = [Step(), Step(shape="turns")]
    setup = Setup()
    expected = train(build(setup, folder, tree=False), steps)
    engine = build(setup, folder, tree=True)
    found = []
    for seed, step in enumerate(steps):
        offload_megatron_model_to_cpu(engine.module)
        offload_megatron_optimizer(engine.optimizer)
        assert all(parameter.untyped_storage().size() == 0 for parameter in engine.module[0].parameters())
        load_megatron_model_to_gpu(engine.module)
        load_megatron_optimizer(engine.optimizer)
        found += train(engine, [step], seed)
    assert max(difference(x, y) for x, y in zip(found, expected, strict=True)) < TOLERANCE
