"""The token sequences that a model is probed with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from dta_plugin.models.indexers import index_limit
from dta_plugin.models.rotary import length_limits
from dta_plugin.models.sizes import attention_sizes

# Of the longest sequence: the fewest tokens, and the most that are cheap.
_SHORTEST, _LONGEST = 32, 320
# Of one sequence: the most logits.
_LOGITS = 2**25
# Beyond the smallest window.
_BEYOND = 16


def probe_forest(model: PreTrainedModel) -> list[list[int]]:
    """Nine sequences: forks at three depths, siblings side by side, branches of one token, and an end inside the tree.

    The longest is longer than the smallest attention window where that is cheap, and shorter than any length at which
    rotary frequencies change or indexers choose keys: what happens there is decided by batch. Tokens are random, none
    of them special.
    """
    length = _length(model)
    random = np.random.default_rng(0)
    ordinary = _ordinary_tokens(model.config.get_text_config(), model.config)

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
