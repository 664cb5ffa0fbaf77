"""The base attention keeps its name: what is registered, for how long, and what others see of it."""

from __future__ import annotations

import copy
import gc
import importlib
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForImageTextToText,
    Gemma3Config,
    PreTrainedModel,
    Qwen2_5_VLConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import dta_plugin
from dta_plugin import TreeConfig, TreeMask, UnsupportedError, share_prefixes
from dta_plugin.models.attention_registry import Dispatcher, install, uninstall
from tests.support.dispatch import is_installed
from tests.support.flash import IMPLEMENTATIONS, flash_attention
from tests.support.models import tiny_model
from tests.support.oracle import dense, difference, gradients
from tests.support.tree_run import TOLERANCE, make_siblings_visible, through_tree
from tests.support.trees import SHAPES, branching_comb

ROWS = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 10, 11]])
BASES = ("sdpa", "eager", "flex_attention", *IMPLEMENTATIONS)
PREFIX_TREE = SHAPES["forest"]


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch, unprobed: None) -> Iterator[None]:
    """Every test ends with what transformers had, whatever graphs other tests have left alive."""
    monkeypatch.setattr(TreeMask, "alive", WeakSet())
    uninstall()
    yield
    gc.collect()
    uninstall()
    assert not any(isinstance(attention, Dispatcher) for attention in registered().values())


@pytest.fixture(scope="module", autouse=True)
def flash() -> Iterator[list[str]]:
    with flash_attention() as calls:
        yield calls


def registered() -> dict[str, Any]:
    return {**ALL_ATTENTION_FUNCTIONS, "eager": modeling_llama.eager_attention_forward}


def is_ours(name: str) -> bool:
    return isinstance(registered()[name], Dispatcher)


