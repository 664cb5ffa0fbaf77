"""Options of diffusion LMs in a verl command: `+actor_rollout_ref.rollout.custom.dta.diffusion={<field>: <value>}`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from dta_plugin.adapters.verl_plugin.config import DIFFUSION, dta_options
from dta_plugin.diffusion import SamplerConfig, draw_masks
from dta_plugin.diffusion.objectives.bgpo import bound_terms
from dta_plugin.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionOptions:
    """How responses are sampled and scored. Raises InvalidInputError for values that are not allowed.

    samples, form, stratified, coupled: the noise of an ELBO, as in `draw_masks`. clip, dual_clip: as in `bound_terms`.
    block_length, steps, remasking, guidance_scale: as in `SamplerConfig`; the canvas has rollout.response_length
    tokens, and steps None is one token per model call. fillers: whether the end tokens that fill the canvas after the
    first one belong to the response, to be seen and scored; else a response ends with its first end token.
    """

    samples: int = 16
    form: str = "k"
    stratified: bool = True
    coupled: bool = False
    clip: float | None = None
    dual_clip: float | None = None
    block_length: int = 32
    steps: int | None = None
    remasking: str = "low_confidence"
    guidance_scale: float = 0.0
    fillers: bool = False

    def __post_init__(self) -> None:
        one, nothing = torch.ones(1, dtype=torch.int64), torch.zeros(1)
        draw_masks(one, self.samples, one, self.form, self.stratified, self.coupled)
        bound_terms(nothing, nothing, self.samples, self.clip, self.dual_clip)

    @classmethod
    def of(cls, rollout: Any) -> DiffusionOptions | None:
        """Those of a rollout config (a DictConfig, or verl's RolloutConfig); None where there are none.

        Raises InvalidInputError also where other options of the plugin are given: they are about prefix trees.
        """
        options = dta_options(rollout)
        if "diffusion" not in options:
            return None
        given = options.pop("diffusion")
        if options:
            raise InvalidInputError(
                f"Got {', '.join(options)} besides {DIFFUSION}. Expected nothing else: a diffusion LM sees what comes "
                "after a prompt, so that no prefix can be shared. Leave them out."
            )
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or set(given) - set(known):
            raise InvalidInputError(
                f"Got {DIFFUSION}={given!r}. Expected a mapping with fields among {', '.join(known)}, such as "
                f"'+{DIFFUSION}={{samples: 16}}'."
            )
        try:
            found = cls(**given)
            found.sampler(int(rollout.get("response_length")), 1.0)
        except InvalidInputError as error:
            raise InvalidInputError(f"In {DIFFUSION}: {error}") from None
        return found

    def sampler(self, response_length: int, temperature: float) -> SamplerConfig:
        """How a canvas of so many tokens is filled."""
        return SamplerConfig(
            gen_length=response_length,
            block_length=self.block_length,
            steps=response_length if self.steps is None else self.steps,
            temperature=temperature,
            remasking=self.remasking,
            guidance_scale=self.guidance_scale,
        )
