"""Importing the package is cheap and needs no framework."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dta_plugin

FRAMEWORKS = ("transformers", "trl", "peft", "triton", "verl")


def loaded_after(code: str) -> list[str]:
    """Which frameworks a fresh interpreter has loaded after running `code`."""
    code += f"; import sys; print(*(name for name in {FRAMEWORKS} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    "code",
    [
        "import dta_plugin",
        "from dta_plugin import PrefixTree, TreeConfig, TreeLayout, TreeMask, TreeReport, tree_attention",
        "import dta_plugin.tree.cost, dta_plugin.models.lm_head",
    ],
)
def test_no_framework_is_imported(code: str) -> None:
    assert loaded_after(code) == []


def test_what_watches_for_verl_loads_no_numpy() -> None:
    """Every process that imports verl, with the plugin or without, runs it."""
    code = "import dta_plugin.adapters.verl_plugin.trainers, sys; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_inspecting_texts_loads_no_torch(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"prompt": "2+2=", "completion": "4"}\n{"prompt": "2+2=", "completion": "5"}\n')
    code = f"from dta_plugin.cli import main; main(['inspect', {str(file)!r}])"
    code += "; import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "2 rollouts in 1 group" in done.stdout and done.stdout.endswith("False\n")


def test_trees_run_where_triton_is_not_installed() -> None:
    code = "import sys; sys.modules['triton'] = None; import dta_plugin.api, dta_plugin.sharing.decoder_hooks"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves() -> None:
    for name in dta_plugin.__all__:
        assert getattr(dta_plugin, name) is not None


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'sequence_logprob'; it offers .*sequence_logprobs"):
        dta_plugin.sequence_logprob  # noqa: B018


def test_an_unknown_name_of_the_tree_lists_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Layout'; it offers .*TreeLayout"):
        dta_plugin.tree.Layout  # type: ignore[attr-defined]  # noqa: B018