def generated(model: PreTrainedModel) -> torch.Tensor:
    """FlexAttention is not asked: on CPUs, what it generates differs from run to run."""
    if model.config._attn_implementation == "flex_attention":
        return torch.zeros(0)
    return model.eval().generate(ROWS, max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("base", [pytest.param(b, marks=[pytest.mark.long] * (b == "flex_attention")) for b in BASES])
def test_every_base(base: str, flash: list[str]) -> None:
    """Trees, `verify`, generation and evaluation under the model's own name; the oracle is an untouched eager model."""
    model, stock = (tiny_model("llama", attention=base) for _ in range(2))
    name = model.config._attn_implementation
    assert name == base
    flash.clear()
    expected = dense(tiny_model("llama", attention="eager"), PREFIX_TREE)
    found = through_tree(model.train(), PREFIX_TREE, config=TreeConfig(verify="off"))
    assert difference(found, expected).worst < TOLERANCE[torch.float32] and not flash
    with torch.no_grad():
        dta_plugin.sequence_logprobs(model, PREFIX_TREE, TreeConfig(verify="first"))
        assert torch.equal(generated(model), generated(stock))
        assert torch.equal(model(ROWS).logits, stock(ROWS).logits)
    assert bool(flash) == (base in IMPLEMENTATIONS), "transformers' own path around flash attention ran"
    assert model.config._attn_implementation == name and is_ours(name)


@pytest.mark.parametrize("base", [base for base in BASES if base != "flex_attention"])
def test_sharing_then_generation_then_remove(base: str) -> None:
    model, stock = (tiny_model("llama", attention=base) for _ in range(2))
    before = registered()[base]
    with torch.no_grad():
        sharing = share_prefixes(model)
        shared = model(ROWS, use_cache=False).logits
        torch.testing.assert_close(shared, stock(ROWS, use_cache=False).logits, rtol=0, atol=1e-5)
        assert sharing.shared_calls == 1 and is_ours(base)
        assert torch.equal(generated(model), generated(stock))
        del shared
        sharing.remove()
        assert torch.equal(generated(model), generated(stock))
        assert torch.equal(model(ROWS).logits, stock(ROWS).logits)
    assert registered()[base] is before and model.config._attn_implementation == base


def test_negative_control() -> None:
    model = tiny_model("qwen3", attention="flash_attention_2")
    expected = dense(tiny_model("qwen3", attention="eager"), PREFIX_TREE)
    with pytest.MonkeyPatch.context() as patch:
        make_siblings_visible(patch)
        assert difference(through_tree(model, PREFIX_TREE), expected).worst > 1e-2


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_installing_twice_and_taking_away(base: str) -> None:
    model, other = (tiny_model("llama", attention=base) for _ in range(2))
    before = registered()
    install(model)
    assert is_installed(model) and not is_installed(other)
    mine = registered()[base]
    install(model)
    install(other)
    assert registered()[base] is mine, "one dispatcher for all models"
    assert {name for name in before if registered()[name] is not before[name]} == {base}
    uninstall(model)
    assert is_installed(other) and not is_installed(model) and registered()[base] is mine
    uninstall(other)
    uninstall(other)
    assert registered() == before


def test_two_models_share_and_one_stops() -> None:
    first, second, stock = (tiny_model("llama") for _ in range(3))
    handles = [share_prefixes(model) for model in (first, second)]
    for model in (first, second):
        model(ROWS, use_cache=False)
    handles[0].remove()
    found, expected = (model(ROWS, use_cache=False).logits for model in (second, stock))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert handles[1].shared_calls == 2
    handles[1].remove()


def test_disable_puts_back_what_was_there() -> None:
    before = registered()
    model = tiny_model("llama")
    sharing = share_prefixes(model)
    model(ROWS, use_cache=False)
    assert is_ours("sdpa")
    dta_plugin.disable()
    assert registered() == before
    model(ROWS, use_cache=False)
    assert sharing.shared_calls == 2, "a model that shares goes on to, and installs anew"
    sharing.remove()


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_a_graph_outlives_the_handle(base: str, use_reentrant: bool) -> None:
    """A recomputed layer finds the dispatcher, though nobody wants it any more; it goes with the graph."""
    model, stock = (tiny_model("llama", torch.float64, attention=base).train() for _ in range(2))
    before = registered()[base]
    for each in (model, stock):
        each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        each.enable_input_require_grads()
    sharing = share_prefixes(model)
    logits = model(ROWS, use_cache=False).logits
    sharing.remove()
    uninstall()
    assert is_ours(base)
    found = gradients(model, logits.sin().sum())
    expected = gradients(stock, stock(ROWS, use_cache=False).logits.sin().sum())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    del logits, found
    gc.collect()
    assert registered()[base] is before


def test_negative_control_of_recomputing() -> None:
    """Without the dispatcher, recomputed layers do not see the tree."""
    model, stock = (tiny_model("llama", torch.float64).train() for _ in range(2))
    for each in (model, stock):
        each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        each.enable_input_require_grads()
    before = registered()["sdpa"]
    with share_prefixes(model):
        logits = model(ROWS, use_cache=False).logits
    mine = registered()["sdpa"]
    AttentionInterface.register("sdpa", before)
    found = gradients(model, logits.sin().sum())
    AttentionInterface.register("sdpa", mine)
    expected = gradients(stock, stock(ROWS, use_cache=False).logits.sin().sum())
    assert max((found[name] - gradient).abs().max() for name, gradient in expected.items()) > 1e-2


def test_a_streamed_graph_installs_for_itself() -> None:
    sequences = branching_comb(3)
    model, stock = (tiny_model("llama", torch.float64) for _ in range(2))
    config = TreeConfig(executor="streamed", max_tree_tokens_per_chunk=8)
    out = dta_plugin.sequence_logprobs(model, sequences, config)
    gc.collect()
    uninstall()
    found = gradients(model, torch.cat(out.logprobs).sum())
    expected = dense(stock, sequences, loss=lambda logprobs, _: torch.cat(logprobs).sum()).gradients
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


Attention = Callable[..., Any]


def counting(behind: Attention, calls: list[int]) -> Attention:
    def attention(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return behind(*args, **kwargs)

    return attention


def register_for_all(attention: Attention) -> None:
    AttentionInterface.register("sdpa", attention)


def register_here(attention: Attention) -> None:
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention


@pytest.mark.parametrize("register", [register_for_all, register_here])
def test_what_others_register_later_stays(register: Callable[[Attention], None]) -> None:
    """Somebody wraps what stands there, us included: it is called without a tree, wrapped for one, and left alone."""
    model, stock = (tiny_model("llama") for _ in range(2))
    expected = stock(ROWS).logits
    before = registered()["sdpa"]
    install(model)
    calls: list[int] = []
    theirs = counting(registered()["sdpa"], calls)
    register(theirs)
    try:
        assert torch.equal(model(ROWS).logits, expected) and len(calls) == 2
        found = through_tree(model, PREFIX_TREE)
        assert difference(found, dense(tiny_model("llama"), PREFIX_TREE)).worst < TOLERANCE[torch.float32]
        dense_calls = 2 + 2 * len(PREFIX_TREE)
        assert len(calls) == dense_calls, "the oracle's calls only"
        assert is_ours("sdpa")
        assert torch.equal(model(ROWS).logits, expected) and len(calls) == dense_calls + 2
        del found
        gc.collect()
        uninstall()
        assert registered()["sdpa"] is theirs
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.pop("sdpa", None)
        AttentionInterface.register("sdpa", before)


def test_what_was_taken_and_is_put_back_by_others_works() -> None:
    """The usual way to replace a function for a while, with us in place when it begins and gone when it ends."""
    model, stock = (tiny_model("llama") for _ in range(2))
    before = registered()["sdpa"]
    install(model)
    taken = registered()["sdpa"]
    AttentionInterface.register("sdpa", before)
    uninstall()
    AttentionInterface.register("sdpa", taken)
    assert torch.equal(model(ROWS).logits, stock(ROWS).logits)
    through_tree(model, PREFIX_TREE)
    gc.collect()
    uninstall()
    assert registered()["sdpa"] is before


def test_an_interface_of_a_modeling_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may override entries for itself alone."""
    own, calls = AttentionInterface(), list[int]()
    own["sdpa"] = theirs = counting(registered()["sdpa"], calls)
    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", own)
    before = registered()
    model = tiny_model("llama")
    model(ROWS)
    assert len(calls) == 2
    through_tree(model, PREFIX_TREE)
    assert len(calls) == 2 and isinstance(own["sdpa"], Dispatcher) and registered() == before
    gc.collect()
    uninstall()
    assert own["sdpa"] is theirs


SUBCLASS = """
from transformers.models.llama.modeling_llama import *
from transformers.models.llama.modeling_llama import ALL_ATTENTION_FUNCTIONS, LlamaAttention, apply_rotary_pos_emb

def own_eager_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights

class Inherits(LlamaAttention):
    pass

class Defines(LlamaAttention):
    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (f(hidden_states).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        attend = own_eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights
"""


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("way", ["inherits", "defines", "instance"])
def test_attention_of_other_files(way: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remote code, a user's subclass, and a forward that was put on the layer: each looks in a file of its own."""
    (tmp_path / "users_modeling_file.py").write_text(SUBCLASS)
    monkeypatch.syspath_prepend(tmp_path)
    users = importlib.import_module("users_modeling_file")
    monkeypatch.delitem(sys.modules, "users_modeling_file")
    model = tiny_model("llama", attention=base)
    for layer in model.model.layers:
        if way == "instance":
            layer.self_attn.forward = types.MethodType(users.Defines.forward, layer.self_attn)
        else:
            layer.self_attn.__class__ = getattr(users, way.capitalize())
    found = through_tree(model, PREFIX_TREE)
    assert difference(found, dense(tiny_model("llama"), PREFIX_TREE)).worst < TOLERANCE[torch.float32]


def test_attention_that_is_not_looked_up() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        del layer.self_attn.layer_idx
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM looks its implementation 'sdpa' up"):
        install(model)


LOAD = """
import os, sys
sys.modules["dta_plugin"] = None  # importing it is an error
import torch, transformers.models.llama.modeling_llama
for saved in map(str.strip, sys.stdin):
    if os.fork() == 0:
        try:
            model, rows, expected = torch.load(saved, weights_only=False)
            assert torch.equal(model(rows, use_cache=False).logits, expected), "another model"
            print(model.config._attn_implementation, flush=True)
        except BaseException as error:
            print(repr(error), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def load_without_us() -> Iterator[Callable[[Path], str]]:
    """What a process without the package says of a model: the name of its attention, or the error. A fork per model."""
    with subprocess.Popen(
        [sys.executable, "-c", LOAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as own:
        assert own.stdin is not None and own.stdout is not None

        def load(saved: Path) -> str:
            print(saved, file=own.stdin, flush=True)
            return own.stdout.readline().strip()

        yield load
        own.stdin.close()


@pytest.mark.parametrize("state", ["trained", "shares", "holds"])
def test_a_saved_model_knows_nothing_of_us(state: str, tmp_path: Path, load_without_us: Callable[[Path], str]) -> None:
    """Whole, while it shares, too, or with an attention function on a layer; and in its checkpoint."""
    model = tiny_model("llama")
    expected = model(ROWS, use_cache=False).logits.detach()
    through_tree(model.train(), PREFIX_TREE)
    if state == "shares":
        share_prefixes(model)
        model(ROWS, use_cache=False)
    if state == "holds":
        model.model.layers[0].self_attn.attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        assert is_ours("sdpa")
    saved = tmp_path / "model.pt"
    torch.save((model.eval(), ROWS, expected), saved)
    assert b"dta" not in saved.read_bytes()
    assert load_without_us(saved) == "sdpa"
    model.save_pretrained(tmp_path / "checkpoint")
    assert "dta" not in (tmp_path / "checkpoint" / "config.json").read_text()
    assert "dta" not in repr(model.config.to_dict()) + repr(list(model.state_dict()))


def test_negative_control_of_loading(tmp_path: Path, load_without_us: Callable[[Path], str]) -> None:
    model = tiny_model("llama")
    model.ours = TreeConfig()
    torch.save((model, ROWS, ROWS), tmp_path / "model.pt")
    assert "dta_plugin" in load_without_us(tmp_path / "model.pt")


def test_a_deep_copy_runs_trees_and_its_own_attention() -> None:
    model = tiny_model("llama")
    through_tree(model, PREFIX_TREE)
    twin = copy.deepcopy(model)
    assert not is_installed(twin)
    assert torch.equal(twin(ROWS).logits, tiny_model("llama")(ROWS).logits)
    assert difference(through_tree(twin, PREFIX_TREE), through_tree(model, PREFIX_TREE)).worst == 0


def test_a_compiled_model() -> None:
    """In one graph without a tree, before and after installation; trees under it are in tests/sharing."""
    model, stock = (tiny_model("llama") for _ in range(2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = stock(ROWS, use_cache=False).logits
    assert torch.equal(compiled(ROWS, use_cache=False).logits, expected)
    install(model)
    assert torch.equal(compiled(ROWS, use_cache=False).logits, expected)
    torch._dynamo.reset()


TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def qwen2_5_vl() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    rope = {"type": "default", "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    places = {"fullatt_block_indexes": [1], "window_size": 56}
    ids = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = Qwen2_5_VLConfig(text_config=TEXT | {"rope_scaling": rope}, vision_config=vision | places, **ids)
    inputs = {
        "input_ids": torch.tensor([[5, 92, *[90] * 4, 93, 6, 7]]),
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0]]),
    }
    return vision_model(config), inputs


def gemma3() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config=TEXT,
        vision_config=vision | {"image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=90,
    )
    ids = torch.tensor([[5, *[90] * 4, 6, 7]])
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return vision_model(config), {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == 90).long()}


def vision_model(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()


def attention_calls(patch: pytest.MonkeyPatch, model: PreTrainedModel) -> list[tuple[str, str]]:
    """Appended to: (layer, function behind) of every attention call, by which function of transformers ran."""
    calls: list[tuple[str, str]] = []
    names = {id(module): name for name, module in model.named_modules()}

    def noting(behind: Attention, kind: str) -> Attention:
        def attention(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append((names[id(module)], kind))
            return behind(module, *args, **kwargs)

        return attention

    for kind in ("sdpa", "flash_attention_2"):
        patch.setitem(AttentionInterface._global_mapping, kind, noting(registered()[kind], kind))
    for file in {sys.modules[type(module).__module__] for module in model.modules()}:
        if hasattr(file, "eager_attention_forward"):
            patch.setattr(file, "eager_attention_forward", noting(file.eager_attention_forward, "eager"))
    return calls


@pytest.mark.parametrize("text,vision", [("sdpa", "sdpa"), ("eager", "eager"), ("flash_attention_2", "sdpa")])
@pytest.mark.parametrize("build", [qwen2_5_vl, gemma3])
def test_a_vision_tower_is_left_alone(
    build: Callable[[], tuple[PreTrainedModel, dict[str, torch.Tensor]]], text: str, vision: str
) -> None:
    """The same calls of the same functions, the same logits, with a dispatcher in front and without."""
    model, inputs = build()
    model.set_attn_implementation({"text_config": text, "vision_config": vision})
    before = registered()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        calls = attention_calls(patch, model)
        expected = model(**inputs).logits
        stock = list(calls)
        calls.clear()
        install(model)
        assert torch.equal(model(**inputs).logits, expected) and calls == stock
        tower = [call for call in stock if "vis" in call[0]]
        assert len(tower) == 2 and {kind for _, kind in tower} == {vision}
        assert {kind for name, kind in stock if "vis" not in name} == {text}
        config = model.config
        assert (config.get_text_config()._attn_implementation, config.vision_config._attn_implementation) == (
            text,
            vision,
        )
        uninstall(model)
        calls.clear()
        assert torch.equal(model(**inputs).logits, expected) and calls == stock
    assert registered() == before
