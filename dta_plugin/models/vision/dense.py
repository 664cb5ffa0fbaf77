"""What the unmodified model's forward is given for a row with images, beside its token ids."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from dta_plugin.errors import InvalidInputError
from dta_plugin.models.vision.units import ImageInputs, image_token_id

# What forwards call the kind of each token: 1 for placeholders of images.
_KINDS = ("mm_token_type_ids", "token_type_ids")


def dense_inputs(
    model: PreTrainedModel, ids: Sequence[torch.Tensor], rows: Sequence[ImageInputs | None], padding: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Per row, keyword arguments of the model's forward.

    ids: int64 [len] per row. rows: its images as they were given, or None. padding: so many masked tokens in front of
    each. Raises InvalidInputError for what the model's forward does not name, and might pass over.
    """
    taken = inspect.signature(type(model).forward).parameters
    token_id = image_token_id(model)
    kinds = [name for name in _KINDS if name in taken]
    found: list[dict[str, torch.Tensor]] = []
    for row, images in zip(ids, rows, strict=True):
        inputs = {} if images is None else {name: value.to(row.device) for name, value in images.items()}
        unknown = sorted(set(inputs) - set(taken))
        if unknown:
            raise InvalidInputError(
                f"A row has {', '.join(unknown)}, which {type(model).__name__} does not take. Expected a "
                "vision-language model for rows with images; load it with AutoModelForImageTextToText."
            )
        if inputs and token_id is not None:
            is_image = torch.nn.functional.pad(row.eq(token_id).long(), (padding, 0))[None]
            inputs |= dict.fromkeys(kinds, is_image)
        found.append(inputs)
    return found
