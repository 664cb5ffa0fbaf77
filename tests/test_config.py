"""TreeConfig: every option is validated when constructed, and each message says what to do."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest

from dta_plugin import InvalidInputError, TreeConfig

INVALID: dict[str, tuple[dict[str, object], str]] = {
    "backend": ({"backend": "cuda"}, r"backend='cuda'. Expected one of auto, cpu, flex, reference"),
    "executor": ({"executor": "chunked"}, r"executor='chunked'. Expected one of auto, packed"),
    "on_unsupported": ({"on_unsupported": "warn"}, r"on_unsupported='warn'. Expected one of error, dense"),
    "balance_ranks": ({"balance_ranks": "auto"}, r"balance_ranks='auto'. Expected one of never, always"),
    "no tokens": ({"max_tree_tokens_per_chunk": 0}, r"max_tree_tokens_per_chunk=0. Expected None or at least 1"),
    "negative tokens": ({"max_tree_tokens_per_chunk": -5}, r"max_tree_tokens_per_chunk=-5"),
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
    "trailing newline": ({"verify": "first\n"}, r"verify='first\\n'"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_options(case: str) -> None:
    options, message = INVALID[case]
    with pytest.raises(InvalidInputError, match=message):
        TreeConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=message):
        TreeConfig.from_options(options)


def test_unknown_options_are_named_with_the_known_ones() -> None:
    with pytest.raises(InvalidInputError, match=r"Unknown option\(s\) backened, chunk. Expected among: backend, exec"):
        TreeConfig.from_options({"chunk": 4, "backened": "cpu", "verify": "off"})


def test_defaults_are_valid_and_documented() -> None:
    assert TreeConfig() == TreeConfig.from_options({})
    for option in fields(TreeConfig):
        assert len(option.metadata["help"]) > 20, option.name


def test_options_are_keywords_and_frozen() -> None:
    with pytest.raises(TypeError):
        TreeConfig("cpu")  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        TreeConfig().backend = "cpu"  # type: ignore[misc]


@pytest.mark.parametrize(
    "verify,expected",
    [("off", []), ("first", [0]), ("every:1", [0, 1, 2, 3, 4, 5, 6]), ("every:3", [0, 3, 6])],
)
def test_verified_calls(verify: str, expected: list[int]) -> None:
    config = TreeConfig(verify=verify)
    assert [call for call in range(7) if config.verifies(call)] == expected
