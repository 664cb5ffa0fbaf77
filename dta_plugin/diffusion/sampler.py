"""Block-wise semi-autoregressive sampling: how masked diffusion LMs write a completion.

The completion starts as a canvas of mask tokens. Blocks are filled from left to right; every step runs the model once,
proposes a token for each masked position of the block, and commits the most confident ones. A committed token is never
masked again (LLaDA, arXiv 2502.09992).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dta_plugin.diffusion.block_cache import BlockReader
from dta_plugin.diffusion.commits import commit_most_confident, tokens_per_call
from dta_plugin.diffusion.family import DiffusionFamily
from dta_plugin.diffusion.sampler_config import SamplerConfig
from dta_plugin.errors import InvalidInputError
from dta_plugin.models.introspection import causal_lm


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
    check_positions(model, prompt_ids.shape[1] if prompt_mask is None else int(prompt_mask.sum(dim=1).max()), config)
    prompt_length = prompt_ids.shape[1]
    real = torch.ones_like(prompt_ids) if prompt_mask is None else prompt_mask.to(prompt_ids.dtype)
    canvas = torch.nn.functional.pad(prompt_ids, (0, config.gen_length), value=family.mask_token_id)
    attention = torch.nn.functional.pad(real, (0, config.gen_length), value=1)
    started = _started(family, real)
    block_of = (torch.arange(config.gen_length, device=canvas.device) + started[:, None]) // config.block_length
    ends = torch.tensor(family.eos_token_ids, dtype=canvas.dtype, device=canvas.device)
    active = torch.arange(len(canvas), device=canvas.device)
    steps = torch.full_like(canvas[:, prompt_length:], -1)
    reader = BlockReader(model, family, config, prompt_length)
    calls = 0
    for block in range(int(block_of.max()) + 1):
        here = block_of[active] == block
        inside = here.any(dim=0).nonzero()[:, 0]
        if not len(inside):  # rows that began in the middle of a block had one more, and are done
            break
        first, last = int(inside[0]), int(inside[-1]) + 1
        visible = prompt_length + (last if family.block_length else config.gen_length)  # later blocks are not seen
        rows, mask = canvas[active, :visible], attention[active, :visible]
        window = slice(prompt_length + first, prompt_length + last)
        reader.start_block(window.start - (int(started[active].max()) if block == 0 else 0))
        chosen = _fill_block(reader, rows, mask, here[:, first:last], window, generator)
        canvas[active, :visible] = rows
        for which in chosen:
            steps[active, first:last] = steps[active, first:last].masked_fill(which, calls)
            calls += 1
        going_on = (~torch.isin(rows[:, prompt_length:], ends).any(dim=1)).nonzero()[:, 0]
        reader.keep(going_on, of=len(active))
        active = active[going_on]
        if not len(active):
            break
    written = canvas[:, prompt_length:]
    completion, lengths = _filled_after_end(written, ends)
    return SampledCompletions(completion, lengths, calls, written, steps)


def _fill_block(
    reader: BlockReader,
    rows: torch.Tensor,
    attention: torch.Tensor,
    here: torch.Tensor,
    window: slice,
    generator: torch.Generator | None,
) -> list[torch.Tensor]:
    """Write the tokens of the window's columns that are of the block (`here`, bool [b, w]) into rows [b, S], in place.

    Returns what each model call has committed, bool [b, w].
    """
    family, config = reader.family, reader.config
    chosen: list[torch.Tensor] = []
    for quota in tokens_per_call(here.sum(dim=1), config):
        waiting = here & (rows[:, window] == family.mask_token_id)
        if not waiting.any():
            break
        logits = reader.logits(rows, attention, window)
        chosen.append(commit_most_confident(rows[:, window], waiting, logits, quota, family, config, generator))
    return chosen


def check_blocks(family: DiffusionFamily, config: SamplerConfig) -> None:
    """Raise InvalidInputError where a model's attention blocks are not the sampler's."""
    if family.block_length is not None and family.block_length != config.block_length:
        raise InvalidInputError(
            f"block_length={config.block_length} for {family.name}, whose attention has blocks of "
            f"{family.block_length}. Expected the same; set block_length={family.block_length}."
        )


def check_positions(model: nn.Module, prompt_length: int, config: SamplerConfig) -> None:
    """Raise InvalidInputError where a prompt of so many tokens and its canvas have more than the model's positions."""
    positions = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and prompt_length + config.gen_length > positions:
        raise InvalidInputError(
            f"A prompt of {prompt_length} tokens and a canvas of {config.gen_length} for a model with {positions} "
            f"positions. Expected prompts of at most {max(positions - config.gen_length, 0)} tokens with this canvas; "
            "shorten the prompts or the completions (max_completion_length, response_length)."
        )


def _started(family: DiffusionFamily, real: torch.Tensor) -> torch.Tensor:
    """int64 [B]: how many tokens of the canvas' first block are the prompt's."""
    if family.block_length is None:
        return torch.zeros_like(real[:, 0])
    return real.sum(dim=1) % family.block_length


def _filled_after_end(completion: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Completions [B, G] with nothing but end tokens after their first one, and their lengths [B]."""
    is_end = torch.isin(completion, ends)
    before = (is_end.cumsum(dim=1) == 0).sum(dim=1)
    lengths = (before + 1).clamp(max=completion.shape[1])
    if len(ends):
        after = torch.arange(completion.shape[1], device=ends.device) >= lengths[:, None]
        completion = torch.where(after, ends[0], completion)
    return completion, lengths
