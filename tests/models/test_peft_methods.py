"""PEFT methods: those on the list are exact, those that look at tokens, positions or rows are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    BOFTConfig,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    RoadConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)

import dta_plugin
from dta_plugin import TreeConfig, UnsupportedError
from dta_plugin.models.peft_methods import _EXACT, adapter_obstacle
from tests.support.models import tiny_model
from tests.support.oracle import dense, difference
from tests.support.tree_run import make_siblings_visible, through_tree
from tests.support.trees import branching_comb

SEQUENCES = branching_comb(4)
STREAMED = TreeConfig(executor="streamed", max_tree_tokens_per_chunk=7)
_TARGETS: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]}

EXACT: dict[str, PeftConfig] = {
    "LoRA": LoraConfig(**_TARGETS),
    "DoRA": LoraConfig(**_TARGETS, use_dora=True),
    "rsLoRA": LoraConfig(**_TARGETS, use_rslora=True),
    "LoHa": LoHaConfig(**_TARGETS),
    "OFT": OFTConfig(**_TARGETS, oft_block_size=4),
    "BOFT": BOFTConfig(**_TARGETS, boft_block_size=4),
    "VeRA": VeraConfig(**_TARGETS, r=4),
    "FourierFT": FourierFTConfig(**_TARGETS, n_frequency=16),
    "RoAd": RoadConfig(**_TARGETS, group_size=4),
    "IA3": IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LN tuning": LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
    "trainable tokens": TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=list(range(3, 40))),
}


def adapted(config: PeftConfig) -> torch.nn.Module:
    """An adapter whose every parameter is random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(tiny_model("llama"), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


@pytest.mark.parametrize("name", EXACT)
def test_exact_methods(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, model = dense(adapted(EXACT[name]), SEQUENCES), adapted(EXACT[name])
    packed = difference(through_tree(model, SEQUENCES), expected)
    streamed = difference(through_tree(model, SEQUENCES, config=STREAMED, executor="streamed"), expected)
    assert max(packed.worst, streamed.worst) <= 1e-5, (packed, streamed)
    make_siblings_visible(monkeypatch)
    assert difference(through_tree(model, SEQUENCES), expected).worst > 1e-3


def wrapped(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """As in DDP ("module") or torch.compile ("_orig_mod")."""
    wrapper = torch.nn.Module()
    setattr(wrapper, name, model)
    return wrapper


REFUSED: dict[str, tuple[PeftConfig, str]] = {
    "activated LoRA": (LoraConfig(**_TARGETS, alora_invocation_tokens=[5, 6]), r"activated LoRA.*use LoRA without"),
    "prompt tuning": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), r"PROMPT_TUNING adds virtual"),
    "prefix tuning": (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), r"PREFIX_TUNING adds virtual"),
    "adaption prompt": (
        AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1),
        r"PEFT method ADAPTION_PROMPT was not shown to be exact.*use LoRA or full",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_methods(name: str) -> None:
    config, message = REFUSED[name]
    model = get_peft_model(tiny_model("llama"), config)
    for outer in (model, wrapped(model, "module"), wrapped(wrapped(model, "_orig_mod"), "module")):
        with pytest.raises(UnsupportedError, match=message):
            dta_plugin.sequence_logprobs(outer, SEQUENCES)


def test_adapters_without_a_wrapper() -> None:
    model = tiny_model("llama")
    inject_adapter_in_model(LoraConfig(**_TARGETS), model, "plain")
    assert adapter_obstacle(model) is None
    model.peft_config["plain"].alora_invocation_tokens = [5]
    assert "activated LoRA" in str(adapter_obstacle(model))


def test_an_adapter_that_is_not_active_does_not_count() -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(**_TARGETS), "one")
    model.add_adapter("two", LoraConfig(**_TARGETS, alora_invocation_tokens=[5, 6]))
    assert adapter_obstacle(model) is None
    model.set_adapter("two")
    assert "activated LoRA" in str(adapter_obstacle(model))


def test_a_method_that_routes_by_whole_rows_is_not_on_the_list() -> None:
    assert "LILY" not in _EXACT
