"""Values of options against the types of their fields: choices, whole numbers, numbers."""

from __future__ import annotations

import functools
from numbers import Integral, Real
from types import NoneType
from typing import Any, get_args, get_type_hints

from dta_plugin.errors import InvalidInputError


@functools.cache
def types_of(options: type) -> dict[str, Any]:
    """The type of every field of a dataclass, resolved. Shared: to be read, not changed."""
    return get_type_hints(options)


def choices(kind: Any) -> tuple[str, ...]:
    """What an option of this type can be, if it is one of a few texts; empty for other types."""
    return tuple(choice for choice in get_args(_given(kind)) if isinstance(choice, str))


def allows_none(kind: Any) -> bool:
    """Whether an option of this type can be None."""
    return NoneType in get_args(kind)


def check_type(name: str, value: object, kind: Any) -> None:
    """Raise InvalidInputError for a value that is none of an option's choices, or no number where one is expected.

    kind: type of the field. Texts that are free are left to checks of their own. A bool is no number.
    """
    if value is None and allows_none(kind):
        return
    allowed, expected, given = choices(kind), "", _given(kind)
    if allowed:
        quote = " (a bare off in YAML means false: quote it)" if "off" in allowed else ""
        is_valid, expected = value in allowed, f"one of {', '.join(allowed)}{quote}"
    elif given is int:
        is_valid, expected = isinstance(value, Integral) and not isinstance(value, bool), "a whole number"
    elif given is float:
        is_valid, expected = isinstance(value, Real) and not isinstance(value, bool), "a number"
    else:
        return
    if not is_valid:
        or_none = "None or " if allows_none(kind) else ""
        raise InvalidInputError(f"{name}={value!r}. Expected {or_none}{expected}.", option=name)


def from_text(name: str, text: str, kind: Any) -> Any:
    """An option's value as the type of its field; None for "none" where that is allowed.

    Raises InvalidInputError for a text that is no such number. Choices are not checked.
    """
    if allows_none(kind) and text.lower() == "none":
        return None
    given = _given(kind)
    if given not in (int, float):
        return text
    try:
        return given(text)
    except ValueError:
        raise InvalidInputError(f"{name}={text!r}. Expected a value of type {given.__name__}.", option=name) from None


def _given(kind: Any) -> Any:
    """The type of an option that is not None."""
    return (
        next(alternative for alternative in get_args(kind) if alternative is not NoneType)
        if allows_none(kind)
        else kind
    )
