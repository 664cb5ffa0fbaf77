"""Recurrent layers of the transformers that verl comes with, without verl's engine: exact, or refused with the reason.

Before transformers 5.15, mixers with a delta rule have their functions as attributes; others call none that is known.
"""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version

from dta_plugin import TreeConfig, UnsupportedError
from dta_plugin.models.recurrent_layers import Functions, mixers, way
from tests.support.oracle import dense, difference
from tests.support.sweep import forest
from tests.support.tiny_families import config_of, random_causal_lm
from tests.support.tree_run import make_siblings_visible, through_tree

pytestmark = [
    pytest.mark.usefixtures("unprobed"),
    pytest.mark.skipif(Version(version("transformers")) >= Version("5.15"), reason="tests/models has these"),
]
# The rule computes in float32 in any case. Measured on these models against float64 throughout, gradients of the dense
# path are off by 5e-5, those of a tree by 3e-5.
TOLERANCE = 2e-4
RULES = ["qwen3_5_text", "qwen3_next", "qwen3_5_moe_text"]
OTHERS = ["lfm2", "bamba", "mamba2", "granitemoehybrid", "olmo_hybrid", "mamba", "falcon_mamba"]


@pytest.mark.parametrize("family", RULES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("budget", [None, 11])
def test_a_delta_rule(family: str, checkpointing: bool, budget: int | None) -> None:
    model = random_causal_lm(config_of(family))
    assert {type(way(mixer)) for mixer in mixers(model)} == {Functions}
    expected = dense(model, forest())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    executor = "packed" if budget is None else "streamed"
    config = TreeConfig(executor=executor, max_tree_tokens_per_chunk=budget)
    assert difference(through_tree(model, forest(), config=config, executor=executor), expected).worst < TOLERANCE


def test_negative_control(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_causal_lm(config_of("qwen3_next"))
    expected = dense(model, forest())
    make_siblings_visible(monkeypatch)
    assert difference(through_tree(model, forest()), expected).worst > 100 * TOLERANCE


@pytest.mark.parametrize("family", OTHERS)
def test_others_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedError, match=r"transformers 5\.15 or newer"):
        through_tree(random_causal_lm(config_of(family)), forest())
