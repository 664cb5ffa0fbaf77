"""Which images belong to which row of TRL's batches: what its processor returned, as one entry per row.

TRL keeps these values flattened over its rows, by patch, tile or image, and beside them how many images, and tiles,
each row has. Which it is depends on the family's values, as in TRL's own log-prob hook. What is not known to belong to
a row is named and never passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from transformers import PreTrainedModel

from dta_plugin.errors import InvalidInputError
from dta_plugin.models.vision.units import ImageInputs, image_token_id

# What the model's processor returned for the images of one row; None: the row has none.
RowImages = ImageInputs | None

# Values of images, of those TRL hands to its hook.
VALUES = (
    "pixel_values",
    "image_grid_thw",
    "image_position_ids",
    "image_sizes",
    "pixel_attention_mask",
    "spatial_shapes",
)
# How many of them each row has, lists of integers.
COUNTS = ("num_images", "num_tiles")
# [B, P + C]: what every token is a part of, 0 for text.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


def layout_obstacle(inputs: Mapping[str, Any]) -> str | None:
    """Why it is not known which images belong to which row of a batch; None where it is, or there are no images."""
    found = [name for name in VALUES if inputs.get(name) is not None]
    if not found:
        return None
    if "pixel_values" not in found:
        return f"{found[0]} without pixel_values"
    needed = COUNTS if "spatial_shapes" in found else COUNTS[:1]
    missing = [name for name in needed if inputs.get(name) is None]
    return f"{found[0]} without {missing[0]}" if missing else None


def input_obstacle(
    model: PreTrainedModel, inputs: Mapping[str, Any], input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> str | None:
    """Why what TRL's hook is given beside ids and masks cannot be told apart by rows; None where it can.

    model: the causal LM inside all wrappers. inputs: what the hook takes by name.
    """
    placeholder = image_token_id(model)
    given = {name: value for name, value in inputs.items() if value is not None and name != "batch_size"}
    unknown = sorted(given.keys() - {*VALUES, *COUNTS, *(TOKEN_TYPES if placeholder is not None else ())})
    if unknown:
        return f"the batch has {', '.join(unknown)}, and what belongs to which row is not known; train without"
    obstacle = layout_obstacle(given)
    if obstacle is not None:
        return f"the batch has {obstacle}, so that what belongs to which row is not known; pass both or none"
    is_real = attention_mask != 0
    is_image = (input_ids == placeholder) & is_real if "pixel_values" in given else torch.zeros_like(is_real)
    for name in TOKEN_TYPES:
        types = given.get(name)
        if types is None or (types.shape == is_image.shape and torch.equal(types * is_real, is_image.to(types.dtype))):
            continue
        return (
            f"{name} says of tokens what their ids do not. Expected 1 where a token stands for an image (id "
            f"{placeholder}), and 0 elsewhere and without images; leave it out"
        )
    return None


def entries_of_rows(inputs: Mapping[str, Any]) -> dict[str, list[int]]:
    """Per value of images, how many of its entries belong to each row; nothing where there are no images.

    Raises InvalidInputError where they do not add up.
    """
    pixels = inputs.get("pixel_values")
    if pixels is None or layout_obstacle(inputs) is not None:
        return {}
    images, tiles, grid = inputs["num_images"], inputs.get("num_tiles"), inputs.get("image_grid_thw")
    one = [1] * len(images)
    entries = {"image_grid_thw": images, "image_position_ids": images, "image_sizes": images}
    if grid is not None:
        _check("image_grid_thw", grid, images)
        patches, bounds = [0, *accumulate(grid.prod(dim=-1).tolist())], [0, *accumulate(images)]
        entries |= {"pixel_values": [patches[b] - patches[a] for a, b in pairwise(bounds)], "pixel_attention_mask": one}
    elif tiles is not None and inputs.get("image_position_ids") is None:
        entries |= dict.fromkeys(("pixel_values", "pixel_attention_mask", "spatial_shapes"), tiles)
    else:  # an entry per image, or rows padded to as many images each, with a mask
        is_padded = inputs.get("pixel_attention_mask") is not None or len(pixels) != sum(images)
        entries |= {"pixel_values": one if is_padded else images, "pixel_attention_mask": one}
    found = {name: entries[name] for name in VALUES if inputs.get(name) is not None}
    for name, counts in found.items():
        _check(name, inputs[name], counts)
    return found


def _check(name: str, value: torch.Tensor, counts: Sequence[int]) -> None:
    if len(value) != sum(counts):
        raise InvalidInputError(
            f"{name} has {len(value)} entries for {len(counts)} rows with {list(counts)} of them. Expected as many as "
            "the rows have together; see that num_images and num_tiles are those of these rows."
        )


def row_images(inputs: Mapping[str, Any]) -> list[RowImages] | None:
    """What the model's processor returned for the images of each row; None where no row has any."""
    entries = entries_of_rows(inputs)
    if not entries:
        return None
    parts = {name: inputs[name].split(counts) for name, counts in entries.items()}
    rows: list[RowImages] = [
        {name: part[row] for name, part in parts.items()} if count else None
        for row, count in enumerate(inputs["num_images"])
    ]
    return rows if any(rows) else None


def are_the_same(one: Sequence[RowImages] | None, other: Sequence[RowImages] | None) -> bool:
    """Whether as many rows have the same images."""
    if one is None or other is None:
        return one is other
    return len(one) == len(other) and all(map(_is_the_same, one, other))


def _is_the_same(one: RowImages, other: RowImages) -> bool:
    if one is None or other is None:
        return one is other
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
