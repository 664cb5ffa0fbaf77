"""The token sequences that a model is probed with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from dta_plugin.models.indexers import index_limit
from dta_plugin.models.rotary import length_limits
from dta_plugin.models.sizes import attention_sizes
from dta_plugin.models.vision.units import ImageInputs, Unit, image_token_id, row_units, runs_of, stacked
from dta_plugin.tree.trie import TokenSequence, token_rows

# Of the longest sequence: the fewest tokens, and the most that are cheap.
_SHORTEST, _LONGEST = 32, 320
# Of one sequence: the most logits.
_LOGITS = 2**25
# Beyond the smallest window.
_BEYOND = 16
# Tokens before an image, and behind it.
_BEFORE_IMAGE, _BEHIND_IMAGE = 32, 8
# Of an image whose grid says where patches are: the most tokens along a side.
_SIDE = 8


def probe_forest(model: PreTrainedModel) -> Forest:
    """Nine sequences: forks at three depths, siblings side by side, branches of one token, and an end inside the tree.

    The longest is longer than the smallest attention window where that is cheap, and shorter than any length at which
    rotary frequencies change or indexers choose keys: what happens there is decided by batch. Tokens are random, none
    of them special.
    """
    return Forest(forest_rows(_length(model), _ordinary_tokens(model.config.get_text_config(), model.config)))


def forest_rows(length: int, ordinary: np.ndarray) -> list[list[int]]:
    """The sequences of `probe_forest`. length: of the longest, at least 8. ordinary: ids to take tokens from."""
    random = np.random.default_rng(0)

    def run(tokens: int) -> list[int]:
        return random.choice(ordinary, max(1, tokens)).tolist()

    quarter = length // 4
    stem = run(quarter)
    longest = stem + run(length - quarter)
    sibling = stem + run(quarter)
    return [
        longest,
        sibling,
        stem + run(quarter),
        stem + run(quarter),
        stem + run(quarter),
        sibling[: 3 * quarter // 2] + run(quarter // 2),
        longest[: 2 * quarter] + run(1),
        longest[: 2 * quarter] + run(1),
        longest[: 3 * quarter],
    ]


@dataclass(frozen=True, slots=True)
class Forest:
    """What a model is probed with. images: per sequence, its images' inputs, if it has any."""

    sequences: list[list[int]]
    images: list[ImageInputs | None] | None = None


def image_forest(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], rows: Sequence[ImageInputs | None]
) -> Forest:
    """Siblings behind the first two images of a row, or the first one where no row has two; text between them.

    Of all rows, the one that comes to their end soonest. All that is far before an image is left out, as is all but a
    corner of a large one: logits of every token are compared, of which there are as many as words.
    """
    token_id = image_token_id(model)
    found = []
    for sequence, images in zip(token_rows(sequences), rows, strict=True):
        is_image = sequence == token_id
        if images is not None and is_image.any():
            places = np.flatnonzero(is_image)
            first = row_units(model, images, runs_of(is_image))[:2]
            own = np.split(places, np.cumsum([unit.tokens for unit in first]))[: len(first)]
            found.append((-len(first), int(own[-1][-1]), sequence, list(zip(first, own, strict=True))))
    *_, sequence, pieces = min(found, key=lambda each: each[:2])
    stem: list[int] = []
    seen, after = [], 0
    for unit, places in pieces:
        begin, end = int(places[0]), int(places[-1]) + 1
        corner = _corner(unit, end - begin)
        image = sequence[begin:end] if corner is unit else sequence[begin : begin + corner.tokens]
        stem += [*sequence[max(after, begin - _BEFORE_IMAGE) : begin].tolist(), *image.tolist()]
        seen.append(corner)
        after = end
    inputs = stacked(seen)
    random = np.random.default_rng(0)
    ordinary = _ordinary_tokens(model.config.get_text_config(), model.config)
    ends = [random.choice(ordinary, _BEHIND_IMAGE).tolist() for _ in range(3)]
    return Forest([stem + ends[0], ends[1], stem + ends[2]], [inputs, None, inputs])


def _corner(image: Unit, run: int) -> Unit:
    """An image of the first patches of one, in rows as short as needed. run: tokens from its first to its last."""
    grid = image.inputs.get("image_grid_thw")
    if grid is None or run != image.tokens:
        return image
    merged = int(grid.prod()) // image.tokens  # patches of a token
    most = _SIDE * math.isqrt(merged)
    height, width = (min(side, most) for side in grid[0, 1:].tolist())
    if (1, height, width) == tuple(grid[0].tolist()):
        return image
    own = {"pixel_values": image.inputs["pixel_values"][: height * width]}
    own["image_grid_thw"] = grid.new_tensor([[1, height, width]])
    return Unit(image.inputs | own, height * width // merged)


def _length(model: PreTrainedModel) -> int:
    windows = [layer.window for layer in attention_sizes(model) if layer.window is not None]
    length = max(_SHORTEST, min(windows, default=0) + _BEYOND)
    limits = [limit - 1 for _, limit in length_limits(model)]
    limits += [] if (indexed := index_limit(model)) is None else [indexed]
    cheap = max(_SHORTEST, _LOGITS // model.config.get_text_config().vocab_size)
    return max(8, min(length, _LONGEST, cheap, *limits))


def _ordinary_tokens(config: Any, whole: Any) -> np.ndarray:
    """All ids but those that the config of the text model, or of the whole, gives a meaning, if any are left."""
    ids = np.arange(config.vocab_size)
    ordinary = np.setdiff1d(ids, [*_special_tokens(config), *_special_tokens(whole)])
    return ordinary if len(ordinary) > 1 else ids


def _special_tokens(config: Any) -> Iterator[int]:
    for name, value in config.to_dict().items():
        if name.endswith(("_token_id", "_token_index", "_token_ids")):
            yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))
