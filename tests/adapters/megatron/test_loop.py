"""verl's own training loop with its Megatron engine, end to end: Ray, agent loop, reward, reference, two ranks, and
weights that Megatron holds and a Hugging Face model samples from. The quickstart, but for the engine.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.adapters.verl.recipes import RECIPES, command_of
from tests.adapters.verl_cpu.test_quickstart import (
    FEW_STEPS,
    Metrics,
    built,
    check_learning,
    trained,
    variables_for,
)

MEGATRON = "actor_rollout_ref.actor.megatron"
FLOAT32 = [f"{MEGATRON}.dtype=float32", "actor_rollout_ref.ref.megatron.dtype=float32"]
STOCK = "actor_rollout_ref.model.external_lib=null"
LAYOUTS = {
    "data": "trainer.n_gpus_per_node=2",
    "tensor": f"{MEGATRON}.tensor_model_parallel_size=2",
    "pipeline": f"{MEGATRON}.pipeline_model_parallel_size=2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("quickstart"))


def train(folder: Path, *overrides: str) -> tuple[Metrics, str]:
    # Without what Megatron has set for the attention of engines in this process.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")}
    variables = inherited | variables_for(folder) | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables["VERL_FILE_LOGGER_PATH"] = str(folder / "verl" / "metrics.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUICKSTART", str(folder))
        options = command_of(RECIPES / "verl" / "quickstart.sh", folder)
    options = [option for option in options if ".fsdp_config." not in option]
    command = [sys.executable, *options, "model_engine=megatron", *FLOAT32, *FEW_STEPS, *overrides]
    return trained(command, folder, variables)


@pytest.mark.slow
def test_stock(folder: Path) -> None:
    steps, said = train(folder, STOCK)
    check_learning(steps)
    assert not [name for name in steps[0] if "dta/" in name] and "dta: " not in said


@pytest.fixture
def with_experts(folder: Path) -> Iterator[Path]:
    """The quickstart with four experts in every layer, each of them the dense layer, and a random router."""
    dense = folder / "model"
    whole = dense.rename(folder / "dense")
    shutil.copytree(whole, dense, ignore=shutil.ignore_patterns("*.safetensors"))
    config, taught = AutoConfig.from_pretrained(whole), AutoModelForCausalLM.from_pretrained(whole).state_dict()
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": config.intermediate_size}
    kept = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**kept | sizes, norm_topk_prob=True))
    for name, weight in model.state_dict().items():
        layer, _, part = name.partition(".mlp.")
        if part == "experts.gate_up_proj":
            weight.copy_(torch.cat([taught[f"{layer}.mlp.{which}_proj.weight"] for which in ("gate", "up")]))
        elif part == "experts.down_proj":
            weight.copy_(taught[f"{layer}.mlp.down_proj.weight"])
        elif not part:
            weight.copy_(taught[name])
    model.save_pretrained(dense)
    yield folder
    shutil.rmtree(dense)
    whole.rename(dense)


@pytest.mark.slow
def test_experts(with_experts: Path) -> None:
    """mbridge names every expert, transformers holds them in one tensor: the rollout samples from them all the same."""
    steps, said = train(with_experts, LAYOUTS["data"])
    check_learning(steps)
    assert "probed: log-probs of a small tree differ by" in said
    assert all(step["actor/dta/dense_fallback"] == 0 for step in steps)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.long if name == "data" else pytest.mark.slow) for name in LAYOUTS]
)
def test_plugin(layout: str, folder: Path) -> None:
    """The same training: rollouts are sampled from what trees have trained, and most tokens are computed once."""
    steps, said = train(folder, LAYOUTS[layout])
    check_learning(steps)
    assert "probed: log-probs of a small tree differ by" in said
    for step in steps:
        assert step["actor/dta/compression_ratio"] > 5
        assert step["actor/dta/dense_fallback"] == 0
        assert step["dta/groups_split"] == 0
