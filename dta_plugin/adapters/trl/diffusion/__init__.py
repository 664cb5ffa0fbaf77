"""TRL: reinforcement learning of diffusion language models with the objectives of `training.diffusion`."""

from dta_plugin.adapters.trl.diffusion.config import DiffusionGRPOConfig
from dta_plugin.adapters.trl.diffusion.trainer import DiffusionGRPOTrainer

__all__ = ["DiffusionGRPOConfig", "DiffusionGRPOTrainer"]
