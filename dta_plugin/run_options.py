"""The plugin's options as texts, wherever they were given: read strictly, or refused with what to write instead.

An option is `use_dta` or `dta_<field of TreeConfig>`, with underscores or hyphens.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError, did_you_mean
from dta_plugin.option_types import from_text, types_of

FLAG, PREFIX = "use_dta", "dta_"
_TRUE, _FALSE = ("true", "yes", "on", "y", "t", "1"), ("false", "no", "off", "n", "f", "0")


@dataclass(frozen=True, slots=True)
class Given:
    """An option's value as text. where: its name in messages, such as "--dta_verify" or "recipe.yaml: dta_verify"."""

    text: str
    where: str


def option_name(key: str) -> str | None:
    """The option that a key of a mapping, or an argument without its dashes, means; None if it is none of ours."""
    name = key.replace("-", "_")
    return name if name == FLAG or name.startswith(PREFIX) else None


def parse_options(options: Mapping[str, Given]) -> TreeConfig | None:
    """Validated configuration, or None where the flag is off. Raises InvalidInputError for anything it cannot use."""
    flag = options.get(FLAG)
    if flag is not None and flag.text.lower() not in _TRUE + _FALSE:
        raise InvalidInputError(f"{flag.where}={flag.text!r}. Expected true or false.")
    types = types_of(TreeConfig)
    given = {name.removeprefix(PREFIX): option for name, option in options.items() if name != FLAG}
    for name, option in given.items():
        if name not in types:
            raise InvalidInputError(_unknown(name, option.where, list(types)))
    if flag is None and given:
        names = ", ".join(option.where for option in given.values())
        raise InvalidInputError(f"Got {names} without --{FLAG}. Expected --{FLAG} true beside it.")
    try:
        config = TreeConfig(**{name: from_text(name, option.text, types[name]) for name, option in given.items()})
    except InvalidInputError as error:
        where = {name: option.where for name, option in given.items()}
        raise error.named(where.get(str(error.option), f"--{PREFIX}{error.option}")) from None
    return config if flag is not None and flag.text.lower() in _TRUE else None


def _unknown(name: str, where: str, known: list[str]) -> str:
    prefix = f"--{PREFIX}" if where.startswith("--") else PREFIX
    hint = did_you_mean(name, known, prefix)
    return f"{where} is no option.{hint} Expected among: {', '.join(prefix + field for field in known)}."


def _slips(word: str) -> set[str]:
    """The word, and what one slip of a finger makes of it: letters swapped, one left out, one typed twice."""
    places = range(len(word))
    swapped = {word[:i] + word[i : i + 2][::-1] + word[i + 2 :] for i in places}
    return swapped | {word[:i] + word[i + 1 :] for i in places} | {word[:i] + word[i] + word[i:] for i in places}


def warn_of_slip(key: str, where: str) -> None:
    """One line where a name that is left to the script is almost certainly the flag, mistyped."""
    if key.strip("-").replace("-", "_").lower() in _slips(FLAG):
        meant = f"--{FLAG}" if key.startswith("-") else FLAG
        warn(f"{where} is left to the script. Did you mean {meant}?")


def warn(line: str) -> None:
    """On stderr, by the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"dta_plugin.run: {line}", file=sys.stderr)
