"""`share_prefixes`: models called with padded batches equal themselves without it, outputs, losses and gradients.

The oracle is the same Hugging Face model on the same padded batch, never touched by the package.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    ModernBertConfig,
    PreTrainedModel,
)

import dta_plugin
from dta_plugin import InvalidInputError, TreeConfig, UnsupportedError, share_prefixes
from dta_plugin.sharing.padded import PaddedBatch, spread
from tests.support.models import FAMILIES, norm_in_own_dtype, softmax_in_own_dtype, tiny_config, tiny_model
from tests.support.oracle import GRADIENT_FLOOR, gradients
from tests.support.tree_run import TOLERANCE, make_siblings_visible
from tests.support.trees import SHAPES, Sequences, branching_comb, forest, sequence_batches, star

Inputs = dict[str, torch.Tensor]
BATCHES = {name: sequences for name, sequences in SHAPES.items() if len(sequences) > 1}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float64", "float32"])


@pytest.fixture(scope="module", autouse=True)
def float64_throughout() -> Iterator[None]:
    with softmax_in_own_dtype():
        yield


def padded_batch(sequences: Sequences, side: str = "right") -> Inputs:
    """Rows, mask and labels as a collator makes them; with left padding, the first token has no label.

    Left padding comes with position ids that count real tokens: without them, the dense path's rotary angles, which
    transformers takes in float32 even for float64 models, are those of other positions.
    """
    length = max(map(len, sequences)) + 2
    ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(length - len(sequence), length)
        ids[row, place], mask[row, place] = torch.tensor(sequence), 1
    labels = ids.masked_fill(mask == 0, -100)
    if side == "left":
        labels[:, 1:] = labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return inputs if side == "right" else inputs | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def outcome(model: torch.nn.Module, inputs: Inputs, **options: Any) -> dict[str, torch.Tensor]:
    """Logits at real tokens (or of rows), loss, and the gradient of loss plus a random sum of logits, by name."""
    output = model(**inputs, use_cache=False, **options)
    logits = output.logits[inputs["attention_mask"].bool()] if output.logits.ndim == 3 else output.logits
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    has_loss = output.loss is not None and bool(output.loss.isfinite())
    loss = output.loss if has_loss else logits.new_zeros(())
    total = loss + (noise.to(logits.dtype) * logits).sum()
    return {"logits": logits.detach(), "loss": loss.detach()} | gradients(model, total)


def apart(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest L2 difference, relative; of a small gradient, relative to a share of the largest one."""
    assert actual.keys() == expected.keys()
    largest = max(value.double().norm().item() for name, value in expected.items() if name not in ("logits", "loss"))
    floors = {"logits": 0.0, "loss": 0.0}
    return max(
        (
            (actual[name].double() - value.double()).norm()
            / max(value.double().norm().item(), floors.get(name, GRADIENT_FLOOR * largest), 1e-30)
        ).item()
        for name, value in expected.items()
    )


def with_lora(model: PreTrainedModel) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        options = LoraConfig(r=4, lora_dropout=0.0, init_lora_weights=False, target_modules="all-linear")
        return get_peft_model(model, options).to(model.dtype)


def classifier(dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(tiny_config("qwen3", num_labels=1, **changes))
    norm_in_own_dtype(model)
    return model.to(dtype).eval()


@DTYPES
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", BATCHES)
def test_every_shape(name: str, side: str, dtype: torch.dtype) -> None:
    inputs = padded_batch(BATCHES[name], side)
    model = tiny_model("qwen3", dtype)
    expected = outcome(model, inputs)
    with share_prefixes(model) as sharing:
        actual = outcome(model, inputs)
    assert apart(actual, expected) <= TOLERANCE[dtype]
    assert sharing.report is not None and sharing.tree_tokens == sharing.report.tree_tokens
    assert (sharing.tree_tokens < sharing.flat_tokens) == (name not in ("nothing_shared", "one_token_trees"))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, side: str) -> None:
    inputs = padded_batch(branching_comb(4) + forest(), side)
    model = tiny_model(family, torch.float64)
    expected = outcome(model, inputs)
    with share_prefixes(model):
        actual = outcome(model, inputs)
    assert apart(actual, expected) <= TOLERANCE[torch.float64]


