"""Every refusal says what was given, what was expected and what to do; the fallback gives the dense result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import (
    BertConfig,
    GPT2Config,
    MiniMaxConfig,
    ModernBertDecoderConfig,
    PhimoeConfig,
    PreTrainedModel,
)

import dta_plugin
from dta_plugin import InvalidInputError, TreeConfig, UnsupportedError
from dta_plugin.verify import compare
from tests.support.models import random_model, tiny_config, tiny_model
from tests.support.oracle import dense
from tests.support.trees import SHAPES, star

MODEL = tiny_model("llama")
SEQUENCES = [[5, 6, 7], [5, 6, 8, 9]]

INPUTS: dict[str, tuple[dict[str, object], str]] = {
    "empty batch": ({"sequences": []}, r"empty batch: 0 sequences.*at least one.*skip the call"),
    "empty sequence": ({"sequences": [[5], []]}, r"Sequence 1 is empty.*drop empty rollouts"),
    "2-D": ({"sequences": [torch.ones(2, 3, dtype=torch.int64)]}, r"shape \(2, 3\).*1-D row.*one unpadded sequence"),
    "float": ({"sequences": [torch.ones(3)]}, r"dtype float32.*integer token ids"),
    "negative": ({"sequences": [[5, -100]]}, r"ids from -100 to 5.*remove padding and ignore-index values"),
    "beyond the vocabulary": (
        {"sequences": [[5, 1100]]},
        r"token id 1100.*below the model's vocab_size 1100; check that",
    ),
    "scored of another length": ({"scored": [1]}, r"1 entries for 2 sequences.*one int or bool mask per sequence"),
    "scored of another shape": ({"scored": [[True], 1]}, r"scored\[0\] has shape \(1,\).*shape \(3,\).*or an int"),
    "scored of another dtype": ({"scored": [[0, 1, 1], 1]}, r"scored\[0\].*dtype int64.*bool mask"),
    "token 0 scored": ({"scored": [0, 1]}, r"scored\[0\] is 0.*>= 1: token 0 has no log-prob"),
    "endless temperature": ({"temperature": float("inf")}, r"temperature=inf. Expected a finite number above 0"),
    "temperature as text": ({"temperature": "1"}, r"temperature='1'. Expected a finite number above 0, or a list"),
    "no temperature": ({"temperature": None}, r"temperature=None. Expected a finite number above 0"),
    "a temperature as text": ({"temperature": ["1", 1.0]}, r"temperature=\['1', 1.0\]. Expected a finite number"),
    "temperature": ({"temperature": 0.0}, r"temperature=0.0.*above 0.*; 1.0 leaves"),
    "flex on a CPU": ({"config": TreeConfig(backend="flex")}, r"backend='flex'.*no backward.*Use backend='auto'"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_invalid_inputs(case: str) -> None:
    arguments, message = INPUTS[case]
    with pytest.raises(InvalidInputError, match=message):
        dta_plugin.sequence_logprobs(MODEL, **({"sequences": SEQUENCES} | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights(value: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(InvalidInputError, match=r"LlamaForCausalLM gave \d+ NaN or .* of \d+.*check the weights"):
        dta_plugin.sequence_logprobs(model, [[5, 6, 7], [5, 8, 9, 10]])


def gpt2() -> PreTrainedModel:
    return random_model(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def linear_attention() -> PreTrainedModel:
    config = tiny_config("llama")
    config.layer_types = ["linear_attention", "full_attention"]
    return random_model(config)


def lightning_attention() -> PreTrainedModel:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 99, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    return random_model(MiniMaxConfig(**small, **heads, layer_types=["linear_attention", "full_attention"]))


def bidirectional() -> PreTrainedModel:
    model = tiny_model("gemma3")
    model.config.use_bidirectional_attention = True
    return model


def window_in_the_mask_only() -> PreTrainedModel:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 99}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "sliding_window": 8}
    return random_model(PhimoeConfig(**small, **heads))


def extra_head() -> PreTrainedModel:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    return random_model(ModernBertDecoderConfig(**small, **special, vocab_size=99))


def attention_dropout() -> PreTrainedModel:
    return tiny_model("llama", attention_dropout=0.1).train()


def prompt_tuning() -> torch.nn.Module:
    return get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def prefix_tuning_in_a_wrapper() -> torch.nn.Module:
    inner = get_peft_model(tiny_model("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    wrapper = torch.nn.Module()
    wrapper.module = inner
    return wrapper


UNSUPPORTED: dict[Callable[[], torch.nn.Module], str] = {
    gpt2: r"GPT2LMHeadModel has no rotary positions.*use a rotary model",
    linear_attention: r"LlamaForCausalLM has linear_attention layers.*full or sliding-window attention only",
    lightning_attention: r"MiniMaxForCausalLM has linear_attention layers, whose state",
    bidirectional: r"Gemma3ForCausalLM attends in both directions; use a causal model",
    attention_dropout: r"attention_dropout is 0.1 in layer 0.*set attention_dropout=0 in the model config",
    window_in_the_mask_only: r"does not tell its attention function about the sliding window of 8; set sliding_window",
    prompt_tuning: r"PROMPT_TUNING adds virtual tokens.*use LoRA or full fine-tuning",
    prefix_tuning_in_a_wrapper: r"PREFIX_TUNING adds virtual tokens",
    lambda: torch.nn.Linear(2, 2): r"Got a Linear. Expected a Hugging Face causal LM.*AutoModelForCausalLM",
}


@pytest.mark.parametrize("build", UNSUPPORTED, ids=lambda build: build.__name__)
def test_unsupported_models(build: Callable[[], torch.nn.Module]) -> None:
    message = rf"Prefix-tree execution is not exact here: .*{UNSUPPORTED[build]}.*on_unsupported='dense'"
    with pytest.raises(UnsupportedError, match=message):
        dta_plugin.sequence_logprobs(build(), SEQUENCES)


@pytest.mark.parametrize("build", [gpt2, attention_dropout], ids=lambda build: build.__name__)
def test_a_fallback_does_not_recommend_itself(build: Callable[[], torch.nn.Module]) -> None:
    with pytest.raises(UnsupportedError) as error:
        dta_plugin.sequence_logprobs(build(), SEQUENCES)
    assert str(error.value).count("not exact here") == str(error.value).count("on_unsupported='dense'") == 1
    reason = dta_plugin.sequence_logprobs(build(), SEQUENCES, TreeConfig(on_unsupported="dense")).report.reason
    assert reason == error.value.reason and "on_unsupported" not in reason


FOUND_BY_RUNNING = {
    extra_head: r"differs from the model's own forward in its head, logits by .*on_unsupported='dense'",
}


@pytest.mark.parametrize("build", FOUND_BY_RUNNING, ids=lambda build: build.__name__)
def test_models_that_differ_when_they_run(build: Callable[[], torch.nn.Module]) -> None:
    model = build()
    with pytest.raises(UnsupportedError, match=FOUND_BY_RUNNING[build]):
        dta_plugin.sequence_logprobs(model, SEQUENCES)
    out = dta_plugin.sequence_logprobs(model, SEQUENCES, TreeConfig(on_unsupported="dense"))
    assert out.report.executor == "dense"


def test_attention_dropout_is_no_obstacle_in_evaluation() -> None:
    out = dta_plugin.sequence_logprobs(attention_dropout().eval(), SEQUENCES)
    assert out.report.executor == "packed"


def test_lora_is_no_prompt_learning() -> None:
    out = dta_plugin.sequence_logprobs(get_peft_model(tiny_model("llama"), LoraConfig(lora_dropout=0.0)), SEQUENCES)
    assert out.report.executor == "packed"


def test_an_encoder_is_refused() -> None:
    config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, is_decoder=True)
    with pytest.raises(UnsupportedError, match=r"BertLMHeadModel has no rotary positions"):
        dta_plugin.sequence_logprobs(random_model(config), SEQUENCES)


def test_on_unsupported_dense_gives_the_dense_result() -> None:
    expected = dense(gpt2(), SEQUENCES, scored=[2, 1], temperature=0.7)
    out = dta_plugin.sequence_logprobs(
        gpt2(), SEQUENCES, TreeConfig(on_unsupported="dense"), 0.7, return_entropy=True, scored=[2, 1]
    )
    assert out.entropies is not None
    for actual, right in ((out.logprobs, expected.logprobs), (out.entropies, expected.entropies)):
        assert all(torch.equal(a, b) for a, b in zip(actual, right, strict=True))
    assert (out.report.executor, out.report.backend, out.report.chunks) == ("dense", "sdpa", 2)
    assert "no rotary positions" in out.report.reason
    torch.cat(out.logprobs).sum().backward()


def test_a_layer_that_bypasses_the_tree_falls_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with pytest.raises(UnsupportedError, match=r"here: .* \[1\] of Llama.* did not use.*or on_unsupported='dense'\.$"):
        bypass(model, monkeypatch)
        dta_plugin.sequence_logprobs(model, SEQUENCES)
    out = dta_plugin.sequence_logprobs(model, SEQUENCES, TreeConfig(on_unsupported="dense"))
    assert (out.report.executor, "did not use the tree" in out.report.reason) == ("dense", True)


def bypass(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something replaces the attention of layer 1, and tells what it calls of no tree."""
    attention = model.model.layers[1].self_attn
    own = attention.forward

    def forward(hidden_states: torch.Tensor, attention_mask: object, dta_tree: object = None, **rest: object) -> object:
        return own(hidden_states, attention_mask=None, **rest)

    monkeypatch.setattr(attention, "forward", forward)


