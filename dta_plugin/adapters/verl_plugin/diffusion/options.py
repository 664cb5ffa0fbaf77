"""Options of diffusion LMs in a verl command: `+actor_rollout_ref.rollout.custom.dta.diffusion={<field>: <value>}`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dta_plugin.adapters.verl_plugin.config import DIFFUSION, dta_options
from dta_plugin.errors import InvalidInputError
from dta_plugin.training.diffusion.options import DiffusionOptions

_ELSEWHERE = {"length_norm": "actor_rollout_ref.actor.loss_agg_mode"}  # what settings of verl say


def diffusion_options(rollout: Any) -> DiffusionOptions | None:
    """Those of a rollout config (a DictConfig, or verl's RolloutConfig); None where there are none.

    Raises InvalidInputError for unknown options and values that are not allowed, and where other options of the plugin
    are given: they are about prefix trees.
    """
    options = dta_options(rollout)
    if "diffusion" not in options:
        return None
    given = options.pop("diffusion")
    if options:
        raise InvalidInputError(
            f"Got {', '.join(options)} besides {DIFFUSION}. Expected nothing else: they are about attention from "
            f"left to right; what a diffusion LM can share, {DIFFUSION}.share_prompts says. Leave them out."
        )
    known = [field.name for field in fields(DiffusionOptions) if field.name not in _ELSEWHERE]
    if not isinstance(given, Mapping) or set(given) - {*known, *_ELSEWHERE}:
        raise InvalidInputError(
            f"Got {DIFFUSION}={given!r}. Expected a mapping with fields among {', '.join(known)}, such as "
            f"'+{DIFFUSION}={{num_elbo_samples: 16}}'."
        )
    try:
        for name, setting in _ELSEWHERE.items():
            if name in given:
                raise InvalidInputError(f"{name}={given[name]!r}. Expected none; set {setting}, which decides here.")
        found = DiffusionOptions(**given)
        found.sampler_config(int(rollout.get("response_length")), 1.0, found.attention_block_length)
    except InvalidInputError as error:
        raise InvalidInputError(f"In {DIFFUSION}: {error}") from None
    if found.objective == "diffu-grpo":
        raise InvalidInputError(
            f"In {DIFFUSION}: objective='diffu-grpo'. Expected 'bgpo', 'gdsd', 'trajectory' or 'vrpo': verl's data "
            "carries a number per sample of the old policy, not log-probs of tokens under one mask per epoch."
        )
    return found
