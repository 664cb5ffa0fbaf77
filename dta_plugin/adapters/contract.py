"""The check that what an adapter relies on in a framework, beyond its documented interface, is there.

What is gone or called otherwise would show in the middle of a training, or not at all where it is read with a default.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

from dta_plugin.adapters.releases import MEGATRON_CORE, TORCH, TRANSFORMERS, TRL, VERL, counted_as
from dta_plugin.errors import UnsupportedError

_RELEASES = {releases.module: releases for releases in (TRL, VERL, TRANSFORMERS, TORCH, MEGATRON_CORE)}


@dataclass(frozen=True, slots=True)
class Name:
    """path: "module:function", "module:Class.method". parameters: what is given or taken by name, in this order.

    is_own: the class itself has it, and no base. is_optional: some releases lack it; where it is, it is as said here.
    """

    path: str
    parameters: tuple[str, ...] = ()
    is_own: bool = False
    is_optional: bool = False

    @property
    def package(self) -> str:
        return self.path.partition(":")[0].partition(".")[0]


def require(names: Iterable[Name]) -> None:
    """Raises UnsupportedError where one of them is missing, or has other parameters."""
    faults: dict[str, list[str]] = {}
    for name in names:
        fault = _fault(name)
        if fault is not None:
            faults.setdefault(name.package, []).append(fault)
    _refuse(faults)


def require_attributes(instance: object, attributes: Mapping[str, str], package: str) -> None:
    """The same for what only instances have. attributes: by name the release of the package that they came with.

    One that is newer than what is installed is not asked for.
    """
    installed = counted_as(metadata.version(package))
    names = [name for name, since in attributes.items() if installed >= counted_as(since)]
    missing = [f"{type(instance).__name__} has no {name}" for name in names if not hasattr(instance, name)]
    _refuse({package: missing} if missing else {})


def _refuse(faults: Mapping[str, list[str]]) -> None:
    """Raise if there are any. faults: by package."""
    if not faults:
        return
    sentences = []
    for package, found in faults.items():
        releases = _RELEASES[package]
        installed = metadata.version(releases.package)
        sentences.append(
            f"{releases.name} {installed} is not as the plugin needs it: {'; '.join(found)}. Expected "
            f"what {releases.tested} have; {releases.remedy}."
        )
    raise UnsupportedError(" ".join(sentences))


def _fault(name: Name) -> str | None:
    """What is wrong with what a name stands for, or None."""
    found = _found(name)
    if found is None:
        return None if name.is_optional else f"{name.path} is missing"
    if not name.parameters or not _is_theirs(found, name.package):
        return None
    own = inspect.signature(found).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
    missing = [parameter for parameter in name.parameters if parameter not in own]
    if missing and not takes_any:
        return f"{name.path} has no parameter {', '.join(missing)}"
    expected = [parameter for parameter in name.parameters if parameter in own]
    if [parameter for parameter in own if parameter in expected] != expected:
        return f"{name.path} has its parameters {', '.join(expected)} in another order"
    return None


def _found(name: Name) -> Any:
    """What a name stands for, or None."""
    module, _, path = name.path.partition(":")
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # of something else, which the framework needs
        return None
    *owners, last = path.split(".")
    for owner in owners:
        found = getattr(found, owner, None)
    return vars(found).get(last) if name.is_own and found is not None else getattr(found, last, None)


def _is_theirs(function: Any, package: str) -> bool:
    """Whether the code is the framework's. What somebody has put in its place may take what it likes."""
    code = getattr(inspect.unwrap(function), "__globals__", {})
    return str(code.get("__name__")).partition(".")[0] == package
