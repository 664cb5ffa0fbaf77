"""TreeConfig: every option is validated when constructed, and each message says what to do."""

from __future__ import annotations

import os
import pickle
import re
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

from dta_plugin import InvalidInputError, TreeConfig
from dta_plugin.option_types import choices, types_of
from dta_plugin.token_selection.select import FLOOR_OF_BUDGET, TokenSelection

INVALID: dict[str, tuple[dict[str, object], str]] = {
    "backend": ({"backend": "cuda"}, r"backend='cuda'. Expected one of auto, cpu, flex, reference"),
    "executor": ({"executor": "chunked"}, r"executor='chunked'. Expected one of auto, packed"),
    "on_unsupported": ({"on_unsupported": "warn"}, r"on_unsupported='warn'. Expected one of error, dense"),
    "balance_ranks": ({"balance_ranks": "auto"}, r"balance_ranks='auto'. Expected one of never, always"),
    "prune": ({"prune": "some"}, r"prune='some'. Expected one of auto, always, never"),
    "prune in YAML": ({"prune": False}, r"prune=False. Expected one of auto, always, never"),
    "selection": ({"token_selection": "nat"}, r"token_selection='nat'. Expected all or one of urs, rpc"),
    "selection off": ({"token_selection": False}, r"token_selection=False. Expected all or one of urs"),
    "budget of all": (
        {"token_budget": 0.5},
        r"token_budget=0.5 does nothing with token_selection='all'. Leave it out, or choose another token_selection",
    ),
    "prefix of all": ({"token_min_prefix": 8}, r"token_min_prefix=8 does nothing with token_selection='all'"),
    "floor of all": ({"token_floor": 0.1}, r"token_floor=0.1 does nothing with token_selection='all'"),
    "sharing of all": ({"token_sharing": "group"}, r"token_sharing='group' does nothing with token_selection='all'"),
    "sharing of urs": (
        {"token_selection": "urs", "token_sharing": "row"},
        r"token_sharing='row' does nothing with token_selection='urs'. Leave it out, or choose .* \(rpc uses all",
    ),
    "floor of uniform": (
        {"token_selection": "rpc-uniform", "token_floor": 0.1},
        r"token_floor=0.1 does nothing with token_selection='rpc-uniform'",
    ),
    "budget": ({"token_selection": "rpc", "token_budget": 1.1}, r"token_budget=1.1. Expected a share of the tokens"),
    "budget of uniform": (
        {"token_selection": "rpc-uniform", "token_budget": 0.3},
        r"token_budget=0.3 with token_selection=rpc-uniform.* Expected at least 0.5",
    ),
    "prefix": ({"token_selection": "rpc", "token_min_prefix": 0}, r"token_min_prefix=0. Expected a whole number"),
    "floor above budget": (
        {"token_selection": "rpc", "token_budget": 0.05, "token_floor": 0.1},
        r"token_budget=0.05 with token_floor=0.1.*Expected token_floor at most token_budget",
    ),
    "floor": ({"token_selection": "urs", "token_floor": 0.0}, r"token_floor=0.0. Expected a probability in \(0, 1\]"),
    "sharing": ({"token_selection": "rpc", "token_sharing": "all"}, r"token_sharing='all'. Expected one of row, group"),
    "no tokens": ({"max_tree_tokens_per_chunk": 0}, r"max_tree_tokens_per_chunk=0. Expected None or at least 1"),
    "negative tokens": ({"max_tree_tokens_per_chunk": -5}, r"max_tree_tokens_per_chunk=-5"),
    "tokens as text": ({"max_tree_tokens_per_chunk": "4096"}, r"'4096'. Expected None or a whole number"),
    "half a token": ({"max_tree_tokens_per_chunk": 4096.5}, r"_chunk=4096.5. Expected None or a whole number"),
    "tokens on": ({"max_tree_tokens_per_chunk": True}, r"max_tree_tokens_per_chunk=True. Expected None or a whole"),
    "saving as text": ({"min_saving": "0.1"}, r"min_saving='0.1'. Expected a number"),
    "saving on": ({"min_saving": False}, r"min_saving=False. Expected a number"),
    "no saving": ({"min_saving": None}, r"min_saving=None. Expected a number"),
    "budget as text": (
        {"token_selection": "rpc", "token_budget": "0.5"},
        r"token_budget='0.5'. Expected None or a",
    ),
    "half a prefix": ({"token_selection": "rpc", "token_min_prefix": 1.5}, r"token_min_prefix=1.5. Expected None or a"),
    "backend off in YAML": ({"probe": False}, r"probe=False. Expected one of auto, off \(a bare off in YAML"),
    "saving 1": ({"min_saving": 1.0}, r"min_saving=1.0. Expected a share in \[0, 1\)"),
    "saving < 0": ({"min_saving": -0.1}, r"min_saving=-0.1"),
    "saving NaN": ({"min_saving": float("nan")}, r"min_saving=nan"),
    "calibration off in YAML": ({"calibration": False}, r"calibration=False. Expected auto, off or a file .* quote it"),
    "no calibration": ({"calibration": ""}, r"calibration=''. Expected auto, off or a file"),
    "missing calibration": (
        {"calibration": "gone.json"},
        r"calibration='gone.json' is no file. Expected auto, off or a file",
    ),
    "verify": ({"verify": "always"}, r"verify='always'. Expected 'off', 'first' or 'every:N' with N >= 1"),
    "every 0": ({"verify": "every:0"}, r"verify='every:0'"),
    "every nothing": ({"verify": "every:"}, r"verify='every:'"),
    "picture of another kind": ({"picture": "tree.png"}, r"picture='tree.png'. Expected a file that ends in .svg"),
    "picture without a name": ({"picture": ".svg"}, r"picture='.svg'. Expected a file that ends in .svg"),
    "no picture": ({"picture": ""}, r"picture=''. Expected a file that ends in .svg"),
    "picture off in YAML": ({"picture": False}, r"picture=False. Expected a file that ends in .svg"),
    "picture below a file": (
        {"picture": f"{__file__}/below/tree.svg"},
        r"picture='.*tree.svg': .*test_config.py is no folder. Expected a file that ends in .svg, where one can",
    ),
    "trailing newline": ({"verify": "first\n"}, r"verify='first\\n'"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_options(case: str) -> None:
    options, message = INVALID[case]
    with pytest.raises(InvalidInputError, match=message) as error:
        TreeConfig(**options)  # type: ignore[arg-type]
    assert error.value.option in options and str(error.value).startswith(f"{error.value.option}=")
    with pytest.raises(InvalidInputError, match=message):
        TreeConfig.from_options(options)


def test_unknown_options_are_named_with_the_known_ones() -> None:
    with pytest.raises(InvalidInputError, match=r"Unknown option\(s\) backened, chunk. Expected among: backend, exec"):
        TreeConfig.from_options({"chunk": 4, "backened": "cpu", "verify": "off"})


def test_defaults_are_valid_and_documented() -> None:
    assert TreeConfig() == TreeConfig.from_options({})
    for option in fields(TreeConfig):
        assert len(option.metadata["help"]) > 20, option.name


def test_help_explains_every_choice() -> None:
    for option in fields(TreeConfig):
        for choice in choices(types_of(TreeConfig)[option.name]):
            assert re.search(rf"\b{choice}\b", option.metadata["help"]), f"{option.name}: {choice}"


def test_an_error_can_name_the_option_as_it_was_given() -> None:
    with pytest.raises(InvalidInputError) as error:
        TreeConfig(min_saving=2.0)
    named = pickle.loads(pickle.dumps(error.value.named("--dta_min_saving")))
    assert str(named) == "--dta_min_saving=2.0. Expected a share in [0, 1)." and named.option == "min_saving"
    about_none = InvalidInputError("The batch is empty.")
    assert about_none.named("--dta_min_saving") is about_none


def test_options_are_keywords_and_frozen() -> None:
    with pytest.raises(TypeError):
        TreeConfig("cpu")  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        TreeConfig().backend = "cpu"  # type: ignore[misc]


def test_all_tokens_are_selected_unless_asked() -> None:
    assert TreeConfig().selection() is None
    assert TreeConfig(prune="never").selection() is None


@pytest.mark.parametrize(
    "options,expected",
    [
        ({"token_selection": "urs"}, TokenSelection(scheme="urs")),
        (
            {"token_selection": "rpc", "token_budget": 0.4, "token_min_prefix": 64, "token_floor": 0.2}
            | {"token_sharing": "row"},
            TokenSelection(scheme="rpc", budget=0.4, min_prefix=64, floor=0.2, sharing="row"),
        ),
    ],
)
def test_token_options_choose_a_selection(options: dict[str, object], expected: TokenSelection) -> None:
    assert TreeConfig.from_options(options).selection() == expected


@pytest.mark.parametrize("name,default", [("budget", 0.5), ("min_prefix", 1), ("sharing", "group")])
def test_help_names_the_value_that_none_stands_for(name: str, default: object) -> None:
    (help_text,) = (option.metadata["help"] for option in fields(TreeConfig) if option.name == f"token_{name}")
    assert help_text.endswith(f"None: {default}.")
    assert getattr(TokenSelection(scheme="rpc"), name) == default


def test_help_names_the_floor_that_none_stands_for() -> None:
    (help_text,) = (option.metadata["help"] for option in fields(TreeConfig) if option.name == "token_floor")
    assert help_text.endswith(f"None: {FLOOR_OF_BUDGET} times token_budget.")


def test_a_picture_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(InvalidInputError, match=r"folder.svg' is a folder. Expected a file that ends in .svg"):
        TreeConfig(picture=f"{tmp_path}/folder.svg")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root, who may run the tests, writes everywhere
    for name, closed in (("tree.svg", tmp_path), ("old.svg", tmp_path / "old.svg")):
        (tmp_path / "old.svg").write_text("old")
        with pytest.raises(InvalidInputError, match=rf"{name}': this process may not write to {closed}. Expected"):
            TreeConfig(picture=f"{tmp_path}/{name}")


def test_a_picture_is_looked_at_once(tmp_path: Path) -> None:
    """What comes in between must not end a training, which builds its config many times; a fault is no last word."""
    file = tmp_path / "tree.svg"
    file.mkdir()
    with pytest.raises(InvalidInputError, match="is a folder"):
        TreeConfig(picture=str(file))
    file.rmdir()
    config = TreeConfig(picture=str(file))
    file.mkdir()
    assert TreeConfig(picture=str(file)) == replace(config)


def test_a_picture_may_be_on_another_node() -> None:
    """Its folder need not be here; and nothing is made yet."""
    for path in ("/no/folder/of/this/machine/Tree.SVG", "~/no/such/folder/tree.svg", "~nobody-here/tree.svg"):
        assert TreeConfig(picture=path).picture == path
    assert not Path("/no/folder").exists()


@pytest.mark.parametrize(
    "verify,expected",
    [("off", []), ("first", [0]), ("every:1", [0, 1, 2, 3, 4, 5, 6]), ("every:3", [0, 3, 6])],
)
def test_verified_calls(verify: str, expected: list[int]) -> None:
    config = TreeConfig(verify=verify)
    assert [call for call in range(7) if config.verifies(call)] == expected
