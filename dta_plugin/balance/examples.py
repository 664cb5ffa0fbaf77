"""The token ids of an example of offline data, by the names that tokenised datasets give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dta_plugin.errors import InvalidInputError

# What stands for a sequence on its own, or behind the prompt where the example has one.
_PROMPTS = ("prompt_ids", "prompt_input_ids")
_SEQUENCES = (
    ("input_ids",),
    ("chosen_ids", "rejected_ids"),
    ("chosen_input_ids", "rejected_input_ids"),
    ("completion_ids",),
    ("completion_input_ids",),
)
_EXPECTED = "input_ids; chosen_ids and rejected_ids, or completion_ids, with or without prompt_ids; or the *_input_ids"


def token_columns(names: Iterable[str]) -> list[str]:
    """Which of an example's keys hold its token ids: the prompt first. Raises InvalidInputError if none is known."""
    names = list(names)
    for keys in _SEQUENCES:
        if all(key in names for key in keys):
            prompt = [] if keys == ("input_ids",) else [key for key in _PROMPTS if key in names][:1]
            return [*prompt, *keys]
    raise InvalidInputError(
        f"Got an example with the keys {', '.join(map(str, names)) or '(none)'}. Expected token ids under {_EXPECTED} "
        "of each; tokenise the data set first, or give a function that returns the token ids of an example."
    )


def token_path(example: Mapping[str, Any]) -> np.ndarray:
    """int64 [n]: the example's tokens as one path, whose length is what the example has to compute.

    That is its sequence; of a preference pair, the chosen one and then what the rejected one does not share with it.
    """
    columns = token_columns(example)
    parts = [np.asarray(example[column], dtype=np.int64) for column in columns]
    if len(columns) == 1 or not columns[-1].startswith("rejected"):
        return np.concatenate(parts)
    *prompt, chosen, rejected = parts
    common = min(len(chosen), len(rejected))
    differs = chosen[:common] != rejected[:common]
    shared = int(differs.argmax()) if differs.any() else common
    return np.concatenate([*prompt, chosen, rejected[shared:]])