@settings(max_examples=60)
@given(sequence_batches(), st.sampled_from(["right", "left"]))
def test_random_trees(sequences: Sequences, side: str) -> None:
    inputs = padded_batch([*sequences, sequences[0]], side)
    model = tiny_model("llama", torch.float64)
    expected = outcome(model, inputs)
    with share_prefixes(model):
        assert apart(outcome(model, inputs), expected) <= TOLERANCE[torch.float64]


def test_left_padding_without_position_ids() -> None:
    inputs = padded_batch(branching_comb(4), "left")
    del inputs["position_ids"]
    model = tiny_model("qwen3")
    expected = outcome(model, inputs)
    with share_prefixes(model) as sharing:
        assert apart(outcome(model, inputs), expected) <= TOLERANCE[torch.float32]
    assert sharing.shared_calls == 1


def test_rows_without_tokens_and_no_mask() -> None:
    inputs = padded_batch(branching_comb(4))
    inputs["attention_mask"][2] = 0
    inputs["labels"][2] = -100
    model = tiny_model("llama", torch.float64)
    expected, whole = outcome(model, inputs), model(inputs["input_ids"]).logits
    with share_prefixes(model.train()) as sharing:
        assert apart(outcome(model, inputs), expected) <= TOLERANCE[torch.float64]
        torch.testing.assert_close(model(inputs["input_ids"]).logits, whole, rtol=0, atol=1e-10)
    assert sharing.shared_calls == 2, "without a mask, all tokens are real"