def test_a_soft_cap_that_the_dense_path_would_leave_out() -> None:
    """Older transformers, 5.10 among them, run Gemma 2 with sdpa, which ignores its soft-cap; 5.24 refuses."""
    model = tiny_model("gemma2", attention="eager")
    dta_plugin.sequence_logprobs(model, SEQUENCES)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(UnsupportedError, match=r"soft-cap of 5\.0.*load the model with attn_implementation='eager'"):
        dta_plugin.sequence_logprobs(model, SEQUENCES)


def test_gate_runs_dense_where_too_little_is_saved() -> None:
    nothing = SHAPES["nothing_shared"]
    expected = dense(tiny_model("llama"), nothing)
    out = dta_plugin.sequence_logprobs(tiny_model("llama"), nothing, TreeConfig(min_saving=0.1), return_entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(out.logprobs, expected.logprobs, strict=True))
    assert out.report.executor == "dense"
    assert out.report.reason == "only 0% of dense FLOPs saved, min_saving 10%"


def test_gate_lets_good_batches_pass_and_is_off_by_default() -> None:
    out = dta_plugin.sequence_logprobs(MODEL, star(8, prefix=40), TreeConfig(min_saving=0.5))
    assert (out.report.executor, out.report.chunks) == ("packed", 1)
    assert "min_saving 50%" in out.report.reason
    assert dta_plugin.sequence_logprobs(MODEL, SHAPES["nothing_shared"]).report.executor == "packed"


