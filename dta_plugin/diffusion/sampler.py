"""Block-wise semi-autoregressive sampling: how masked diffusion LMs write a completion.

The completion starts as a canvas of mask tokens. Blocks are filled from left to right; every step runs the model once,
proposes a token for each masked position of the block, and commits the most confident ones. A committed token is never
masked again (LLaDA, arXiv 2502.09992).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dta_plugin.diffusion.family import DiffusionFamily, predictions
from dta_plugin.errors import InvalidInputError

REMASKING = ("low_confidence", "random")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """How completions are sampled. Raises InvalidInputError for lengths and steps that do not go together.

    gen_length: tokens of the canvas. block_length: tokens of a block; that of the model for block attention. steps:
    model calls for the whole canvas, shared out evenly among blocks. temperature: of the Gumbel noise on the logits; 0
    takes the most likely token. remasking: which proposals wait for a later step, those of low_confidence (probability
    of the proposed token) or random ones. guidance_scale: s of classifier-free guidance, u + (1 + s) (c - u) with u the
    logits without prompt; 0 is off, else every step runs twice the rows.
    """

    gen_length: int = 256
    block_length: int = 32
    steps: int = 128
    temperature: float = 0.0
    remasking: str = "low_confidence"
    guidance_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.block_length < 1 or self.gen_length < 1 or self.gen_length % self.block_length:
            raise InvalidInputError(
                f"gen_length={self.gen_length}, block_length={self.block_length}. Expected gen_length to be a multiple "
                "of block_length; both at least 1."
            )
        if self.steps < self.blocks or self.steps % self.blocks or self.steps > self.gen_length:
            raise InvalidInputError(
                f"steps={self.steps} for {self.blocks} block(s) of {self.block_length}. Expected a multiple of "
                f"{self.blocks}, at most gen_length={self.gen_length}: as many in each block, each to commit a token."
            )
        if self.temperature < 0 or self.guidance_scale < 0:
            raise InvalidInputError(
                f"temperature={self.temperature}, guidance_scale={self.guidance_scale}. Expected values of at least 0."
            )
        if self.remasking not in REMASKING:
            raise InvalidInputError(f"remasking={self.remasking!r}. Expected one of {', '.join(REMASKING)}.")

    @property
    def blocks(self) -> int:
        return self.gen_length // self.block_length


@dataclass(frozen=True, slots=True, eq=False)
class SampledCompletions:
    """completion_ids: int64 [B, gen_length]; after the first end token, end tokens. lengths: int64 [B] tokens up to and
    with the first end token, gen_length without one. model_calls: how often the model ran.

    canvas_ids: int64 [B, gen_length], the canvas as the last step left it: after the first end token what was committed
    there, and masks in blocks that did not run. steps: int64 [B, gen_length], the model call, from 0, that committed
    each token; -1 for masks.
    """

    completion_ids: torch.Tensor
    lengths: torch.Tensor
    model_calls: int
    canvas_ids: torch.Tensor
    steps: torch.Tensor


@torch.no_grad()
def sample(
    model: nn.Module,
    family: DiffusionFamily,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor | None = None,
    config: SamplerConfig | None = None,
    generator: torch.Generator | None = None,
) -> SampledCompletions:
    """Sample one completion per prompt, in the mode (training, evaluation) that the model is in.

    prompt_ids: int64 [B, P], left padded. prompt_mask: [B, P], 0 at padding, or None. generator: on the prompts'
    device, for temperatures above 0 and random remasking; None for torch's own. config: None for the defaults.

    A row whose finished blocks hold an end token runs no more; the batch ends when no row is left. Blocks of a family
    with block attention continue the prompt's last, unfinished block, so a row's first block may be shorter.
    """
    config = config or SamplerConfig()
    check_blocks(family, config)
    prompt_length = prompt_ids.shape[1]
    real = torch.ones_like(prompt_ids) if prompt_mask is None else prompt_mask.to(prompt_ids.dtype)
    canvas = torch.nn.functional.pad(prompt_ids, (0, config.gen_length), value=family.mask_token_id)
    attention = torch.nn.functional.pad(real, (0, config.gen_length), value=1)
    block_of = _block_of_columns(family, config, real)
    ends = torch.tensor(family.eos_token_ids, dtype=canvas.dtype, device=canvas.device)
    active = torch.arange(len(canvas), device=canvas.device)
    steps = torch.full_like(canvas[:, prompt_length:], -1)
    calls = 0
    for block in range(int(block_of.max()) + 1):
        here = block_of[active] == block
        inside = here.any(dim=0).nonzero()[:, 0]
        first, last = int(inside[0]), int(inside[-1]) + 1
        visible = prompt_length + (last if family.block_length else config.gen_length)  # later blocks are not seen
        rows, mask = canvas[active, :visible], attention[active, :visible]
        window = slice(prompt_length + first, prompt_length + last)
        committed = steps[active, first:last]
        quotas = _tokens_per_step(here.sum(dim=1), config.steps // config.blocks)
        for quota in quotas:
            logits = _guided_logits(model, family, config, rows, mask, prompt_length, window)
            waiting = here[:, first:last] & (rows[:, window] == family.mask_token_id)
            chosen = _commit_most_confident(rows[:, window], waiting, logits, quota, family, config, generator)
            committed[chosen] = calls
            calls += 1
        canvas[active, :visible] = rows
        steps[active, first:last] = committed
        active = active[~torch.isin(rows[:, prompt_length:], ends).any(dim=1)]
        if not len(active):
            break
    written = canvas[:, prompt_length:]
    completion, lengths = _filled_after_end(written, ends)
    return SampledCompletions(completion, lengths, calls, written, steps)


def check_blocks(family: DiffusionFamily, config: SamplerConfig) -> None:
    """Raise InvalidInputError where a model's attention blocks are not the sampler's."""
    if family.block_length is not None and family.block_length != config.block_length:
        raise InvalidInputError(
            f"block_length={config.block_length} for {family.name}, whose attention has blocks of "
            f"{family.block_length}. Expected the same; set block_length={family.block_length}."
        )


def _block_of_columns(family: DiffusionFamily, config: SamplerConfig, real: torch.Tensor) -> torch.Tensor:
    """int64 [B, gen_length]: the block of each column, counted from the first that has completion tokens."""
    column = torch.arange(config.gen_length, device=real.device)[None].expand(len(real), -1)
    started = 0 if family.block_length is None else real.sum(dim=1, keepdim=True) % config.block_length
    return (column + started) // config.block_length


def _tokens_per_step(masked: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """Per step: how many of a row's masked tokens [b] it commits; the remainder goes first. Steps without any drop."""
    quotas = [masked // steps + (step < masked % steps) for step in range(steps)]
    return [quota for quota in quotas if bool(quota.any())]


def _guided_logits(
    model: nn.Module,
    family: DiffusionFamily,
    config: SamplerConfig,
    rows: torch.Tensor,
    attention: torch.Tensor,
    prompt_length: int,
    window: slice,
) -> torch.Tensor:
    """Logits [b, w, V] of the window's columns."""
    if not config.guidance_scale:
        return predictions(model, family, rows, attention, window)
    blind = rows.clone()
    blind[:, :prompt_length] = family.mask_token_id
    both = predictions(model, family, torch.cat([rows, blind]), attention.repeat(2, 1), window)
    conditional, unconditional = both.chunk(2)
    return unconditional + (1.0 + config.guidance_scale) * (conditional - unconditional)


def _commit_most_confident(
    tokens: torch.Tensor,
    waiting: torch.Tensor,
    logits: torch.Tensor,
    quota: torch.Tensor,
    family: DiffusionFamily,
    config: SamplerConfig,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Write the proposals of each row's `quota` [b] most confident waiting positions into `tokens` [b, w], in place.

    Returns which these are, bool [b, w].
    """
    scores = logits[waiting]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores[:, list(family.never_sampled)] = float("-inf")
    proposed = _proposals(scores, config.temperature, generator)
    if config.remasking == "random":
        confidence = torch.rand(proposed.shape, generator=generator, device=scores.device, dtype=scores.dtype)
    else:
        confidence = scores.gather(1, proposed[:, None])[:, 0] - scores.logsumexp(dim=1)
    order = torch.full(waiting.shape, float("-inf"), dtype=scores.dtype, device=scores.device)
    order[waiting] = confidence
    rank = order.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen = waiting & (rank < quota[:, None])
    tokens[chosen] = proposed[chosen[waiting]]
    return chosen


def _proposals(scores: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    """A token [M] per row of logits [M, V], drawn from softmax(logits / temperature) by the Gumbel trick in float64.

    Single precision truncates the noise's tail, which lowers the effective temperature (arXiv 2409.02908).
    """
    if temperature == 0:
        return scores.argmax(dim=1)
    uniform = torch.rand(scores.shape, dtype=torch.float64, device=scores.device, generator=generator)
    return (scores.double() - temperature * (-uniform.log()).log()).argmax(dim=1)


def _filled_after_end(completion: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Completions [B, G] with nothing but end tokens after their first one, and their lengths [B]."""
    is_end = torch.isin(completion, ends)
    before = (is_end.cumsum(dim=1) == 0).sum(dim=1)
    lengths = (before + 1).clamp(max=completion.shape[1])
    if len(ends):
        after = torch.arange(completion.shape[1], device=ends.device) >= lengths[:, None]
        completion = torch.where(after, ends[0], completion)
    return completion, lengths
