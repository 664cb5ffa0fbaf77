"""SamplerConfig: how completions of a masked diffusion LM are sampled, checked as a whole."""

from __future__ import annotations

from dataclasses import dataclass

from dta_plugin.errors import InvalidInputError

REMASKING = ("low_confidence", "random")
KV_CACHES = ("auto", "none", "prefix", "dual")
_BLOCK = 32  # the papers' block length, where the model has none of its own


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """How completions are sampled. Raises InvalidInputError for values that do not go together.

    gen_length: tokens of the canvas. block_length: tokens of a block; that of the model for block attention. steps:
    model calls for the whole canvas, shared out evenly among blocks; None: two tokens per call. temperature: of the
    Gumbel noise on the logits; 0 takes the most likely token. remasking: which proposals wait for a later step, those
    of low_confidence (probability of the proposed token) or random ones. guidance_scale: s of classifier-free guidance,
    u + (1 + s) (c - u) with u the logits without prompt; 0 is off, else every step runs twice the rows.

    confidence_threshold: in (0, 1); each call commits, instead of a fixed number of tokens, every one whose probability
    is at least this, and the surest in any case (Fast-dLLM, arXiv 2505.22618). Another distribution than without.

    kv_cache: which keys and values are kept from a block's first call to its last, where they do not run again.
    "prefix": those of the prompt and of finished blocks. "dual": those of the masked blocks behind, too. Exact where
    attention is causal over blocks; an approximation where it is full, as the kept ones would change with the
    block (Fast-dLLM). "auto": "prefix" where that is exact and the model can, else "none".
    """

    gen_length: int = 256
    block_length: int = 32
    steps: int | None = None
    temperature: float = 0.0
    remasking: str = "low_confidence"
    guidance_scale: float = 0.0
    confidence_threshold: float | None = None
    kv_cache: str = "auto"

    def __post_init__(self) -> None:
        if self.block_length < 1 or self.gen_length < 1 or self.gen_length % self.block_length:
            raise InvalidInputError(
                f"gen_length={self.gen_length}, block_length={self.block_length}. Expected gen_length to be a multiple "
                "of block_length; both at least 1."
            )
        self._check_steps()
        if self.temperature < 0 or self.guidance_scale < 0:
            raise InvalidInputError(
                f"temperature={self.temperature}, guidance_scale={self.guidance_scale}. Expected values of at least 0."
            )
        for name, allowed in (("remasking", REMASKING), ("kv_cache", KV_CACHES)):
            if getattr(self, name) not in allowed:
                raise InvalidInputError(f"{name}={getattr(self, name)!r}. Expected one of {', '.join(allowed)}.")

    def _check_steps(self) -> None:
        threshold = self.confidence_threshold
        if threshold is not None:
            if not 0.0 < threshold < 1.0:
                raise InvalidInputError(f"confidence_threshold={threshold}. Expected None or a probability in (0, 1).")
            if self.steps is not None or self.remasking != "low_confidence":
                raise InvalidInputError(
                    f"confidence_threshold={threshold} with steps={self.steps} and remasking={self.remasking!r}. "
                    "Expected steps=None and remasking='low_confidence': confidence decides how many tokens a call "
                    "commits, and which. Leave out one or the other."
                )
        elif self.steps is not None and (
            self.steps < self.blocks or self.steps % self.blocks or self.steps > self.gen_length
        ):
            raise InvalidInputError(
                f"steps={self.steps} for {self.blocks} block(s) of {self.block_length}. Expected a multiple of "
                f"{self.blocks}, at most gen_length={self.gen_length}: as many in each block, each to commit a token."
            )

    @property
    def blocks(self) -> int:
        return self.gen_length // self.block_length

    @property
    def calls_per_block(self) -> int:
        """Model calls of a block, without a threshold."""
        return (self.block_length + 1) // 2 if self.steps is None else self.steps // self.blocks


def default_block_length(gen_length: int) -> int:
    """The largest divisor of a canvas of so many tokens up to the papers' 32."""
    return max(block for block in range(1, _BLOCK + 1) if gen_length % block == 0)
