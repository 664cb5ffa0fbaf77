"""Rotary positions whose frequencies depend on the longest position of a call: one choice for the whole batch.

Where a padded batch and its rows alone would get different frequencies, what counts is each row alone: that is what
generation and the reference saw. So a batch is exact if all of its rows are on the same side of the length at which a
type switches, and is refused if they are not. Packed calls then choose as each row does. Chunks of a streamed call are
told the longest position of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# Types whose frequencies are the same whatever the call.
_FIXED = {"default", "linear", "yarn", "llama3", "proportional", "axial", "mrope"}


def rotary_obstacle(model: PreTrainedModel) -> str | None:
    """Why no batch can be exact: a rotary type of which it is not known what it depends on."""
    unknown = sorted({kind for kind, _ in _types(model)} - _FIXED - {"longrope", "dynamic"})
    if unknown:
        return (
            f"the rotary type {', '.join(map(repr, unknown))} of {type(model).__name__} is not known to be the "
            f"same for every call; use one of {', '.join(sorted(_FIXED))}, longrope or dynamic"
        )
    return None


def length_obstacle(model: PreTrainedModel, lengths: Sequence[int]) -> str | None:
    """Why this batch cannot be exact: rows of these lengths would get different frequencies, or any call might."""
    if not lengths:
        return None
    for kind, limit in length_limits(model):
        if kind == "dynamic" and max(lengths) >= limit:
            return (
                f"a row has {max(lengths)} tokens, and from {limit} on the frequencies of the rotary type 'dynamic' "
                f"depend on the calls before; keep rows below {limit} tokens"
            )
        if min(lengths) <= limit < max(lengths):
            return (
                f"rows have {min(lengths)} to {max(lengths)} tokens, and the rotary type {kind!r} gives those of more "
                f"than {limit} other frequencies, so that their prefixes are not the same; keep all rows on one side"
            )
    return None


def padded_length_obstacle(model: PreTrainedModel, width: int) -> str | None:
    """Why a call of this padded width cannot be a tree: the padding decides about frequencies, too."""
    limit = min((limit for _, limit in length_limits(model)), default=width)
    if width > limit:
        return f"rotary frequencies depend on the padded width beyond {limit} tokens; keep batches below it"
    return None


@contextmanager
def as_long_as(model: PreTrainedModel, longest: int) -> Iterator[None]:
    """Calls within choose frequencies as if their longest row had `longest` tokens."""
    handles: list[Any] = []
    if any(True for _ in length_limits(model)):
        for module in model.modules():
            if _type_names(getattr(module, "rope_type", None)):
                handles.append(module.register_forward_pre_hook(_lengthen(longest - 1), with_kwargs=True))
                handles.append(module.register_forward_hook(_shorten))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _lengthen(position: int) -> Any:
    """A hook that adds one more position to those of a rotary embedding's call: (x, position_ids, ...)."""

    def longer(position_ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([position_ids, torch.full_like(position_ids[..., :1], position)], dim=-1)

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": longer(kwargs["position_ids"])}
        return (args[0], longer(args[1]), *args[2:]), kwargs

    return hook


def _shorten(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Take the cosines and sines [..., T + 1, D] of that position off again."""
    return tuple(x[..., :-1, :] for x in output)


def length_limits(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """(rotary type, length) for each length at which frequencies change."""
    config = model.config.get_text_config()
    for kind, parameters in _types(model):
        if kind == "dynamic":
            yield kind, config.max_position_embeddings
        elif kind == "longrope" or any(key.startswith("long_") for key in parameters):
            own = parameters.get("original_max_position_embeddings")
            yield kind, own or getattr(config, "original_max_position_embeddings", config.max_position_embeddings)


def _types(model: PreTrainedModel) -> Iterator[tuple[str, dict[str, Any]]]:
    """(rotary type, its parameters): one of all layers, or one per kind of layer."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    by_layer = [entry for entry in parameters.values() if isinstance(entry, dict)]
    for entry in by_layer or [parameters]:
        for kind in _type_names(entry.get("rope_type", entry.get("type", "default"))):
            yield ("dynamic" if "dynamic" in kind else kind), entry


def _type_names(stated: Any) -> list[str]:
    """A module's `rope_type`: a name, or one per kind of layer."""
    return [stated] if isinstance(stated, str) else list(stated.values()) if isinstance(stated, dict) else []
