"""Every causal family of transformers is exact, or refused for the reason that `dta doctor` gives: docs/families.md."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from dta_plugin.cli import miniature
from dta_plugin.execution import prepared_batch
from dta_plugin.execution.probing.probe import probe
from dta_plugin.models import support
from dta_plugin.models.support import tree_obstacle
from tests.support import sweep as support_sweep
from tests.support.family_table import table
from tests.support.sweep import (
    CRASH,
    EXACT,
    NOT_BUILDABLE,
    REFUSED,
    WRONG,
    Outcome,
    Row,
    outcome_of,
    row_of,
    sweep,
)
from tests.support.tiny_families import NAMES, config_of, random_causal_lm
from tests.support.tree_run import make_siblings_visible

pytestmark = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.24"), reason="families, and how their layers are called, are newer"
)
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
# family: (as it comes, with options)
SMOKE = {
    "gemma3": (EXACT, EXACT),
    "gptj": (EXACT, None),
    "mllama": (EXACT, None),
    "granitemoehybrid": (EXACT, EXACT),
    "qwen2_moe": (EXACT, REFUSED),
    "moshi": (REFUSED, REFUSED),
    "gemma4_assistant": (NOT_BUILDABLE, None),
    "musicgen": (NOT_BUILDABLE, None),
}
REASONS = {
    "recurrent_gemma": r"has linear_attention layers, whose state",
    "qwen4_exp_text": r"has indexed_attention layers, which choose their keys by an index of their own; use",
    "minimax": r"has linear_attention layers, whose state",
    "inkling2_text": r"Inkling2DynamicShortConvolution carries its state by functions that are not known",
    "zamba": r"an attention layer that is called in several places",
    "xlstm": r"has recurrent layers, whose state",
    "falcon": r"does not call attention through transformers' AttentionInterface; use a model family that does",
    "gpt2": r"has no rotary positions: padding shifts absolute ones",
}


@pytest.mark.parametrize("family", SMOKE)
def test_a_few_families(family: str) -> None:
    row = row_of(family)
    assert all(outcome.is_fine for outcome in row.outcomes), row
    assert (row.plain.result, row.options and row.options.result) == SMOKE[family], row


@pytest.mark.parametrize("family", REASONS)
def test_reasons(family: str) -> None:
    reason = tree_obstacle(random_causal_lm(config_of(family)))
    assert reason is not None and re.search(REASONS[family], reason), reason


@pytest.mark.parametrize(
    "family,what",
    [("lfm2", "Lfm2ShortConv layers, whose state"), ("glm_moe_dsa", "an index")],
)
def test_reasons_of_models_whose_config_states_no_kinds_of_layers(
    family: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of older transformers do not; their recurrent layers and indexers are not known."""
    for known in ("mixers", "indexers"):
        monkeypatch.setattr(support, known, lambda _: iter(()))
    model = random_causal_lm(config_of(family))
    model.config.layer_types = ["full_attention"] * len(model.config.layer_types)
    assert what in str(tree_obstacle(model))


@pytest.mark.usefixtures("unprobed")
def test_what_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reason that is not given, and siblings that see each other."""
    with monkeypatch.context() as patch:
        patch.setattr(prepared_batch, "tree_obstacle", lambda _: None)
        hybrid = outcome_of(config_of("minimax"))
    make_siblings_visible(monkeypatch)
    llama = outcome_of(config_of("llama"))
    assert [(o.result, o.is_fine) for o in (hybrid, llama)] == [(WRONG, False)] * 2, (hybrid, llama)


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(EXACT, "1e-7", doctor="has conv layers"),
        Outcome(REFUSED, "has conv layers"),
        Outcome(REFUSED, "has conv layers", doctor="no rotary positions"),
        Outcome(NOT_BUILDABLE, "needs keys"),
        Outcome(CRASH, "KeyError", doctor="KeyError"),
    ],
    ids=lambda outcome: f"{outcome.result}, doctor: {outcome.doctor}",
)
def test_what_doctor_does_not_say_is_a_bug(outcome: Outcome) -> None:
    assert not outcome.is_fine
    assert "## Bugs\n\n| family |" in table([Row("llama", outcome)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_probe_raises_no_false_alarm(dtype: torch.dtype) -> None:
    """All families of the page that are exact, with the experts that transformers takes."""
    exact = re.findall(r"^\| (\w+) \|", re.split("\n## ", PAGE.read_text(encoding="utf-8"))[1], re.M)[1:]
    alarms, probed = [], 0
    for family in exact:
        model = miniature.random_causal_lm(config_of(family)).to(dtype).eval()
        if tree_obstacle(model) is None:
            probed += 1
            alarms += [
                f"{family}: {reason}" for reason in probe(model, ["packed", "streamed"], "auto").values() if reason
            ]
    assert not alarms and probed > 90, "\n".join(alarms)


@pytest.mark.slow
def test_a_family_that_hangs_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support_sweep, "SECONDS", 0.0)
    assert [row.plain.note for row in sweep(["llama", "gpt2"])] == ["no answer in 0 s"] * 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_family_and_the_page() -> None:
    """No process answers for another. The page is compared where it was written with the installed transformers."""
    rows = list(sweep())
    assert [row.family for row in rows] == NAMES
    assert not [row for row in rows if not all(outcome.is_fine for outcome in row.outcomes)]
    page = PAGE.read_text(encoding="utf-8")
    if f"transformers {version('transformers')}," in page:
        assert sections(table(rows)) == sections(page)


def sections(page: str) -> str:
    """The tables of a page, without what depends on the machine."""
    return re.sub(r"\d+e-\d+", "", page[page.index("## Exact") :])
