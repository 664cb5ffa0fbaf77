"""TRL: reinforcement learning of diffusion language models with BGPO and what it is compared with."""

from dta_plugin.adapters.trl.diffusion.config import DiffusionGRPOConfig
from dta_plugin.adapters.trl.diffusion.trainer import DiffusionGRPOTrainer

__all__ = ["DiffusionGRPOConfig", "DiffusionGRPOTrainer"]
