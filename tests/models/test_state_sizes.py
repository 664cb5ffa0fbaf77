"""What recurrent layers cost and keep: read off their modules, as for attention."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from transformers import PreTrainedModel

from dta_plugin import PrefixTree, TreeLayout, TreeMask, model_inputs, tree_attention_scope
from dta_plugin.cli import miniature
from dta_plugin.execution import memory
from dta_plugin.models.introspection import model_cost
from dta_plugin.models.sizes import StateSizes, state_sizes
from tests.support.tiny_families import config_of, random_causal_lm

pytestmark = pytest.mark.skipif(Version(version("transformers")) < Version("5.15"), reason="other modules before")


def qwen3_5(**changes: object) -> PreTrainedModel:
    config = config_of("qwen3_5_text")
    config.update(
        {"hidden_size": 128, "intermediate_size": 384, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    )
    config.update({"linear_key_head_dim": 32, "linear_value_head_dim": 64, "num_attention_heads": 4, **changes})
    return miniature.random_causal_lm(config).float().train()


def test_sizes_of_each_kind() -> None:
    assert state_sizes(qwen3_5())[0] == StateSizes(channels=2 * 2 * 32 + 4 * 64, state=4 * 32 * 64, width=4 * (32 + 64))
    lfm2, jamba = (state_sizes(random_causal_lm(config_of(family)))[0] for family in ("lfm2", "jamba"))
    assert (lfm2.state, lfm2.width) == (0, 0) and lfm2.channels
    assert jamba.state and not jamba.width
    assert not state_sizes(random_causal_lm(config_of("llama")))


def test_states_cost_every_token_and_attention_nothing_where_there_is_none() -> None:
    small, large = model_cost(qwen3_5()), model_cost(qwen3_5(linear_value_head_dim=128))
    assert large.per_token > small.per_token and large.per_pair == small.per_pair
    full = model_cost(qwen3_5(layer_types=["full_attention"] * 4))
    assert full.per_pair == pytest.approx(small.per_pair * 4 / qwen3_5().config.layer_types.count("full_attention"))
    assert model_cost(random_causal_lm(config_of("mamba2"))).per_pair == 0


def test_bytes_per_token_are_about_what_a_forward_pass_saves() -> None:
    model = qwen3_5()
    tree = PrefixTree.from_sequences([list(range(1, 90)), [*range(1, 60), *range(2, 70)]])
    layout = TreeLayout.from_tree(tree)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with tree_attention_scope(model), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        model.model(**model_inputs(layout, TreeMask.from_layout(layout)))
    saved = sum(size for pointer, size in seen.items() if pointer not in weights) / tree.tree_tokens
    assert 0.5 < memory.bytes_per_token(model) / saved < 2
