"""Attention that chooses its keys by an index: exact along a tree while it would choose all, refused beyond."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from weakref import WeakSet

import pytest
import torch
from packaging.version import Version
from transformers import PreTrainedModel

import dta_plugin
from dta_plugin import TreeConfig, TreeMask, UnsupportedError, share_prefixes
from dta_plugin.cli.doctor_command import model_findings
from dta_plugin.execution.probing.probe import probe
from dta_plugin.models import dispatch, indexers
from dta_plugin.models.stand_in import StandIn
from tests.support.oracle import dense, difference, gradients, result_of
from tests.support.sweep import forest
from tests.support.tiny_families import config_of, random_causal_lm
from tests.support.tree_run import make_siblings_visible, through_tree
from tests.support.trees import run
from tests.support.widened import widened

pytestmark = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.24"), reason="these families are newer, or their indexers were"
)
# The third has windows between; in the last, layers share what an indexer above them has chosen.
FAMILIES = ("deepseek_v32", "glm_moe_dsa", "dots3_note_text", "axk2", "hy_v4")
LONGEST = max(map(len, forest()))
EXACT = 1e-10


def model_of(family: str, topk: int = 64) -> PreTrainedModel:
    config = config_of(family)
    config.index_topk = topk
    return random_causal_lm(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact(family: str) -> None:
    """Also if rows are exactly as long as allowed."""
    model = model_of(family, LONGEST).double()
    with widened():
        expected = dense(model, forest())
        for executor in ("packed", "streamed"):
            config = TreeConfig(executor=executor, max_tree_tokens_per_chunk=7 if executor == "streamed" else None)
            found = difference(through_tree(model, forest(), config=config, executor=executor), expected)
            assert found.worst <= EXACT, (executor, found)


@pytest.mark.usefixtures("unprobed")
def test_siblings_that_see_each_other_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("deepseek_v32")
    expected = dense(model, forest())
    make_siblings_visible(monkeypatch)
    assert difference(through_tree(model, forest()), expected).logprobs > 1e-2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    model = model_of("glm_moe_dsa").double()
    with widened():
        expected = dense(model, forest())
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        out = dta_plugin.sequence_logprobs(model, forest(), TreeConfig(executor="packed"), return_entropy=True)
        assert out.entropies is not None
        dispatch.uninstall(model)
        assert difference(result_of(model, out.logprobs, out.entropies), expected).worst <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_longer_rows_are_refused_with_the_reason(family: str) -> None:
    limit = LONGEST - 1
    model = model_of(family, limit)
    reason = rf"a row has {LONGEST} tokens, and beyond {limit} \(index_topk\) .* keep rows at {limit} tokens"
    with pytest.raises(UnsupportedError, match=reason):
        dta_plugin.sequence_logprobs(model, forest())
    out = dta_plugin.sequence_logprobs(model, forest(), TreeConfig(on_unsupported="dense"))
    assert out.report.executor == "dense" and "index_topk" in out.report.reason
    expected = dense(model, forest())
    assert max((a - b).abs().max() for a, b in zip(out.logprobs, expected.logprobs, strict=True)) <= 1e-5


def test_beyond_the_dense_path_chooses_keys_and_the_tree_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the refusal is for."""
    model = model_of("deepseek_v32", 4)
    expected = dense(model, forest())
    monkeypatch.setattr("dta_plugin.execution.prepared_batch.index_length_obstacle", lambda *_: None)
    found = through_tree(model, forest(), config=TreeConfig(probe="off"))
    assert difference(found, expected).logprobs > 1e-2


def test_the_probe_keeps_to_rows_that_are_short_enough() -> None:
    assert probe(model_of("deepseek_v32", 12), ["packed"], "auto") == {"packed": None}
    short = [row[:9] for row in forest()]
    assert dta_plugin.sequence_logprobs(model_of("deepseek_v32", 9), short).report.executor == "packed"


def test_what_differs_is_refused_where_layers_have_several_states_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer cannot be named then; the difference stands."""
    make_siblings_visible(monkeypatch)
    with pytest.raises(UnsupportedError, match="differs from the model's own forward in its decoder"):
        dta_plugin.sequence_logprobs(model_of("hy_v4"), forest())


def test_shared_prefixes() -> None:
    model = model_of("deepseek_v32", 16)
    for length, shared in ((16, True), (17, False)):
        ids = torch.tensor([run(10) + run(length - 10, seed=child) for child in range(3)]) % 90 + 3
        expected = model(input_ids=ids, use_cache=False).logits
        with share_prefixes(model, TreeConfig(on_unsupported="dense")) as sharing:
            found = model(input_ids=ids, use_cache=False).logits
        assert (found - expected).abs().max() <= 1e-4
        assert (sharing.report is not None) == shared, sharing.reason


def test_bit_identical_without_a_tree() -> None:
    """With keys chosen, generation with a cache included."""
    model = model_of("dots3_note_text", 4)
    ids = torch.randint(3, 90, (2, 14), generator=torch.Generator().manual_seed(0))
    results = []
    for _ in range(2):
        logits = model(input_ids=ids, use_cache=False).logits
        found = model.eval().generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        results.append((logits.detach(), gradients(model.train(), logits.sin().sum()), found))
        dispatch.install(model)
    (a, grads_a, tokens_a), (b, grads_b, tokens_b) = results
    assert torch.equal(a, b) and torch.equal(tokens_a, tokens_b)
    assert all(torch.equal(grads_a[name], grads_b[name]) for name in grads_a)


def test_what_stood_there_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TreeMask, "alive", WeakSet())  # without those of other tests
    dispatch.uninstall()
    model = model_of("axk2")
    indexer = next(indexers.indexers(model))
    dispatch.install(model)
    assert isinstance(type(indexer).forward, StandIn)
    dispatch.uninstall(model)
    assert not isinstance(type(indexer).forward, StandIn)


def test_doctor_says_up_to_which_length(tmp_path: Path) -> None:
    config = config_of("deepseek_v32")
    config.save_pretrained(tmp_path)
    findings = {finding.name: finding for finding in model_findings(str(tmp_path))}
    assert findings["layers"].note == f"rows of up to {config.index_topk} tokens (index_topk)"
    assert findings["--use_dta"].ok and "log-probs agree" in findings["--use_dta"].note
