"""What stands in for a GPU: with it, verl's own Megatron engine gives what Hugging Face's models give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dta_plugin.adapters.verl_cpu import megatron
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
