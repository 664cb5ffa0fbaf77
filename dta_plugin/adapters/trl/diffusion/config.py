"""DiffusionGRPOConfig: a GRPOConfig with what reinforcement learning of a diffusion LM adds, validated as a whole.

It is an ordinary dataclass: TrlParser offers its fields on the command line and in YAML. Options of GRPOConfig that
have no meaning for a diffusion LM raise InvalidInputError when they are set, instead of being ignored (`unused`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from trl import GRPOConfig

from dta_plugin.adapters.trl.diffusion.unused import check_unused
from dta_plugin.diffusion import SamplerConfig
from dta_plugin.diffusion.masks import FORMS, check_samples
from dta_plugin.diffusion.objectives.bgpo import check_clips
from dta_plugin.diffusion.objectives.elbo import NORMS
from dta_plugin.diffusion.sampler import REMASKING
from dta_plugin.errors import InvalidInputError

OBJECTIVES = ("bgpo", "diffu-grpo", "vrpo")
_ELBO, _BGPO, _ONE_STEP = ("bgpo", "vrpo"), ("bgpo",), ("diffu-grpo",)
# Options that only some objectives look at.
_ONLY_FOR = {
    "num_elbo_samples": _ELBO,
    "mask_form": _ELBO,
    "stratified_masks": _ELBO,
    "coupled_masks": _ELBO,
    "length_norm": _ELBO,
    "bound_clip": _BGPO,
    "dual_clip": _BGPO,
    "prompt_mask_probability": _ONE_STEP,
    "epsilon": _ONE_STEP,
}
_BLOCK = 32  # the papers' block length, where the model has none of its own


def _option(default: object, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class DiffusionGRPOConfig(GRPOConfig):
    """How DiffusionGRPOTrainer trains. Raises InvalidInputError for values that cannot be, or that would be ignored.

    Of GRPOConfig, max_completion_length is the length of the canvas, temperature that of sampling (likelihoods are
    taken at temperature 1), beta the weight of the KL penalty, epsilon the clip range of diffu-grpo.
    """

    objective: str = _option(
        "bgpo",
        "What is maximised: bgpo (a lower bound of exp(mean ELBO difference) times advantage that is back-propagated "
        "sample by sample, so memory does not grow with num_elbo_samples), vrpo (that objective itself, one graph over "
        "all samples), or diffu-grpo (token ratios from one fully masked forward).",
    )
    num_elbo_samples: int = _option(
        16, "Monte-Carlo samples of the ELBO per completion; each is one forward and one backward pass."
    )
    mask_form: str = _option(
        "k",
        "How a sample is masked: k (a uniform number of tokens, without replacement; less variance) or t (each token "
        "with a uniform probability).",
    )
    stratified_masks: bool = _option(True, "Space the samples' mask levels evenly; less variance, the same mean.")
    coupled_masks: bool = _option(
        False, "Mask complementary tokens in samples 2i and 2i + 1; num_elbo_samples must be even."
    )
    length_norm: str = _option(
        "length",
        "What ELBO differences are divided by: length (of the completion), max_length (max_completion_length) or none "
        "(differences grow with the length, and their exponentials overflow).",
    )
    bound_clip: float | None = _option(
        None, "Clip range of bgpo's ratio of each sample, as PPO's epsilon; off by default: the bound gets looser."
    )
    dual_clip: float | None = _option(
        None, "Most that negative advantages count in bgpo, above 1; off by default: it gives up the bound."
    )
    prompt_mask_probability: float = _option(0.15, "Share of prompt tokens that diffu-grpo hides, in [0, 1).")
    block_length: int | None = _option(
        None,
        "Tokens of a sampling block. None: the attention blocks' length where the model has such, else 32, or the "
        "largest power of 2 below that max_completion_length is a multiple of.",
    )
    diffusion_steps: int | None = _option(
        None, "Model calls to sample a completion. None: two tokens per call, as in the papers."
    )
    remasking: str = _option(
        "low_confidence", "Which proposed tokens wait for a later step: those of low_confidence, or random ones."
    )
    guidance_scale: float = _option(0.0, "Scale of classifier-free guidance in sampling; 0 is off.")
    score_fillers: bool = _option(
        False,
        "Score the end tokens that fill the canvas after the first one. Off: they would let a policy gain likelihood "
        "by ending early.",
    )
    mask_token_id: int | None = _option(None, "The mask token, where the model's config does not say it.")
    is_shifted: bool | None = _option(
        None, "Whether logits at i - 1 predict token i, where the model's config does not say it."
    )
    attention_block_length: int | None = _option(
        None, "Length of the blocks of block attention (SDAR), where the model's config does not say it."
    )

    def __post_init__(self) -> None:
        check_unused(self)
        self._check_values()
        self._check_objective()
        self.sampler_config(self.attention_block_length)
        super().__post_init__()
        if getattr(self, "deepspeed_plugin", None) is not None:
            raise InvalidInputError(
                "The launcher asks for DeepSpeed. Expected DDP, FSDP or one process: DeepSpeed reduces gradients at "
                "accumulation boundaries of its own, and one backward pass per ELBO sample would be averaged wrongly. "
                "Use accelerate's fsdp_version: 2."
            )

    @property
    def canvas(self) -> int:
        """Tokens that are sampled per completion."""
        if self.max_completion_length is None:
            raise InvalidInputError("max_completion_length=None. Expected the length of the canvas, at least 1.")
        return self.max_completion_length

    def sampler_config(self, attention_block_length: int | None) -> SamplerConfig:
        """How completions are sampled from a model with such attention blocks (None: full attention)."""
        block = self.block_length or attention_block_length or math.gcd(_BLOCK, self.canvas)
        return SamplerConfig(
            gen_length=self.canvas,
            block_length=block,
            steps=self.canvas // block * max(block // 2, 1) if self.diffusion_steps is None else self.diffusion_steps,
            temperature=self.temperature,
            remasking=self.remasking,
            guidance_scale=self.guidance_scale,
        )

    def _check_values(self) -> None:
        choices = {"objective": OBJECTIVES, "mask_form": FORMS, "length_norm": NORMS, "remasking": REMASKING}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InvalidInputError(f"{name}={getattr(self, name)!r}. Expected one of {', '.join(allowed)}.")
        check_samples(self.num_elbo_samples, self.coupled_masks)
        check_clips(self.bound_clip, self.dual_clip)
        if not 0.0 <= self.prompt_mask_probability < 1.0:
            raise InvalidInputError(
                f"prompt_mask_probability={self.prompt_mask_probability}. Expected a share of prompt tokens in [0, 1)."
            )
        for name, least in (("block_length", 1), ("attention_block_length", 1), ("mask_token_id", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidInputError(f"{name}={value}. Expected None or at least {least}.")

    def _check_objective(self) -> None:
        """Refuse what the objective would not look at."""
        defaults = {f.name: f.default for f in fields(DiffusionGRPOConfig)}
        for name, objectives in _ONLY_FOR.items():
            if self.objective not in objectives and getattr(self, name) != defaults[name]:
                raise InvalidInputError(
                    f"{name}={getattr(self, name)} with objective={self.objective!r}, which does not use it. Expected "
                    f"{name}={defaults[name]} (leave it out), or objective={' or '.join(map(repr, objectives))}."
                )
