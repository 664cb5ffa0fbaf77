"""Diffusion language models: how they are asked, how completions are noised, and how they are sampled."""

from dta_plugin.diffusion.family import DiffusionFamily, predictions
from dta_plugin.diffusion.native import bidirectional, family_from_config

__all__ = ["DiffusionFamily", "bidirectional", "family_from_config", "predictions"]
