"""The images of verl's rows as the core takes them, and whether verl's positions are the model's own for them.

verl hands on, per row, a dict of what the model's processor returned beside ids and masks, with an entry of its own;
that of a row of text is empty. What is said already is left out; whatever else a tower does not take, such as videos
and sound, is for the core to refuse by name.
"""

from __future__ import annotations

import numpy as np
from tensordict import NonTensorData, TensorDict

from dta_plugin.models.vision.batch_images import BatchImages
from dta_plugin.models.vision.units import ImageInputs

# What ids say: which tokens stand for images. What grids say: patches of every image (verl's own).
_SAID_ALREADY = {"mm_token_type_ids", "token_type_ids", "images_seqlens"}


def row_images(data: TensorDict) -> list[ImageInputs | None] | None:
    """Per row what the processor returned for its images, None for text; None where no row has any.

    Entries are TensorDict-like, whose truth value is an error.
    """
    rows: list[ImageInputs | None] = []
    for found in data.get("multi_modal_inputs", []):
        inputs = found.data if isinstance(found, NonTensorData) else found
        items = [] if inputs is None else inputs.items()
        rows.append({name: value for name, value in items if value is not None and name not in _SAID_ALREADY} or None)
    return None if all(row is None for row in rows) else rows


def position_obstacle(data: TensorDict, images: BatchImages | None) -> str | None:
    """Why verl's positions are not those that a tree has: depth, and for images what the model's own function gives.

    images: of the tokens that run, which are a beginning of each row. Multimodal models have several rows of positions
    [R, N], the last three of which are the rotary embedding's.
    """
    values, offsets = data["position_ids"].values(), data["input_ids"].offsets().cpu().numpy()
    rows = np.split(values.cpu().numpy().reshape(-1, offsets[-1]), offsets[1:-1], axis=1)
    own = [None] * len(rows) if images is None or images.positions is None else images.positions
    for index, (row, expected) in enumerate(zip(rows, own, strict=True)):
        depth = np.arange(row.shape[1])
        if expected is None or (expected == depth[: expected.shape[1]]).all():
            if (row == depth).all():
                continue
            what = "position ids" if len(row) == 1 else "position ids (multimodal, several rows of them)"
            return (
                f"{what} of row {index} are not 0, 1, 2, ..., a token's depth in the tree; use positions as verl sets "
                "them for text"
            )
        end = expected.shape[1]
        if not ((row[:-3, :end] == depth[:end]).all() and (row[-3:, :end] == expected).all()):
            return (
                f"position ids of row {index}, which has images, are not what the model's get_rope_index gives for "
                "them; use verl's agent loop with the processor that belongs to the model"
            )
    return None
