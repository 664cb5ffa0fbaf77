"""Which objective an update maximises."""

from __future__ import annotations

from dta_plugin.diffusion import DiffusionFamily
from dta_plugin.training.diffusion.elbo import BgpoObjective, VrpoObjective
from dta_plugin.training.diffusion.gdsd import GdsdObjective
from dta_plugin.training.diffusion.one_step import OneStepObjective
from dta_plugin.training.diffusion.options import DiffusionOptions
from dta_plugin.training.diffusion.trajectory import TrajectoryObjective
from dta_plugin.training.diffusion.update import Autocast, Objective

_OBJECTIVES: dict[str, type[Objective]] = {
    "bgpo": BgpoObjective,
    "diffu-grpo": OneStepObjective,
    "gdsd": GdsdObjective,
    "trajectory": TrajectoryObjective,
    "vrpo": VrpoObjective,
}


def objective_of(
    options: DiffusionOptions,
    family: DiffusionFamily,
    autocast: Autocast,
    max_length: int,
    epsilon: float,
    beta: float = 0.0,
    iterations: int = 1,
) -> Objective:
    """The one that the options name; for the numbers see `Objective`. Raises InvalidInputError where they cannot be."""
    return _OBJECTIVES[options.objective](options, family, autocast, max_length, epsilon, beta, iterations)
