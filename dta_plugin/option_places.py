"""Which options do something where: no option is silently without effect.

Every field of TreeConfig says what has to be there for it (`applies_to`), and every place that takes options says what
it has. An option that is set where it can do nothing is an error, or, where options are those of a whole process, one
line.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from typing import Any

from dta_plugin.errors import InvalidInputError


class Scope(Enum):
    """What an option needs to have an effect."""

    CALL = "calls of a model"
    BATCH = "log-probs of a batch of sequences"
    TRAINING = "a training"
    LOSS = "a loss whose log-probs are computed here"
    WINDOW = "the accumulation windows of all ranks"


def option(default: object, help: str, applies_to: Scope, elsewhere: object = MISSING) -> Any:
    """A field of options. elsewhere: the value that says what happens anyway where the option does not apply."""
    return field(default=default, metadata={"help": help, "applies_to": applies_to, "elsewhere": elsewhere})


@dataclass(frozen=True, slots=True)
class Place:
    """Where options are given.

    name: with its preposition, such as "in share_prefixes". has: what is there. reason: why the others do nothing.
    reasons: the same of single options, with what to do instead.
    """

    name: str
    has: Collection[Scope]
    reason: str
    reasons: Mapping[str, str] = field(default_factory=dict)

    def check(self, options: Any, given: Collection[str] | None = None, prefix: str = "") -> None:
        """Raise InvalidInputError for options that do nothing here.

        options, given: as for `without_effect`. prefix: of options' names as they are given here.
        """
        found = self._idle(options, given)
        if found:
            names = ", ".join(each.name for each in fields(options) if self._applies(each))
            it = "it" if len(found) == 1 else "them"
            raise InvalidInputError(f"{self._line(options, found, prefix)}. Leave {it} out. Expected only {names}.")

    def without_effect(self, options: Any, given: Collection[str] | None = None) -> str | None:
        """One line about the options that do nothing here, or None.

        options: a dataclass with fields of `option`. given: names of those that were written down; None: whatever is
        neither at its default nor what happens here anyway.
        """
        found = self._idle(options, given)
        return self._line(options, found) if found else None

    def applying(self, options: Any) -> Any:
        """The same options with those that do nothing here at their defaults."""
        return type(options)(
            **{each.name: getattr(options, each.name) for each in fields(options) if self._applies(each)}
        )

    def _applies(self, each: Field[Any]) -> bool:
        return each.metadata["applies_to"] in self.has

    def _idle(self, options: Any, given: Collection[str] | None) -> list[Field[Any]]:
        def is_set(each: Field[Any]) -> bool:
            if given is not None:
                return each.name in given
            return getattr(options, each.name) not in (each.default, each.metadata["elsewhere"])

        return [each for each in fields(options) if is_set(each) and not self._applies(each)]

    def _line(self, options: Any, found: list[Field[Any]], prefix: str = "") -> str:
        values = ", ".join(f"{prefix}{each.name}={getattr(options, each.name)!r}" for each in found)
        reasons = dict.fromkeys(self.reasons.get(each.name, self.reason) for each in found)
        return f"{values} {'does' if len(found) == 1 else 'do'} nothing {self.name}: {'; '.join(reasons)}"
