"""What the unmodified model's forward is given for a row with images, beside its token ids."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from dta_plugin.errors import InvalidInputError
from dta_plugin.models.vision.units import ImageInputs, image_token_id, input_names

# What forwards call the kind of each token: 1 for placeholders of images.
_KINDS = ("mm_token_type_ids", "token_type_ids")
# The same for experts of images: 1 also for the tokens around them.
EXPERT_KINDS = "moe_mm_token_type_ids"
_AROUND = ("image_start_token_id", "image_end_token_id")


def dense_inputs(
    model: PreTrainedModel, ids: Sequence[torch.Tensor], rows: Sequence[ImageInputs | None], padding: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Per row, keyword arguments of the model's forward, its attention mask among them.

    ids: int64 [len] per row. rows: its images as they were given, or None. padding: so many masked tokens in front of
    each. Raises InvalidInputError for what does not belong to images, whose kinds of tokens would be others, and for
    what the model's forward does not name, and might pass over.
    """
    taken = inspect.signature(type(model).forward).parameters
    token_id, names = image_token_id(model), set(input_names(model)) & set(taken)
    found: list[dict[str, torch.Tensor]] = []
    for row, images in zip(ids, rows, strict=True):
        inputs = {} if images is None else {name: value.to(row.device) for name, value in images.items()}
        unknown = sorted(set(inputs) - names)
        if unknown:
            raise InvalidInputError(
                f"A row has {', '.join(unknown)}, which {type(model).__name__} does not take for images. "
                "Expected a vision-language model for rows with images (load it with AutoModelForImageTextToText), and "
                "images alone: run rows with videos or sound through the model itself."
            )
        kinds = {EXPERT_KINDS: expert_kinds(model, row)} if EXPERT_KINDS in taken else {}
        if inputs and token_id is not None:
            kinds |= dict.fromkeys(_KINDS, row.eq(token_id).long()) | {"attention_mask": torch.ones_like(row)}
        tokens = {
            name: torch.nn.functional.pad(value, (padding, 0))[None] for name, value in kinds.items() if name in taken
        }
        found.append(tokens | inputs)
    return found


def expert_kinds(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """int64, 1 for placeholders and the tokens around an image, as the processor has it; 0 elsewhere."""
    around = [getattr(model.config, name, None) for name in _AROUND]
    seen = [image_token_id(model), *(token for token in around if token is not None)]
    return torch.isin(ids, ids.new_tensor(seen)).long()
