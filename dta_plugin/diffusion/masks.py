"""Which completion tokens are masked in each Monte-Carlo sample of an ELBO: seeds are kept, masks are drawn on demand.

A row's masks depend on its own seed and length and on the options alone: not on the batch around it, the device, or
when they are drawn. So the old, the new and the reference policy see the same noise, and nothing of size samples x
tokens is stored. Forms of the estimator (BGPO, arXiv 2510.11683, section 3; LLaDA, arXiv 2502.09992, eq. 6 and 14):

- "k": k uniform in 1 .. L, then exactly k of the L tokens without replacement; weight L / k.
- "t": t uniform in [EPSILON, 1], then every token with probability t; weight 1 / t. The same mean up to EPSILON, more
  variance; a sample may mask nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dta_plugin.errors import InvalidInputError

EPSILON = 1e-3
FORMS = ("k", "t")


@dataclass(frozen=True, slots=True, eq=False)
class MaskDraws:
    """Noise of B completions in n samples each. Make one with `draw_masks`.

    levels: float64 [B, n] share of tokens to mask, k / L or t. weights: float32 [B, n] on the device of the lengths.
    """

    lengths: np.ndarray
    seeds: np.ndarray
    form: str
    coupled: bool
    levels: np.ndarray
    weights: torch.Tensor

    @property
    def samples(self) -> int:
        return self.levels.shape[1]

    def mask(self, sample: int, width: int, rows: torch.Tensor | None = None) -> torch.Tensor:
        """bool [B, width], True where the sample masks a token: among the first L columns of a row, nowhere else.

        rows: int64 [b], only these rows; None for all. width: at least the longest of the lengths.
        """
        which = np.arange(len(self.lengths)) if rows is None else rows.cpu().numpy()
        lengths = self.lengths[which]
        if width < lengths.max(initial=0):
            raise InvalidInputError(
                f"width={width} with a completion of {lengths.max()} tokens. Expected at least the longest length."
            )
        stream, is_complement = (sample // 2, sample % 2 == 1) if self.coupled else (sample, False)
        drawn = self.levels[which, sample - 1 if is_complement else sample]
        scores = np.full((len(which), width), 2.0)
        for row, (seed, length) in enumerate(zip(self.seeds[which], lengths, strict=True)):
            scores[row, :length] = _generator(seed, 1 + stream).random(length)
        if self.form == "t":
            mask = scores < drawn[:, None]
        else:
            rank = scores.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
            mask = rank < np.rint(drawn * lengths)[:, None]
        if is_complement:
            mask = ~mask & (np.arange(width) < lengths[:, None])
        return torch.from_numpy(mask).to(self.weights.device)

    def histogram(self, bins: int = 10) -> list[int]:
        """How many samples have a share of masked tokens in each of `bins` equal parts of [0, 1]; for metrics."""
        return np.histogram(self.levels[self.lengths > 0], bins=bins, range=(0.0, 1.0))[0].tolist()


def draw_masks(
    lengths: torch.Tensor,
    samples: int,
    seeds: torch.Tensor,
    form: str = "k",
    stratified: bool = True,
    coupled: bool = False,
) -> MaskDraws:
    """Noise for `samples` ELBO terms of every completion.

    lengths: int64 [B] tokens of each completion that count; a row of length 0 is never masked and weighs 0. seeds:
    int64 [B], at least 0.
    stratified: the first level is uniform, the others follow evenly spaced, modulo the range; each alone is uniform.
    coupled: samples 2i and 2i + 1 mask complementary tokens, so that a pair scores every token once (coupled-GRPO,
    arXiv 2506.20639). In the k form k is then uniform in 0 .. L with weight (L + 1) / k, which keeps the mean exact; a
    sample without a masked token weighs 0, which adds variance where completions are short. In the t form t lies in
    [EPSILON, 1 - EPSILON].

    Raises InvalidInputError for other forms, shapes and signs, and for an odd number of coupled samples.
    """
    _check(lengths, samples, seeds, form, coupled)
    length, seed = lengths.cpu().numpy(), seeds.cpu().numpy()
    drawn = samples // 2 if coupled else samples
    first = np.array([_generator(s, 0).random(drawn) for s in seed]).reshape(len(seed), drawn)
    unit = (first[:, :1] + np.arange(drawn) / drawn) % 1.0 if stratified else first
    if form == "k":
        levels = _counts(unit, length, coupled) / np.maximum(length, 1)[:, None]
    else:
        levels = EPSILON + (1.0 - (2 if coupled else 1) * EPSILON) * unit
    if coupled:
        levels = np.stack([levels, 1.0 - levels], axis=2).reshape(len(seed), samples)
    levels = np.where(length[:, None] > 0, levels, 0.0)
    scale = 1.0 + 1.0 / np.maximum(length, 1)[:, None] if coupled and form == "k" else 1.0
    is_empty = np.rint(levels * length[:, None]) == 0 if form == "k" else levels == 0
    weights = np.where(is_empty, 0.0, scale / np.where(is_empty, 1.0, levels))
    return MaskDraws(
        length, seed, form, coupled, levels, torch.from_numpy(weights).to(lengths.device, dtype=torch.float32)
    )


def prompt_noise(
    attention_mask: torch.Tensor, seeds: torch.Tensor, probability: float = 0.15, sample: int = 0
) -> torch.Tensor:
    """bool [B, P]: every real prompt token with the given probability, from the row's seed.

    The noise of diffu-GRPO (arXiv 2504.12216). attention_mask: [B, P], 0 at padding; where the prompt stands in the row
    makes no difference. sample: which of many draws.
    """
    real = attention_mask.bool().cpu().numpy()
    noise = np.zeros(real.shape, dtype=bool)
    for row, seed in enumerate(seeds.cpu().numpy()):
        noise[row, real[row]] = _generator(seed, sample, 1).random(real[row].sum()) < probability
    return torch.from_numpy(noise).to(attention_mask.device)


def check_samples(samples: int, coupled: bool) -> None:
    """Raise InvalidInputError for a number of samples that cannot be drawn."""
    if samples < 1 or (coupled and samples % 2):
        need = "an even number of at least 2: they come in pairs" if coupled else "at least 1"
        raise InvalidInputError(f"samples={samples} with coupled={coupled}. Expected {need}.")


def _counts(unit: np.ndarray, length: np.ndarray, coupled: bool) -> np.ndarray:
    """[B, n] numbers in [0, 1) -> how many tokens are masked: 1 .. L, coupled 0 .. L.

    Uniform in each entry whatever L: the first is, and a shift modulo the number of values keeps it so.
    """
    values = (length + 1 if coupled else np.maximum(length, 1))[:, None]
    return np.minimum((unit * values).astype(np.int64), values - 1) + (0 if coupled else 1)


def _generator(seed: np.integer, *stream: int) -> np.random.Generator:
    return np.random.default_rng((int(seed), *stream))


def _check(lengths: torch.Tensor, samples: int, seeds: torch.Tensor, form: str, coupled: bool) -> None:
    if form not in FORMS:
        raise InvalidInputError(f"form={form!r}. Expected one of {', '.join(FORMS)}.")
    check_samples(samples, coupled)
    if lengths.ndim != 1 or seeds.shape != lengths.shape or lengths.is_floating_point() or seeds.is_floating_point():
        raise InvalidInputError(
            f"lengths {tuple(lengths.shape)} {lengths.dtype} and seeds {tuple(seeds.shape)} {seeds.dtype}. Expected "
            "one integer of each per row, [B]."
        )
    if lengths.numel() and min(int(lengths.min()), int(seeds.min())) < 0:
        raise InvalidInputError(
            f"Lengths from {int(lengths.min())} and seeds from {int(seeds.min())}. Expected values of at least 0."
        )
