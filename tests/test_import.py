"""Importing the package is cheap and needs no framework."""

from __future__ import annotations

import subprocess
import sys

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


def test_trees_run_where_triton_is_not_installed() -> None:
    code = "import sys; sys.modules['triton'] = None; import dta_plugin.api, dta_plugin.sharing.decoder_hooks"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves() -> None:
    for name in dta_plugin.__all__:
        assert getattr(dta_plugin, name) is not None


def test_errors_keep_their_former_name() -> None:
    from dta_plugin.errors import UnsupportedModelError

    with pytest.raises(UnsupportedModelError):
        raise dta_plugin.UnsupportedError
    with pytest.raises(dta_plugin.UnsupportedError):
        raise dta_plugin.UnsupportedModelError


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'sequence_logprob'; it offers .*sequence_logprobs"):
        dta_plugin.sequence_logprob  # noqa: B018
