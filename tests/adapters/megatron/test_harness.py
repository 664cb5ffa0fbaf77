"""What stands in for a GPU: with it, verl's own Megatron engine gives what Hugging Face's models give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from transformers import AutoModelForCausalLM
from verl.workers.config import McoreEngineConfig

from dta_plugin.adapters.verl_cpu import megatron
from dta_plugin.adapters.verl_cpu.__main__ import with_defaults
from dta_plugin.adapters.verl_cpu.megatron import TRANSFORMER_CONFIG
from tests.adapters.megatron.support import Setup, build, inferred
from tests.adapters.verl.support import Step, mini_batch, response_rows


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("model", ["qwen3", "qwen2", "tied", "moe"])
def test_stock_engine_is_the_model(model: str, packed: bool, folder: Path) -> None:
    step = Step(shape="turns", temperature=1.0)
    data = mini_batch(step)
    found = inferred(build(Setup(model, packed), folder, tree=False), data)
    reference = AutoModelForCausalLM.from_pretrained(folder / model, dtype=torch.float32)
    lengths = data["responses"].offsets().diff().tolist()
    for name in ("log_probs", "entropy"):
        rows = zip(data["input_ids"].unbind(), response_rows(data, found[name]).unbind(), lengths, strict=True)
        for ids, row, length in rows:
            with torch.no_grad():
                logp = reference(ids[None]).logits[0, :-1].log_softmax(-1)
            of_tokens = logp.gather(-1, ids[1:, None])[:, 0]
            expected = of_tokens if name == "log_probs" else -(logp.exp() * logp).sum(-1)
            assert (row - expected[-length:]).abs().max() < 1e-5, name


def test_contexts_of_devices_stay_as_they_are() -> None:
    """Hugging Face's models are built in one."""
    with torch.device("meta"):
        assert {torch.arange(3).device.type, torch.zeros(2).device.type} == {"meta"}
    assert torch.zeros(2, device="cuda").device.type == "cpu"


def test_nothing_happens_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[str] = []
    monkeypatch.setattr(megatron, "when_imported", lambda name, _: waiting.append(name))
    megatron.install()
    assert "megatron.core" in waiting
    waiting.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    megatron.install()
    assert not waiting


def test_precision() -> None:
    """float32 besides what verl allows, and no more."""
    assert McoreEngineConfig(dtype="float32", vanilla_mbridge=True).dtype == "float32"
    with pytest.raises(AssertionError, match="dtype int8 not supported"):
        McoreEngineConfig(dtype="int8")


@pytest.mark.parametrize("engine", ["dp", "megatron"])
def test_defaults_are_of_the_engine(engine: str) -> None:
    """verl's loader has no settings of the other one, and what is given comes last."""
    given = [f"model_engine={engine}", "trainer.n_gpus_per_node=3"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", with_defaults(given))
    assert config.ray_kwargs.ray_init.num_gpus == config.trainer.n_gpus_per_node == 3
    assert config.actor_rollout_ref.actor.strategy == ("megatron" if engine == "megatron" else "fsdp2")
    if engine == "megatron":
        part = config.actor_rollout_ref.ref.megatron
        assert part.vanilla_mbridge and TRANSFORMER_CONFIG.items() <= dict(part.override_transformer_config).items()
