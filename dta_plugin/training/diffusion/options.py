"""DiffusionOptions: what is maximised, how completions are noised and sampled; one set, whatever the framework.

Adapters offer the fields under these names, with these defaults and texts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PretrainedConfig

from dta_plugin.diffusion import DiffusionFamily, SamplerConfig, family_of
from dta_plugin.diffusion.masks import FORMS, check_samples
from dta_plugin.diffusion.objectives.bgpo import check_clips
from dta_plugin.diffusion.objectives.elbo import NORMS
from dta_plugin.diffusion.prompt_sharing import SHARING
from dta_plugin.diffusion.sampler_config import KV_CACHES, REMASKING, default_block_length
from dta_plugin.errors import InvalidInputError

OBJECTIVES = ("bgpo", "diffu-grpo", "gdsd", "trajectory", "vrpo")
CLIPPED = ("diffu-grpo", "gdsd", "trajectory")  # those with a framework's own clip range, PPO's epsilon
_BGPO, _GDSD, _ONE_STEP = ("bgpo",), ("gdsd",), ("diffu-grpo",)
_MASKED = ("bgpo", "gdsd", "vrpo")
_SAMPLED = (*_MASKED, "trajectory")
_NORMED = ("bgpo", "trajectory", "vrpo")
_WITH_FILLERS = (*_MASKED, "diffu-grpo")
_CHOICES = {
    "objective": OBJECTIVES,
    "mask_form": FORMS,
    "length_norm": NORMS,
    "remasking": REMASKING,
    "kv_cache": KV_CACHES,
    "share_prompts": SHARING,
}
_LEAST = {"block_length": 1, "attention_block_length": 1, "mask_token_id": 0}


def _option(default: object, help: str, objectives: tuple[str, ...] = OBJECTIVES) -> Any:
    """objectives: those that look at the option."""
    return field(default=default, metadata={"help": help, "objectives": objectives})


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionOptions:
    """Raises InvalidInputError for values that cannot be, or that the objective would not look at."""

    objective: str = _option(
        "trajectory",
        "What is maximised: trajectory (clipped ratios of the steps in which the sampler wrote), bgpo (a lower bound "
        "of exp(mean ELBO difference) times advantage), gdsd (minus the squared distance of unweighted masked "
        "log-ratios from the advantage), vrpo (what bgpo bounds), or diffu-grpo (token ratios from one fully masked "
        "forward). The first three are back-propagated sample by sample, so memory does not grow with "
        "num_elbo_samples; vrpo is one graph over all samples.",
    )
    num_elbo_samples: int = _option(
        16,
        "Monte-Carlo samples of the ELBO per completion, or with trajectory steps of its rollout; each is one forward "
        "and one backward pass.",
        _SAMPLED,
    )
    mask_form: str = _option(
        "k",
        "How a sample is masked: k (a uniform number of tokens, without replacement; less variance) or t (each token "
        "with a uniform probability).",
        _MASKED,
    )
    stratified_masks: bool = _option(
        True, "Space the samples' mask levels evenly; less variance, the same mean.", _MASKED
    )
    coupled_masks: bool = _option(
        False, "Mask complementary tokens in samples 2i and 2i + 1; num_elbo_samples must be even.", _MASKED
    )
    length_norm: str = _option(
        "length",
        "What ELBO differences, or with trajectory the sum over steps, are divided by: length (of the completion), "
        "max_length (of the longest completion that can be) or none (ELBO differences grow with the length, and their "
        "exponentials overflow). gdsd divides by max_length.",
        _NORMED,
    )
    bound_clip: float | None = _option(
        None,
        "Clip range of bgpo's ratio of each sample, as PPO's epsilon; off by default: the bound gets looser.",
        _BGPO,
    )
    dual_clip: float | None = _option(
        None, "Most that negative advantages count in bgpo, above 1; off by default: it gives up the bound.", _BGPO
    )
    advantage_scale: float = _option(
        1.0,
        "gdsd's psi, above 0: the log-ratio in nats per token of the canvas that an advantage of 1 asks for, as far as "
        "the clip range lets it go.",
        _GDSD,
    )
    prompt_mask_probability: float = _option(
        0.15, "Share of prompt tokens that diffu-grpo hides, in [0, 1).", _ONE_STEP
    )
    block_length: int | None = _option(
        None,
        "Tokens of a sampling block. None: the attention blocks' length where the model has such, else the largest "
        "divisor of the completion's length up to 32.",
    )
    diffusion_steps: int | None = _option(
        None,
        "Model calls to sample a completion. None: two tokens per call, as in the papers; as the model decides with "
        "confidence_threshold.",
    )
    remasking: str = _option(
        "low_confidence", "Which proposed tokens wait for a later step: those of low_confidence, or random ones."
    )
    guidance_scale: float = _option(0.0, "Scale of classifier-free guidance in sampling; 0 is off.")
    confidence_threshold: float | None = _option(
        None,
        "Commit in each model call every token whose probability is at least this (Fast-dLLM uses 0.9), and the "
        "surest in any case, instead of a fixed number: fewer calls, another distribution.",
    )
    kv_cache: str = _option(
        "auto",
        "Which keys and values the sampler keeps within a block: prefix (of the prompt and finished blocks), dual (of "
        "what is still masked behind the block, too), none, or auto: prefix where attention is causal over blocks, "
        "which is exact, else none. With full attention prefix and dual are approximations.",
    )
    share_prompts: str = _option(
        "auto",
        "Compute what rows of a micro-batch have in common once in the update, forward and backward: auto (where "
        "attention is causal over blocks, which is exact; with full attention there is nothing to share) or never.",
    )
    score_fillers: bool = _option(
        False,
        "Score the end tokens that fill the completion after the first one. Off: they would let a policy gain "
        "likelihood by ending early.",
        _WITH_FILLERS,
    )
    mask_token_id: int | None = _option(None, "The mask token, where the model's config does not say it.")
    is_shifted: bool | None = _option(
        None, "Whether logits at i - 1 predict token i, where the model's config does not say it."
    )
    attention_block_length: int | None = _option(
        None, "Length of the blocks of block attention (SDAR), where the model's config does not say it."
    )

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InvalidInputError(f"{name}={getattr(self, name)!r}. Expected one of {', '.join(allowed)}.")
        check_samples(self.num_elbo_samples, self.coupled_masks)
        check_clips(self.bound_clip, self.dual_clip)
        if not 0.0 < self.advantage_scale < math.inf:
            raise InvalidInputError(
                f"advantage_scale={self.advantage_scale}. Expected a finite value above 0: what gdsd multiplies "
                "advantages with."
            )
        if not 0.0 <= self.prompt_mask_probability < 1.0:
            raise InvalidInputError(
                f"prompt_mask_probability={self.prompt_mask_probability}. Expected a share of prompt tokens in [0, 1)."
            )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidInputError(f"{name}={value}. Expected None or at least {least}.")
        for option in fields(self):
            self.check_use(option.name, getattr(self, option.name), option.default, option.metadata["objectives"])

    def check_use(self, name: str, value: object, default: object, objectives: tuple[str, ...]) -> None:
        """Raise InvalidInputError for an option, not at its default, that only other objectives look at."""
        if self.objective not in objectives and value != default:
            raise InvalidInputError(
                f"{name}={value} with objective={self.objective!r}, which does not use it. Expected {name}={default} "
                f"(leave it out), or objective={' or '.join(map(repr, objectives))}."
            )

    @property
    def reads_rollout(self) -> bool:
        """Whether the objective needs to know how completions came about (`Rollout`)."""
        return self.objective == "trajectory"

    def family(self, config: PretrainedConfig) -> DiffusionFamily:
        """How the model of this config is asked. Raises UnsupportedError for one that is no diffusion LM."""
        return family_of(
            config,
            mask_token_id=self.mask_token_id,
            is_shifted=self.is_shifted,
            block_length=self.attention_block_length,
        )

    def sampler_config(
        self, length: int, temperature: float, attention_block_length: int | None = None
    ) -> SamplerConfig:
        """How completions of so many tokens are sampled from a model with such attention blocks (None: full attention).

        Raises InvalidInputError for lengths and steps that do not go together.
        """
        return SamplerConfig(
            gen_length=length,
            block_length=self.block_length or attention_block_length or default_block_length(length),
            steps=self.diffusion_steps,
            temperature=temperature,
            remasking=self.remasking,
            guidance_scale=self.guidance_scale,
            confidence_threshold=self.confidence_threshold,
            kv_cache=self.kv_cache,
        )
