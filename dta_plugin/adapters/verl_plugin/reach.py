"""The installed verl: whether it is supported (releases whose one path is engines), and which trainers are reached."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from packaging.version import Version

from dta_plugin.adapters.releases import VERL, say_if_untested, supported_release
from dta_plugin.errors import InvalidInputError

MODULE = "dta_plugin.adapters.verl"
_PACKAGE, _CPU_PLATFORM = "dta_plugin", "dta_plugin.adapters.verl_cpu"  # the latter serves stock verl, too
EXTERNAL_MODULES = "VERL_USE_EXTERNAL_MODULES"  # what verl imports in every process
EXTERNAL_PLUGINS = "VERL_USE_EXTERNAL_PLUGINS"  # the entry points that it imports besides: auto, none or names
ENTRY_POINT = "dta_plugin"


def checked_version() -> str:
    """The installed version of verl; one line where it is newer than what was tested.

    Raises UnsupportedError outside the supported range.
    """
    found = supported_release(VERL, f", or leave external_lib={MODULE} out")
    say_if_untested(VERL)
    return found


def unreached_trainer(found: str) -> str | None:
    """Why the plugin cannot extend the trainer of a run, and the remedy; None where it can, as in 0.9."""
    if Version(found).release >= (0, 9):
        return None
    if not _is_external_module():
        return f"verl {found} imports external_lib in workers only; export {EXTERNAL_MODULES}={MODULE} as well"
    if any("main_ppo_sync" in argument for argument in sys.orig_argv):  # a class of the script itself
        return "main_ppo_sync has a trainer of its own, out of reach; run verl.trainer.main_ppo"
    return None


def check_names(external_lib: str | Sequence[str] | None) -> None:
    """Raises InvalidInputError where a setting `external_lib` names a module of the package that turns nothing on."""
    for name in () if names_plugin(external_lib) else _names(external_lib):
        if name.partition(".")[0] == _PACKAGE and not name.startswith(_CPU_PLATFORM):
            raise InvalidInputError(
                f"Got external_lib={name}, which does not turn prefix trees on. Expected external_lib={MODULE}."
            )


def names_plugin(external_lib: str | Sequence[str] | None) -> bool:
    """Whether a setting `external_lib`, one name or several, has the plugin in it."""
    return MODULE in _names(external_lib)


def _names(external_lib: str | Sequence[str] | None) -> list[str]:
    named = external_lib or []
    return [named] if isinstance(named, str) else list(named)


def chosen_in(model: Mapping[str, Any]) -> bool:
    """Whether a model's settings ask for the plugin; `use_dta` is a setting of a verl with `patches/verl-*.diff`."""
    return bool(model.get("use_dta")) or names_plugin(model.get("external_lib"))


def unreached_separate_trainer(worker: type) -> str | None:
    """Why the trainer of a worker whose rollouts run elsewhere may not have the plugin, and the remedy; None if it has.

    `one_step_off_policy` and `fully_async_policy` do not import external_lib themselves.
    """
    if not any(kind.__module__.startswith("verl.experimental.separation") for kind in worker.__mro__):
        return None
    reason = no_entry_point()
    return None if reason is None else f"in one_step_off_policy and fully_async_policy, {reason}"


def no_entry_point() -> str | None:
    """Why verl does not import the plugin's entry point in every process, and the remedy; None where it does."""
    allowed = os.environ.get(EXTERNAL_PLUGINS, "auto").strip().lower()
    is_allowed = allowed == "auto" or ENTRY_POINT in map(str.strip, allowed.split(","))
    is_found = any(point.name == ENTRY_POINT for point in entry_points(group="verl.plugins"))
    if _is_external_module() or (is_allowed and is_found):
        return None
    reason = f"{EXTERNAL_PLUGINS}={allowed} leaves it out" if is_found else "it is not an installed package here"
    return (
        f"verl finds the plugin by its entry point, and {reason}; install it with pip, or export "
        f"{EXTERNAL_MODULES}={MODULE}"
    )


def _is_external_module() -> bool:
    return MODULE in os.environ.get(EXTERNAL_MODULES, "").split(",")
