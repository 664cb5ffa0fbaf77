"""What the recipes for verl hand to it, composed by Hydra: an option that verl's own config lacks is an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hydra import compose, initialize_config_module
from omegaconf import DictConfig

RECIPES = Path(__file__).parents[3] / "recipes"
SHOW_ARGUMENTS = f"""#!{sys.executable}
import json, sys
print(json.dumps(sys.argv[1:]))
"""


def command_of(script: Path, folder: Path, nodes: int = 1) -> list[str]:
    """What a recipe hands to Python."""
    python = folder / "python"
    python.write_text(SHOW_ARGUMENTS)
    python.chmod(0o755)
    done = subprocess.run(
        [script, "trainer.total_epochs=7"],
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "NNODES": str(nodes)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def config_of(script: Path, folder: Path, nodes: int = 1) -> tuple[str, DictConfig]:
    """The module that a recipe runs, and its config. nodes: machines, for those that run on several."""
    dash_m, module, *overrides = command_of(script, folder, nodes)
    assert dash_m == "-m" and overrides[-1] == "trainer.total_epochs=7", "options of the command line come last"
    if module == "dta_plugin.adapters.verl_cpu":
        from dta_plugin.adapters.verl_cpu.__main__ import with_defaults

        overrides = with_defaults(overrides)
    with initialize_config_module("verl.trainer.config", version_base=None):
        return module, compose("ppo_trainer", [text for text in overrides if not text.startswith("hydra.")])
