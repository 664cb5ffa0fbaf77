"""Images of a padded batch, whatever trainer made it: which row each belongs to, and the call with them as a tree.

A decoder's own forward runs on. It is given embeddings in which features of images are in place already, so it does not
ask for the images; what its language model needs besides comes by a hook in front of that (deepstack).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from dta_plugin.errors import InvalidInputError
from dta_plugin.models.vision.batch_images import TreeImages
from dta_plugin.models.vision.dense import EXPERT_KINDS
from dta_plugin.models.vision.forward import embedded_inputs, image_features
from dta_plugin.models.vision.support import text_model_of
from dta_plugin.models.vision.units import ImageInputs, image_token_id, input_names, row_units, runs_of, stacked

# What says of every token whether it stands for an image, which its id does, too.
TOKEN_KINDS = {"mm_token_type_ids", "token_type_ids", EXPERT_KINDS}
_FOR_TEXT = "dta_for_text"


def image_arguments(decoder: PreTrainedModel, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What a call of the decoder has for its images."""
    names = input_names(decoder)
    return {name: value for name, value in arguments.items() if name in names and isinstance(value, torch.Tensor)}


def known_kinds(decoder: PreTrainedModel, arguments: Mapping[str, Any], has_images: bool) -> set[str]:
    """Which of a call's kinds of tokens say no more than ids do: 1 for placeholders of images, 0 for all others.

    has_images: else placeholders are tokens like others.
    """
    token_id, ids, mask = image_token_id(decoder), arguments.get("input_ids"), arguments.get("attention_mask")
    if token_id is None or not isinstance(ids, torch.Tensor):
        return set()
    expected = ids.eq(token_id) if has_images else torch.zeros_like(ids, dtype=torch.bool)
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        expected = expected & mask.bool()
    else:
        mask = torch.ones_like(ids)
    given = {name: arguments[name] for name in TOKEN_KINDS if isinstance(arguments.get(name), torch.Tensor)}
    return {
        name
        for name, kinds in given.items()
        if kinds.shape == ids.shape and torch.equal(kinds * mask, expected.to(kinds.dtype))
    }


def images_of_rows(
    decoder: PreTrainedModel, inputs: ImageInputs, rows: Sequence[np.ndarray]
) -> list[ImageInputs | None]:
    """Per row, its own part of a batch's images, which are in the order of the rows.

    rows: token ids without padding. Raises InvalidInputError where images end within a row.
    """
    token_id = image_token_id(decoder)
    runs = [runs_of(row == token_id) for row in rows]
    counts = [sum(own) for own in runs]
    units = iter(row_units(decoder, inputs, [run for own in runs for run in own]))
    found: list[ImageInputs | None] = []
    for index, count in enumerate(counts):
        own, filled = [], 0
        while filled < count:
            own.append(next(units))
            filled += own[-1].tokens
        if filled != count:
            raise InvalidInputError(
                f"Row {index} has {count} image tokens, and its images fill {filled}. Expected as many: images in the "
                "order of the rows, none cut."
            )
        found.append(stacked(own) if own else None)
    return found


def arguments_with_images(decoder: PreTrainedModel, inputs: dict[str, Any], images: TreeImages) -> dict[str, Any]:
    """Keyword arguments of the decoder for a packed row with images. inputs: those for text, see `row_inputs`."""
    features = image_features(decoder, images.units, inputs["input_ids"].device)
    inputs = embedded_inputs(decoder, inputs, images, features)
    taken = inspect.signature(decoder.forward).parameters
    text = inspect.signature(text_model_of(decoder).forward).parameters
    for_text = {name: inputs.pop(name) for name in list(inputs) if name in text and name not in taken}
    return inputs | ({_FOR_TEXT: for_text} if for_text else {})


def hand_on(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """A hook in front of the language model: what its own arguments are that the decoder has none for."""
    if _FOR_TEXT not in kwargs:
        return None
    kwargs = dict(kwargs)
    return args, kwargs | kwargs.pop(_FOR_TEXT)