def test_chunks_are_reported() -> None:
    sequences = star(4, prefix=5, branch=2)
    out = dta_plugin.sequence_logprobs(MODEL, sequences, TreeConfig(executor="packed", max_tree_tokens_per_chunk=9))
    assert (out.report.executor, out.report.chunks) == ("packed", 1)
    assert out.report.reason.endswith("; max_tree_tokens_per_chunk=9 is not kept: executor='packed'")
    out = dta_plugin.sequence_logprobs(MODEL, sequences, TreeConfig(max_tree_tokens_per_chunk=9))
    assert (out.report.executor, out.report.chunks, out.report.peak_tokens) == ("streamed", 3, 8)
    assert "streamed on cpu in 3 chunks of up to 8 tokens (38% recomputed)" in str(out.report)
    assert "4 sequences, 28 -> 13 tokens" in str(out.report)


def test_no_first_step_outside_of_a_trainer() -> None:
    picture = TreeConfig(picture="tree.svg")
    with pytest.raises(
        InvalidInputError, match=r"picture='tree.svg' does nothing in seq.*a trainer has a first.*svg\("
    ):
        dta_plugin.sequence_logprobs(MODEL, SEQUENCES, picture)
    with pytest.raises(InvalidInputError, match=r"picture='tree.svg' does nothing in share_prefixes: a trainer has"):
        dta_plugin.share_prefixes(MODEL, picture)


@pytest.mark.parametrize("name", ["prune", "regroup", "merge_window", "balance_ranks", "calibration"])
def test_options_of_trainers_do_nothing_in_a_call(name: str, tmp_path: Path) -> None:
    (tmp_path / "garbage").write_text("garbage")
    value = str(tmp_path / "garbage") if name == "calibration" else "always"
    config = TreeConfig.from_options({name: value})
    for call in (dta_plugin.sequence_logprobs, compare):
        with pytest.raises(InvalidInputError, match=rf"{name}='.*' does nothing in .*Leave it out. Expected only b"):
            call(MODEL, SEQUENCES, config=config)
    with pytest.raises(InvalidInputError, match=rf"{name}='.*' does nothing in share_prefixes"):
        dta_plugin.share_prefixes(MODEL, config)


def test_saying_what_happens_anyway_is_no_error() -> None:
    anyway = TreeConfig(prune="never", regroup="never", merge_window="never", calibration="off")
    assert dta_plugin.sequence_logprobs(MODEL, SEQUENCES, anyway).report.executor == "packed"
    dta_plugin.share_prefixes(MODEL, replace(anyway, executor="packed", on_nonfinite="pass")).remove()
    with pytest.raises(InvalidInputError, match=r"executor='streamed', verify='first' do nothing in share.*Leave them"):
        dta_plugin.share_prefixes(MODEL, TreeConfig(executor="streamed", verify="first"))
