"""The reward of every rollout of a file, where the file says one; what only looks like one is named, not passed over.

Read are, in this order:

    the keys that the caller names      --reward accuracy, --reward rewards.format; several are added
    one of TOTALS                       a number, or a list of one per rollout of the row
    an object under one of these        its own total (one of _WITHIN), or its only number
    the one key with "reward" or "score" in its name that holds a number

In a log of completions, which has an `advantage` beside a column per reward function, every other number counts as a
reward. Weights of several rewards are in no file, so that they are added only if the caller asks for it; one that a row
lacks, or that is NaN there, then counts as nothing, as trainers have it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from dta_plugin.errors import InvalidInputError, did_you_mean

TOTALS = ("reward", "score", "rewards", "scores", "total_reward")
_WITHIN = ("reward", "score", "total", "total_reward", "overall")
_LOG_COLUMNS = ("step", "advantage")
_LARGEST = sys.float_info.max
_NAMED = 6  # keys in a message


def at(row: Any, path: str) -> Any:
    """What stands under a key, or under keys joined by dots; of each item of a list. None if nothing does."""
    if not isinstance(row, dict):
        return None
    if path in row:
        return row[path]
    key, _, rest = path.partition(".")
    if not rest or key not in row:
        return None
    found = row[key]
    return [at(item, rest) for item in found] if isinstance(found, list) else at(found, rest)


def number(value: Any) -> float | None:
    """The value as a finite number, or None."""
    return float(value) if isinstance(value, (int, float)) and abs(value) <= _LARGEST else None


class Rewards:
    """Reads rewards row by row, and keeps where they came from and what could not be read.

    asked: the caller's keys, separated by commas. sources: the keys that were read, each once. unread: what the first
    row has that looks like a reward and is none, with its place; None if there was no such row.
    """

    def __init__(self, asked: str | None = None) -> None:
        self.keys = [key.strip() for key in asked.split(",") if key.strip()] if asked is not None else []
        if asked is not None and not self.keys:
            raise InvalidInputError(f"--reward {asked!r} names no key. Expected one, or several separated by commas.")
        self.sources: dict[str, None] = {}
        self.unread: str | None = None
        self._first_keys: list[str] = []

    @property
    def name(self) -> str:
        """The keys that were read, as the report names them."""
        return (" + " if self.keys else " or ").join(self.sources)

    def read(self, row: Any, count: int, where: str) -> list[float | None]:
        """One per rollout of the row."""
        if not isinstance(row, dict):
            return [None] * count
        self._first_keys = self._first_keys or list(row)
        if not self.keys:
            key, value = self._found(row, where)
            return [None] * count if key is None else self._each(key, value, count, where)
        columns = [self._each(key, at(row, key), count, where) for key in self.keys if at(row, key) is not None]
        return [_added(values) for values in zip(*columns, strict=True)] if columns else [None] * count

    def check(self) -> None:
        """After the last row: raises InvalidInputError if the keys that the caller named held no number anywhere."""
        missing = [key for key in self.keys if not any(f"{name}.".startswith(f"{key}.") for name in self.sources)]
        if missing:
            hint = did_you_mean(missing[0], self._first_keys)
            raise InvalidInputError(
                f"--reward {missing[0]}: no row has a number there.{hint} Expected a key such as "
                f"{', '.join(self._first_keys[:_NAMED]) or '(rows without keys have none)'}; within an object as "
                "rewards.accuracy."
            )

    def _found(self, row: dict[str, Any], where: str) -> tuple[str | None, Any]:
        """The key that holds the reward, and what it holds."""
        for key in TOTALS:
            if row.get(key) is not None:
                return key, row[key]
        is_log = row.keys() >= {"advantage", "completion"}
        others = {key: value for key, value in row.items() if key not in _LOG_COLUMNS}
        alike = [key for key, value in others.items() if (is_log or _is_named(key)) and isinstance(value, (int, float))]
        alike = alike or [key for key, value in others.items() if _is_named(key) and _holds_numbers(value)]
        if len(alike) > 1:
            self._miss(where, f"the row has {_listed(alike)}, and no total", alike)
        return (alike[0], row[alike[0]]) if len(alike) == 1 else (None, None)

    def _each(self, key: str, value: Any, count: int, where: str) -> list[float | None]:
        values = value if isinstance(value, list) and len(value) == count else [value] * count
        return [self._one(key, item, where) for item in values]

    def _one(self, key: str, value: Any, where: str) -> float | None:
        found = _from_text(value) if isinstance(value, str) else number(value)
        if isinstance(value, dict):
            inner = _total(value)
            if inner is None:
                names = [f"{key}.{name}" for name, item in value.items() if number(item) is not None]
                held = f"{key} is an object of {_listed(list(value)) or 'nothing'}, and no total"
                self._miss(where, held, names)
                return None
            key, found = f"{key}.{inner}", number(value[inner])
        if found is not None:
            self.sources[key] = None
        elif value is not None and not isinstance(value, dict):
            is_number = isinstance(value, (int, float))
            self._miss(where, f"{key} is {'no finite number' if is_number else _kind(value)}", [])
        return found

    def _miss(self, where: str, what: str, names: list[str]) -> None:
        """names: the keys that could be asked for."""
        if self.unread is None:
            remedy = "Expected a number, or one per rollout of the row; another key: --reward KEY."
            if names:
                remedy = f"Take one: --reward {names[0]}"
                remedy += f", or their sum: --reward {','.join(names[:_NAMED])}." if len(names) > 1 else "."
            self.unread = f"{where}: {what}. {remedy}"


def _from_text(value: str) -> float | None:
    """The number that a text is: tables converted to JSON hold such."""
    try:
        return number(float(value))
    except ValueError:
        return None


def _is_named(key: str) -> bool:
    """Whether a key's name says that it holds rewards; a reward_model holds what they are computed from."""
    name = key.lower()
    return ("reward" in name or "score" in name) and "model" not in name


def _holds_numbers(value: Any) -> bool:
    items = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []
    return any(number(item) is not None for item in items)


def _total(value: dict[str, Any]) -> str | None:
    """The key of an object's total, or of its only number."""
    numbers = [name for name, item in value.items() if number(item) is not None]
    return next((name for name in _WITHIN if name in numbers), numbers[0] if len(numbers) == 1 else None)


def _added(values: tuple[float | None, ...]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _listed(names: list[str]) -> str:
    return ", ".join(_clipped(names))


def _clipped(names: list[str]) -> Iterator[str]:
    yield from (name[:60] for name in names[:_NAMED])
    if len(names) > _NAMED:
        yield ".."


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "a text"
    return f"a list of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"