@pytest.mark.usefixtures("unprobed")
def test_negative_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Siblings that see each other, and a copy whose gradient is lost."""
    inputs = padded_batch(branching_comb(4))
    model = tiny_model("qwen3", torch.float64)
    expected = outcome(model, inputs)
    share_prefixes(model)
    with monkeypatch.context() as patch:
        make_siblings_visible(patch)
        assert apart(outcome(model, inputs), expected) > 1e-3
    with monkeypatch.context() as patch:
        merge = PaddedBatch.from_arguments

        def losing_a_row(call: dict[str, Any], _: PreTrainedModel) -> PaddedBatch:
            batch = merge(call)
            assert isinstance(batch, PaddedBatch)
            return PaddedBatch(batch.tree, batch.index, [(0, 0), *batch.spans[1:]])

        patch.setattr(PaddedBatch, "from_arguments", losing_a_row)
        assert apart(outcome(model, inputs), expected) > 1e-3
    assert apart(outcome(model, inputs), expected) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("wide", [True, False], ids=["float32", "bfloat16"])
def test_gradients_of_1000_copies_are_summed_wide(monkeypatch: pytest.MonkeyPatch, wide: bool) -> None:
    """In bfloat16, 1000 gradients of 1 are 256 where sums are kept in bfloat16: the negative control."""
    if not wide:
        monkeypatch.setattr(torch, "promote_types", lambda dtype, _: dtype)
    sequences = star(1000, prefix=2, branch=1)
    batch = PaddedBatch.from_arguments({"input_ids": torch.tensor(sequences)})
    assert isinstance(batch, PaddedBatch)
    values = torch.zeros(batch.tree.tree_tokens, 4, dtype=torch.bfloat16, requires_grad=True)
    spread(values, batch).sum().backward()
    assert values.grad is not None
    assert (values.grad[:2] == 1000).all() == wide and (values.grad[2:] == 1).all()


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("order", ["lora first", "sharing first"])
@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_lora_and_checkpointing(family: str, order: str, checkpointing: bool | None) -> None:
    inputs = padded_batch(branching_comb(4))
    expected = outcome(with_lora(tiny_model(family, torch.float64)), inputs)
    model: torch.nn.Module = tiny_model(family, torch.float64)
    if order == "lora first":
        sharing = share_prefixes(model := with_lora(model))
    else:
        sharing = share_prefixes(model)
        model = with_lora(model)
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    assert apart(outcome(model, inputs), expected) <= TOLERANCE[torch.float64]
    assert sharing.shared_calls == 1
    with model.disable_adapter(), torch.no_grad():
        plain = tiny_model(family, torch.float64)(**inputs, use_cache=False).loss
        torch.testing.assert_close(model(**inputs, use_cache=False).loss, plain, rtol=1e-10, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_passes_before_a_backward(checkpointing: bool) -> None:
    """Graphs of two calls are alive at once, as in DPO variants; layers are recomputed with their own trees."""
    first, second = padded_batch(branching_comb(4)), padded_batch(star(5), "left")
    model = tiny_model("qwen3", torch.float64).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()

    def both() -> dict[str, torch.Tensor]:
        return gradients(model, model(**first).loss * model(**second).loss)

    expected = {"logits": torch.ones(1), "loss": torch.ones(1)} | both()
    with share_prefixes(model) as sharing:
        actual = {"logits": torch.ones(1), "loss": torch.ones(1)} | both()
    assert sharing.shared_calls == 2
    assert apart(actual, expected) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("side", ["right", "left"])
def test_sequence_classification(side: str) -> None:
    inputs = padded_batch(forest() + star(4), side)
    del inputs["labels"]
    model = classifier()
    expected = outcome(model, inputs)
    with share_prefixes(model) as sharing:
        assert apart(outcome(model, inputs), expected) <= TOLERANCE[torch.float64]
    assert sharing.shared_calls == 1


def test_router_loss() -> None:
    """Router logits of every copy come back, so that the load-balancing loss counts tokens as the dense path does."""
    inputs = padded_batch(branching_comb(4))
    model = tiny_model("qwen3_moe", torch.float64)
    model.router_aux_loss_coef = 1000.0

    def both() -> dict[str, torch.Tensor]:
        return outcome(model, inputs, output_router_logits=True)

    expected, without = both(), outcome(model, inputs)
    with share_prefixes(model) as sharing:
        actual = both()
    assert sharing.shared_calls == 1
    assert apart(without, expected) > 1e-3, "the router loss does something"
    assert apart(actual, expected) <= 1e-6, "the load-balancing loss is computed in float32"


def test_ddp(tmp_path: Path) -> None:
    inputs = padded_batch(branching_comb(4))
    expected = outcome(tiny_model("llama", torch.float64), inputs)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(tiny_model("llama", torch.float64).train())
        sharing = share_prefixes(model)
        actual = outcome(model, inputs)
    finally:
        torch.distributed.destroy_process_group()
    assert sharing.shared_calls == 1
    assert apart({name.removeprefix("module."): x for name, x in actual.items()}, expected) <= 1e-10


OWN_PATH: dict[str, tuple[Callable[[Inputs], dict[str, Any]], str]] = {
    "one row": (lambda x: {"input_ids": x["input_ids"][:1], "use_cache": False}, "no second row"),
    "cache": (lambda x: x | {"use_cache": True}, "asks for a cache"),
    "cache by config": (lambda x: {k: v for k, v in x.items() if k != "use_cache"}, "pass use_cache=False"),
    "hidden states": (lambda x: x | {"output_hidden_states": True}, "hidden states of every layer"),
    "packed rows": (
        lambda x: x | {"position_ids": torch.arange(x["input_ids"].shape[1]).remainder(4)[None]},
        "packed sequences",
    ),
    "holes": (lambda x: x | {"attention_mask": _with_hole(x["attention_mask"]), "labels": None}, "has holes"),
    "square mask": (lambda x: x | {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, "not one of padding"),
    "padding scored": (lambda x: x | {"labels": x["input_ids"]}, "score what padding predicts"),
    "per-token argument": (lambda x: x | {"token_kind": torch.zeros_like(x["input_ids"])}, "token_kind"),
}


def _with_hole(mask: torch.Tensor) -> torch.Tensor:
    return mask.index_fill(1, torch.tensor([1]), 0)


@pytest.mark.parametrize("case", OWN_PATH)
def test_what_cannot_be_shared_is_bit_identical(case: str) -> None:
    change, reason = OWN_PATH[case]
    inputs = change(padded_batch(branching_comb(4)) | {"use_cache": False})
    model = tiny_model("qwen3")
    expected = model(**inputs)
    with share_prefixes(model) as sharing:
        actual = model(**inputs)
    assert torch.equal(actual.logits, expected.logits)
    assert sharing.calls == 1 and sharing.shared_calls == 0
    assert sharing.report is None and reason in sharing.reason


def test_generation_is_untouched() -> None:
    inputs = padded_batch(star(3), "left")
    model = tiny_model("qwen3")
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": inputs["attention_mask"]}
    expected = model.generate(inputs["input_ids"], **options)
    with share_prefixes(model) as sharing:
        assert torch.equal(model.generate(inputs["input_ids"], **options), expected)
    assert sharing.calls == 5 and sharing.shared_calls == 0


def test_min_saving() -> None:
    model = tiny_model("qwen3")
    sharing = share_prefixes(model, TreeConfig(min_saving=0.3))
    model(**padded_batch(BATCHES["nothing_shared"]), use_cache=False)
    assert "only 0% of dense FLOPs saved" in sharing.reason
    model(**padded_batch(star(9)), use_cache=False)
    assert sharing.report is not None and sharing.reason == ""


def test_an_executor_may_run_the_same_model() -> None:
    model = tiny_model("qwen3")
    expected = dta_plugin.sequence_logprobs(model, star(4)).logprobs
    with share_prefixes(model):
        actual = dta_plugin.sequence_logprobs(model, star(4)).logprobs
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_the_model_stays_what_it_was(tmp_path: Path) -> None:
    inputs = padded_batch(star(4))
    model = tiny_model("qwen3")
    names = list(model.state_dict())
    sharing = share_prefixes(model)
    assert share_prefixes(model, TreeConfig(min_saving=0.1)) is sharing and sharing.config.min_saving == 0.1
    assert share_prefixes(model) is sharing and len(sharing._hooks) == 3, "twice is once"
    assert list(model.state_dict()) == names
    expected = model(**inputs, use_cache=False).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "dta" not in (tmp_path / "config.json").read_text()
    torch.testing.assert_close(loaded(**inputs).logits[:, :7], expected[:, :7], rtol=0, atol=1e-4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = share_prefixes(twin)
        assert own is not sharing
        calls = sharing.calls, own.calls
        assert torch.equal(twin(**inputs, use_cache=False).logits, expected)
        assert (sharing.calls, own.calls) == (calls[0], calls[1] + 1)
        own.remove()
        twin(**inputs, use_cache=False)
        assert own.calls == calls[1] + 1
    sharing.remove()
    model(**inputs, use_cache=False)
    assert sharing.calls == calls[0], "removing twins' hooks left these alone; now they are gone, too"


def test_refusals() -> None:
    for option in ({"executor": "streamed"}, {"verify": "first"}, {"max_tree_tokens_per_chunk": 9}):
        with pytest.raises(InvalidInputError, match=r"Expected only backend, min_saving, probe, on_uns"):
            share_prefixes(tiny_model("qwen3"), TreeConfig(**option))
    with pytest.raises(UnsupportedError, match="Expected a Hugging Face"):
        share_prefixes(torch.nn.Linear(2, 2))


def encoder() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99, "pad_token_id": 0}
    return AutoModelForSequenceClassification.from_config(ModernBertConfig(intermediate_size=48, **sizes))


UNSUPPORTED: dict[str, tuple[Callable[[], torch.nn.Module], str]] = {
    "encoder": (encoder, "causal"),
    "bidirectional": (lambda: tiny_model("qwen3", is_causal=False), "both directions"),
    "prompt tuning": (
        lambda: get_peft_model(tiny_model("qwen3"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        "virtual tokens",
    ),
    "dropout": (lambda: tiny_model("qwen3", attention_dropout=0.1).train(), "attention_dropout is 0.1"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_models(case: str) -> None:
    build, reason = UNSUPPORTED[case]
    with pytest.raises(UnsupportedError, match=reason):
        share_prefixes(build())
    model = build().eval()
    if case == "dropout":
        sharing = share_prefixes(model, TreeConfig(on_unsupported="dense"))
        model.train()(**padded_batch(star(3)))
        assert sharing.shared_calls == 0 and reason in sharing.reason
        share_prefixes(model.eval())
        with pytest.raises(UnsupportedError, match=reason):
            model.train()(**padded_batch(star(3)))
        return
    ids = torch.tensor(star(3, prefix=2)) % 99
    expected = model(input_ids=ids).logits
    sharing = share_prefixes(model, TreeConfig(on_unsupported="dense"))
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert sharing.shared_calls == 0 and reason in sharing.reason


def test_a_layer_that_goes_around_the_tree() -> None:
    model = tiny_model("qwen3")
    share_prefixes(model)
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(UnsupportedError, match=r"layer\(s\) \[1\].*; or on_unsupported='dense'\.$"):
        model(**padded_batch(star(3)), use_cache=False)
    found_late = {
        ("error", "off"): "on_unsupported='dense' with probe='auto', which falls back before the first tree.",
        ("dense", "off"): "probe='auto', which falls back before the first tree.",
    }
    for (on_unsupported, probe), way in found_late.items():
        share_prefixes(model, TreeConfig(on_unsupported=on_unsupported, probe=probe))
        with pytest.raises(UnsupportedError) as error:
            model(**padded_batch(star(3)), use_cache=False)
        assert str(error.value).endswith(f"other plugins); or {way}")
    sharing = share_prefixes(model, TreeConfig(on_unsupported="dense"))
    model(**padded_batch(star(3)), use_cache=False)
    assert "did not use the tree" in sharing.reason and "dense" not in sharing.reason


ROWS = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 11], [5, 6, 12]]


def built(kind: Any, pad: int | None = 0) -> nn.Module:
    config = tiny_config("qwen3")
    config.use_cache, config.pad_token_id = False, pad
    torch.manual_seed(0)
    return kind.from_config(config).train()


def padded(pad: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.full((len(ROWS), 9), pad)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(ROWS):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("head", ["span", "pooled_padding", "pooled"])
def test_heads_that_read_padding(head: str) -> None:
    kind = AutoModelForQuestionAnswering if head == "span" else AutoModelForSequenceClassification
    spans = {"start_positions": torch.tensor([1, 2, 1]), "end_positions": torch.tensor([3, 4, 2])}
    labels = spans if head == "span" else {"labels": torch.tensor([0, 1, 0])}
    inputs = padded(3 if head == "pooled_padding" else 0) | labels
    stock = built(kind)
    model = copy.deepcopy(stock)
    sharing = share_prefixes(model)
    assert torch.allclose(model(**inputs).loss, stock(**inputs).loss, atol=1e-6)
    assert sharing.shared_calls == (head == "pooled")


def test_labels_are_looked_at_in_every_model_of_a_decoder() -> None:
    model = built(AutoModelForCausalLM)
    stock = copy.deepcopy(model)
    share_prefixes(model.model)  # type: ignore[arg-type]
    share_prefixes(model)
    inputs = padded()
    inputs["labels"] = inputs["input_ids"]
    assert torch.equal(model(**inputs).loss, stock(**inputs).loss)


@pytest.mark.long
def test_compiled_model_shares() -> None:
    model = built(AutoModelForCausalLM)
    sharing = share_prefixes(model)
    torch.compile(model, backend="eager")(**padded())
    assert sharing.shared_calls == 1
