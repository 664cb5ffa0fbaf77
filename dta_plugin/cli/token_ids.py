"""A row's token ids -> the ids of its prompt and of what follows, checked and without what is masked."""

from __future__ import annotations

from typing import Any

import numpy as np

from dta_plugin.errors import InvalidInputError

_MAX_ID = 2**32 - 1


def read_ids(prompt: Any, completion: Any, mask: Any, where: str) -> tuple[np.ndarray, int]:
    """(ids [n], how many are the prompt's). mask: 0 or 1 per id, None: all count. Raises InvalidInputError."""
    first, second = _ids(prompt, where), _ids(completion, where)
    ids, length = np.concatenate([first, second]), len(first)
    if mask is not None:
        kept = _mask(mask, len(ids), where)
        ids, length = ids[kept], int(kept[:length].sum())
    if not len(ids):
        raise InvalidInputError(f"{where} is empty: no token ids. Expected at least one; drop empty rollouts.")
    if ids.min() < 0 or ids.max() > _MAX_ID:
        raise InvalidInputError(
            f"{where} has token ids from {ids.min()} to {ids.max()}. Expected ids in [0, {_MAX_ID}]; remove padding "
            "and ignore-index values such as -100."
        )
    return ids, length


def _ids(values: Any, where: str) -> np.ndarray:
    kinds = sorted({type(value).__name__ for value in values}) if isinstance(values, list) else [type(values).__name__]
    if not isinstance(values, list) or any(kind != "int" for kind in kinds):
        what = "a batch of rows" if kinds == ["list"] else f"{', '.join(kinds)} values"
        raise InvalidInputError(
            f"{where} has token ids that are {what}. Expected a list of integers, one rollout a row."
        )
    try:
        return np.asarray(values, dtype=np.int64)
    except OverflowError as error:
        raise InvalidInputError(f"{where} has token ids beyond 64 bits. Expected ids in [0, {_MAX_ID}].") from error


def _mask(values: Any, length: int, where: str) -> np.ndarray:
    if not isinstance(values, list) or len(values) != length or not all(value in (0, 1) for value in values):
        what = f"{len(values)} values" if isinstance(values, list) else f"a {type(values).__name__}"
        raise InvalidInputError(
            f"{where} has {what} as attention_mask. Expected 0 or 1 for each of {length} token ids."
        )
    return np.asarray(values, dtype=bool)


def prompt_length(row: dict[str, Any], ids: Any) -> int:
    """How many of a row's ids belong to the prompt: all before the response, or before the first that is trained on."""
    if not isinstance(ids, list):
        return 0
    response = row.get("response_length")
    if type(response) is int and 0 <= response <= len(ids):
        return len(ids) - response
    for key, unscored in (("loss_mask", 0), ("completion_mask", 0), ("labels", -100)):
        marks = row.get(key)
        if isinstance(marks, list) and len(marks) == len(ids):
            return next((place for place, mark in enumerate(marks) if mark != unscored), 0)
    return 0
