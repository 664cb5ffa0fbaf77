"""Diffusion language models: how they are asked, how completions are noised, and how they are sampled."""

from dta_plugin.diffusion.families import family_of
from dta_plugin.diffusion.family import DiffusionFamily, predictions
from dta_plugin.diffusion.loading import load_diffusion_lm, save_diffusion_lm
from dta_plugin.diffusion.masks import MaskDraws, draw_masks, prompt_noise
from dta_plugin.diffusion.native import bidirectional, family_from_config
from dta_plugin.diffusion.sampler import SampledCompletions, sample
from dta_plugin.diffusion.sampler_config import SamplerConfig

__all__ = [
    "DiffusionFamily",
    "MaskDraws",
    "SampledCompletions",
    "SamplerConfig",
    "bidirectional",
    "draw_masks",
    "family_from_config",
    "family_of",
    "load_diffusion_lm",
    "predictions",
    "prompt_noise",
    "sample",
    "save_diffusion_lm",
]
