"""The probe finds planted faults and says where they are; it raises no false alarm, and nothing changes by it."""

from __future__ import annotations

import pytest
import torch

import dta_plugin
from dta_plugin import TreeConfig, UnsupportedError
from dta_plugin.errors import VerificationError
from dta_plugin.execution.probing import probe as probe_module
from dta_plugin.execution.probing.comparison import Comparison
from dta_plugin.execution.probing.forest import probe_forest
from dta_plugin.execution.probing.probe import latest_outcome
from dta_plugin.tree import PrefixTree
from tests.support.faults import gradient_of_layer, head_read_with_scale, one_token_off, siblings_seen_in_layer
from tests.support.models import FAMILIES, WINDOW, tiny_model
from tests.support.trees import branching_comb

SEQUENCES = branching_comb(4)
LAYERS = 3
DTYPES = [torch.float32, torch.bfloat16]
EXECUTORS = {
    "packed": TreeConfig(executor="packed"),
    "streamed": TreeConfig(executor="streamed", max_tree_tokens_per_chunk=20),
}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
executors = pytest.mark.parametrize("config", EXECUTORS.values(), ids=EXECUTORS)


def run(model: torch.nn.Module, config: TreeConfig) -> None:
    dta_plugin.sequence_logprobs(model, SEQUENCES, config)


@dtypes
@executors
@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_siblings_seen_in_one_layer(
    config: TreeConfig, dtype: torch.dtype, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    siblings_seen_in_layer(monkeypatch, layer)
    with pytest.raises(UnsupportedError, match=f"differs from the model's own forward from layer {layer} on"):
        run(tiny_model("qwen3", dtype, num_hidden_layers=LAYERS), config)


@dtypes
@executors
def test_a_head_that_is_read_wrongly(config: TreeConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    head_read_with_scale(monkeypatch, 1.02)
    with pytest.raises(UnsupportedError, match=r"in its head, logits by .* on average, from the same hidden"):
        run(tiny_model("qwen3", dtype), config)


@dtypes
@executors
def test_one_token_off(config: TreeConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    one_token_off(monkeypatch, 0.02)
    with pytest.raises(UnsupportedError, match=r"in its head, log-probs by up to 2\.\de-02 nats"):
        run(tiny_model("qwen3", dtype), config)


@dtypes
@executors
@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_a_wrong_gradient_is_for_verification(config: TreeConfig, dtype: torch.dtype, layer: int) -> None:
    model = tiny_model("qwen3", dtype, num_hidden_layers=LAYERS)
    gradient_of_layer(model.model.layers[layer], 1.5)
    verifying = TreeConfig(
        executor=config.executor, max_tree_tokens_per_chunk=config.max_tree_tokens_per_chunk, verify="first"
    )
    with pytest.raises(VerificationError, match=rf"gradients differ from layer {layer} down, most in model\.\w+"):
        run(model, verifying)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_false_alarm(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    run(model, TreeConfig(verify="first"))
    outcome = latest_outcome(model)
    assert outcome is not None and outcome.obstacles == {"packed": None, "streamed": None}
    assert "log-probs agree to" in str(outcome) and "once" in str(outcome)


def test_where_only_streaming_differs_auto_runs_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    own = Comparison.difference

    def streamed_differs(self: Comparison, executor: str) -> str | None:
        return own(self, executor) if executor == "packed" else "from layer 0 on"

    monkeypatch.setattr(Comparison, "difference", streamed_differs)
    out = dta_plugin.sequence_logprobs(model, SEQUENCES, TreeConfig(max_tree_tokens_per_chunk=20))
    assert out.report.executor == "packed"
    with pytest.raises(UnsupportedError, match="streamed, differs"):
        run(model, EXECUTORS["streamed"])


def test_once_per_model_and_attention_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[object] = []
    own = probe_module._probe

    def counted(model: torch.nn.Module, *args: object) -> probe_module.Outcome:
        probed.append(model)
        return own(model, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(probe_module, "_probe", counted)
    model = tiny_model("llama")
    for _ in range(3):
        run(model, TreeConfig())
    assert probed == [model]
    model.set_attn_implementation("eager")
    run(model, TreeConfig())
    run(model, TreeConfig(probe="off"))
    run(tiny_model("llama"), TreeConfig(probe="off"))
    assert probed == [model, model]


def test_off_runs_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    siblings_seen_in_layer(monkeypatch, 0)
    run(tiny_model("llama"), TreeConfig(probe="off"))


def test_dense_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    siblings_seen_in_layer(monkeypatch, 0)
    out = dta_plugin.sequence_logprobs(tiny_model("llama"), SEQUENCES, TreeConfig(on_unsupported="dense"))
    assert out.report.executor == "dense" and "from layer 0 on" in out.report.reason


@pytest.mark.parametrize("seen", [False, True])
def test_decoders_that_share_prefixes(seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), torch.tensor([[5, 6, 7, 8], [5, 6, 9, 10]])
    sharing = dta_plugin.share_prefixes(model)
    if seen:
        siblings_seen_in_layer(monkeypatch, 1)
        with pytest.raises(UnsupportedError, match=r"decoder, differs .* from layer 1 on, hidden states by"):
            model(input_ids=ids, use_cache=False)
        sharing = dta_plugin.share_prefixes(model, TreeConfig(on_unsupported="dense"))
    model(input_ids=ids, use_cache=False)
    assert (sharing.report is None) == seen and ("from layer 1 on" in sharing.reason) == seen
    assert sharing.shared_calls == (0 if seen else 1) and sharing.calls == (2 if seen else 1)


def test_model_and_random_numbers_stay_as_they_were() -> None:
    model = tiny_model("qwen3").train()
    model.model.layers[0].eval()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    run(model, TreeConfig())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [model.training, *(layer.training for layer in model.model.layers)] == [True, False, True]
    assert not model.model.embed_tokens._forward_hooks and not model.model._forward_hooks


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_the_forest_is_longer_than_the_window(family: str) -> None:
    model = tiny_model(family)
    tree = PrefixTree.from_sequences(probe_forest(model).sequences)
    assert tree.depth.max() > WINDOW + 8 and tree.flat_tokens > 1.5 * tree.tree_tokens
    assert min(map(min, probe_forest(model).sequences)) > 2  # no special token
    wide = tiny_model(family, sliding_window=100)
    assert max(map(len, probe_forest(wide).sequences)) > 110
