"""Diffusion language models: how they are asked, how completions are noised, and how they are sampled."""

from dta_plugin.diffusion.family import DiffusionFamily, predictions

__all__ = ["DiffusionFamily", "predictions"]
