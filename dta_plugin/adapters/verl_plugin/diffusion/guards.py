"""What verl can be set to that diffusion LMs and their objectives cannot follow: errors, before anything is sampled."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from packaging.version import Version
from transformers.utils import cached_file

from dta_plugin.adapters.verl_plugin.config import DIFFUSION
from dta_plugin.diffusion import family_of
from dta_plugin.diffusion.loading import checkpoint_directory, no_model
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.models.introspection import causal_lm
from dta_plugin.training.diffusion.options import CLIPPED

# loss_agg_mode of verl -> length_norm of an ELBO's difference (`objectives.elbo.length_scale`).
LENGTH_NORMS = {
    "seq-mean-token-sum": "none",
    "seq-mean-token-mean": "length",
    "seq-mean-token-sum-norm": "max_length",
}
_NO_POLICY_LOSS = "the objective takes the place of verl's policy loss"
_NO_CLIPPING = f"verl's clipping is part of a loss that does not run; use {DIFFUSION}.bound_clip and .dual_clip"
_NO_LOG_PROBS = "a diffusion LM has no log-probs of single tokens"
_CLIP_RANGE = ("actor.clip_ratio", "actor.clip_ratio_low", "actor.clip_ratio_high")
# Settings below actor_rollout_ref, the only value that goes, and why.
_ONLY: dict[str, tuple[Any, str]] = {
    "rollout.name": ("hf_cpu", "verl has no other rollout that samples from a diffusion LM"),
    "rollout.calculate_log_probs": (False, _NO_LOG_PROBS),
    "rollout.multi_turn.enable": (False, "a canvas is one turn"),
    "rollout.top_p": (1.0, "the sampler has no top-p"),
    "rollout.top_k": (-1, "the sampler has no top-k"),
    "rollout.val_kwargs.top_p": (1.0, "the sampler has no top-p"),
    "rollout.val_kwargs.top_k": (-1, "the sampler has no top-k"),
    "actor.policy_loss.loss_mode": ("vanilla", _NO_POLICY_LOSS),
    "actor.clip_ratio_c": (3.0, _NO_CLIPPING),
    "actor.loss_scale_factor": (None, "seq-mean-token-sum-norm divides by rollout.response_length"),
    "actor.use_kl_loss": (False, _NO_LOG_PROBS),
    "actor.entropy_coeff": (0, _NO_LOG_PROBS),
    "actor.calculate_entropy": (False, _NO_LOG_PROBS),
    "actor.calculate_sum_pi_squared": (False, _NO_LOG_PROBS),
    "model.use_fused_kernels": (False, "they are for tokens that come one after the other"),
}


def check_settings(config: DictConfig, objective: str) -> None:
    """config: `actor_rollout_ref`. Raises UnsupportedError for verl 0.8 and for what does not fit."""
    found = version("verl")
    if Version(found).release < (0, 9):
        raise UnsupportedError(
            f"verl {found} is installed. Expected 0.9 or newer with {DIFFUSION}: its data path carries ELBO terms."
        )
    mode = config.actor.loss_agg_mode
    if mode not in LENGTH_NORMS:
        raise _unfit("actor.loss_agg_mode", mode, f"one of {', '.join(LENGTH_NORMS)}", "a likelihood is a response's")
    if objective == "gdsd" and LENGTH_NORMS[mode] != "max_length":
        raise _unfit("actor.loss_agg_mode", mode, "seq-mean-token-sum-norm", "gdsd divides by the width of the canvas")
    ranges = {} if objective in CLIPPED else dict.fromkeys(_CLIP_RANGE, (0.2, _NO_CLIPPING))
    for name, (only, reason) in (_ONLY | ranges).items():
        given = OmegaConf.select(config, name, default=only)
        if given != only:
            raise _unfit(name, given, only, reason)


def check_path(path: str) -> None:
    """Raise InvalidInputError where `actor_rollout_ref.model.path` is no model; of remote storage verl can tell."""
    if "://" in path:
        return
    try:
        if Path(path).is_dir():
            checkpoint_directory(path)
        else:
            cached_file(path, "config.json")
    except OSError as error:
        raise no_model(path, error) from error


def clip_range(config: DictConfig) -> float:
    """For objectives that have one (`CLIPPED`): verl's clip_ratio_low and clip_ratio_high, which have to be the same.

    verl's own losses read these two; clip_ratio may say the same, or is at its default.
    """
    given = [OmegaConf.select(config, name, default=0.2) for name in _CLIP_RANGE]
    if given[1] != given[2] or given[0] not in (0.2, given[1]):
        raise _unfit("actor.clip_ratio, clip_ratio_low, clip_ratio_high", given, given[1], "ratios have one range")
    return float(given[1])


def check_model(module: Any, is_diffusion: bool) -> None:
    """Raises UnsupportedError for a diffusion LM without diffusion options, InvalidInputError for dropout.

    A model that attends in both directions is never run as a causal one: it would see the tokens that it predicts.
    """
    if is_diffusion:
        config = causal_lm(module).config
        rate = getattr(config.get_text_config(), "attention_dropout", 0.0)
        if rate:
            raise InvalidInputError(
                f"attention_dropout={rate}. Expected 0: the old and the new policy's ELBO terms differ by the update "
                "alone; set it in the model's config."
            )
    elif _is_diffusion_lm(module):
        raise UnsupportedError(
            f"{type(causal_lm(module)).__name__} is a diffusion LM: it sees the tokens that verl's losses would have "
            f"it predict. Expected a causal model, or '+{DIFFUSION}={{num_elbo_samples: 16}}'."
        )


def _is_diffusion_lm(module: Any) -> bool:
    with suppress(InvalidInputError, UnsupportedError):  # what is no language model at all is not ours to judge
        config = causal_lm(module).config
        if getattr(config.get_text_config(), "is_causal", None) is False:
            return True
        family_of(config)
        return True
    return False


def _unfit(name: str, given: Any, expected: Any, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"Got actor_rollout_ref.{name}={given!r} with {DIFFUSION}. Expected {expected!r}: {reason}."
    )
