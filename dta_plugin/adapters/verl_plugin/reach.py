"""The installed verl: whether it is supported (releases whose one path is engines), and what is out of reach in 0.8."""

from __future__ import annotations

import os
import sys

from packaging.version import Version

from dta_plugin.adapters.releases import VERL, say_if_untested, supported_release

MODULE = "dta_plugin.adapters.verl"
EXTERNAL_MODULES = "VERL_USE_EXTERNAL_MODULES"  # what verl imports in every process


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
    if MODULE not in os.environ.get(EXTERNAL_MODULES, "").split(","):
        return f"verl {found} imports external_lib in workers only; export {EXTERNAL_MODULES}={MODULE} as well"
    if any("main_ppo_sync" in argument for argument in sys.orig_argv):  # a class of the script itself
        return "main_ppo_sync has a trainer of its own, out of reach; run verl.trainer.main_ppo"
    return None
