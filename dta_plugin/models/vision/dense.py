"""What the unmodified model's forward is given for a row with images, beside its token ids."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from dta_plugin.models.vision.units import ImageInputs, image_token_id

# What forwards call the kind of each token: 1 for placeholders of images.
_KINDS = ("mm_token_type_ids", "token_type_ids")


def dense_inputs(
    model: PreTrainedModel, ids: Sequence[torch.Tensor], rows: Sequence[ImageInputs | None], padding: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Per row, keyword arguments of the model's forward.

    ids: int64 [len] per row. rows: its images as they were given; those that are missing at the end have none. padding:
    so many masked tokens in front of each.
    """
    taken = inspect.signature(type(model).forward).parameters
    kinds = [name for name in _KINDS if name in taken]
    token_id = image_token_id(model)
    assert token_id is not None
    found: list[dict[str, torch.Tensor]] = []
    for row, images in zip(ids, [*rows, *[None] * (len(ids) - len(rows))], strict=True):
        if images is None:
            found.append({})
            continue
        is_image = torch.nn.functional.pad(row.eq(token_id).long(), (padding, 0))[None]
        inputs = {name: value.to(row.device) for name, value in images.items()}
        found.append(inputs | dict.fromkeys(kinds, is_image))
    return found
