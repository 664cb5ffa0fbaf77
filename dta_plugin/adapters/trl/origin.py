"""Whose methods stand between the generated rows and the loss: TRL's, or somebody else's.

Rows may be moved, left out or weighted only where it is known what the loss reads of them, as of TRL's own methods. A
method of any other origin may look at a whole micro-batch, at every token, or skip steps, so its inputs stay as TRL
made them. Origin is the module whose code runs, decorators and patches included, not a name: a subclass, a patch of the
class or of one trainer, and a mixin behind TRL's classes are all found. `upstream` has the names of TRL's methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from dta_plugin.adapters.trl.losses import LEVELS, LOSS_TYPES
from dta_plugin.adapters.trl.upstream import HOOK, LOSS, PREPARE, SCORING

# The last one is what `patches/` adds to TRL.
_OURS = (
    "dta_plugin.adapters.trl.patch",
    "dta_plugin.adapters.trl.trainer",
    "dta_plugin.adapters.trl.async_grpo",
    "trl.extras.dta",
)
_TRL = ("trl.trainer.", "trl.extras.", "transformers.", "accelerate.", "torch.")
# Losses outside of TRL's own trainers in which a row's gradient does not depend on the rows beside it.
_ROW_LOCAL = ("trl.experimental.gmpo.",)


# What transformers and TRL call in a step of a trainer without the log-prob hook.
STEP = (
    "training_step",
    "_prepare_inputs",
    "compute_loss",
    "_compute_loss",
    "concatenated_forward",
    "get_batch_loss_metrics",
    "prediction_step",
)
LIBRARIES = ("transformers.", "accelerate.", "torch.", "trl.extras.profiling")


class _Link(NamedTuple):
    """One function in the chain that a call runs through. owner: the class, or the trainer, that has it."""

    module: str
    owner: str
    name: str

    @property
    def is_ours(self) -> bool:
        return self.module in _OURS

    def is_foreign(self, known: tuple[str, ...] = _TRL) -> bool:
        return not self.is_ours and not self.module.startswith(known)

    def __str__(self) -> str:
        return f"{self.owner}.{self.name} comes from {self.module}"


def unknown_loss(trainer: object) -> str | None:
    """Why it is not known what the loss does with the rows of a micro-batch, or None where it is TRL's."""
    return _unknown(trainer, _TRL + _ROW_LOCAL)


def unknown_terms(trainer: object) -> str | None:
    """Why it is not known which tokens the loss reads, or None where it is TRL's."""
    return _unknown(trainer, _TRL)


def is_async(trainer: object) -> bool:
    """Whether it is TRL's asynchronous GRPO trainer, which must not be imported to ask."""
    return any(base.__name__ == "AsyncGRPOTrainer" for base in type(trainer).__mro__)


def hook_of(trainer: object) -> str:
    """The method by which the plugin gets log-probs asked for: the log-prob hook; the loss of trainers without one."""
    return HOOK if hasattr(trainer, HOOK) else "compute_loss"


def foreign_reader(trainer: object) -> str | None:
    """Who reads the inputs of the plugin's hook before the plugin does; None if nobody does."""
    for link in _links(trainer, hook_of(trainer)):
        if link.is_ours:
            return None
        if link.is_foreign():
            return str(link)
    return f"{type(trainer).__name__}.{hook_of(trainer)} is not the plugin's"


def has_our_hook(trainer: object) -> bool:
    """Whether a call of the hook can reach the plugin."""
    return any(link.is_ours for link in _links(trainer, hook_of(trainer)))


def foreign_method(owner: object, names: Iterable[str], known: tuple[str, ...]) -> str | None:
    """The first of these methods whose module begins like none of the `known` ones, in words, or None."""
    links = (link for name in names for link in _links(owner, name))
    return next((str(link) for link in links if link.is_foreign(known)), None)


def foreign_step(trainer: object, model: object) -> str | None:
    """What of a trainer's step, or of its model's own head and loss, is of no library, in words, or None."""
    known = (*LIBRARIES, "trl.", "dta_plugin.", "peft.")
    own_loss = getattr(trainer, "compute_loss_func", None)
    return (
        foreign_method(trainer, STEP, known)
        or foreign_method(model, ("forward",), known)
        or (None if own_loss is None else "the trainer has compute_loss_func")
    )


def replaced_scoring(trainer: object) -> str | None:
    """Whose way to compute log-probs a tree would run in place of, where it is not TRL's; with the remedy."""
    behind = [link for name in SCORING for link in _behind_us(_links(trainer, name), everywhere=name != HOOK)]
    link = next((link for link in behind if link.is_foreign()), None)
    if link is None:
        return None
    return (
        f"{link}, and a tree would run in its place; put it in front (dta_plugin.enable() first, then the subclass or "
        "patch that calls TRL's own method)"
    )


def replaced_preparation(trainer: object) -> bool:
    """Whether somebody else picks or changes the micro-batch before the plugin does."""
    return any(link.is_foreign() for link in _behind_us(_links(trainer, PREPARE)))


def _unknown(trainer: object, known: tuple[str, ...]) -> str | None:
    links = (link for name in LOSS for link in _links(trainer, name))
    foreign = next((link for link in links if link.is_foreign(known)), None)
    if foreign is not None:
        return f"{foreign}, whose use of them is not known"
    for name, values in (("loss_type", tuple(LOSS_TYPES)), ("importance_sampling_level", LEVELS)):
        value = getattr(trainer, name, None)
        if value is not None and value not in values:
            return f"{name}={value!r} is not among those known, {', '.join(values)}"
    return None


def _behind_us(links: Iterable[_Link], everywhere: bool = False) -> Iterator[_Link]:
    """The links that come after the plugin's first, or all."""
    seen = everywhere
    for link in links:
        if seen:
            yield link
        seen = seen or link.is_ours


def _links(trainer: object, name: str) -> Iterator[_Link]:
    """All functions that a call may run through, outermost first: of the trainer, its class, and every base."""
    if name in vars(trainer):
        yield from _unwrapped(vars(trainer)[name], f"this {type(trainer).__name__}", name)
    for base in type(trainer).__mro__:
        if name in vars(base):
            yield from _unwrapped(vars(base)[name], base.__name__, name)


def _unwrapped(function: Any, owner: str, name: str) -> Iterator[_Link]:
    """A function and what it says it wraps; partial objects and the like count as what they are."""
    while function is not None:
        function = getattr(function, "__func__", function)
        code = getattr(function, "__globals__", None)
        yield _Link(str(code.get("__name__")) if code is not None else type(function).__module__, owner, name)
        function = getattr(function, "__wrapped__", None)
