"""A row's images as units that the vision tower sees apart from each other: an image, or a tile of one.

Processors return what belongs to a row's images as a few tensors over all of them. `row_units` cuts them into units and
says how many placeholder tokens each one fills; `stacked` puts units together again as the tower takes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.models.introspection import decoder_of

# What a row's processor returned beside ids and masks, over all of its images.
ImageInputs = Mapping[str, torch.Tensor]

_PIXELS = "pixel_values"
# Images of any size, patches of all one after the other: how many patches along time, height and width.
_GRIDS = ("image_grid_thw", "image_grid_hw")
_SIZES, _PLACES, _SHAPES = "image_sizes", "image_position_ids", "spatial_shapes"
# The same, patches side by side in one strip.
_STRIPS = "target_sizes"
# Tiles beside the whole image, and how many of each image.
_TILES, _TILE_COUNTS = "pixel_values_local", "num_local_patches"
# Per row, how many images it has.
_ROW_COUNTS = "batch_num_images"
# What tells of each image which part of a larger tensor is its own: others may come together in one.
_TELLING = (_SIZES, _PLACES, _SHAPES)
# What tensors are filled with where units of different sizes come together.
_FILL = {_PLACES: -1}


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """One image, or tile. inputs: its own part of what the tower takes, by name. tokens: placeholders that it fills."""

    inputs: dict[str, torch.Tensor]
    tokens: int


def image_token_id(model: PreTrainedModel) -> int | None:
    """The placeholder's token id; None for a model without images."""
    config = model.config
    found = getattr(config, "image_token_id", None)
    return getattr(config, "image_token_index", None) if found is None else found


def indicator_ids(model: PreTrainedModel) -> list[int]:
    """Ids of tokens around images that become features as well, beside images only: of each, after those of images."""
    return list(getattr(model.config, "visual_indicator_token_ids", None) or [])


def input_names(model: PreTrainedModel) -> list[str]:
    """What the tower takes for images."""
    features: Any = getattr(decoder_of(model), "get_image_features", None)
    names = () if features is None else inspect.signature(features).parameters
    return [name for name in names if name not in ("self", "kwargs", "return_dict")]


def runs_of(is_image: np.ndarray) -> list[int]:
    """How many placeholders stand side by side, run by run. is_image: bool [len]."""
    edges = np.flatnonzero(np.diff(is_image.astype(np.int8), prepend=0, append=0))
    return np.diff(edges)[::2].tolist()


def row_units(model: PreTrainedModel, inputs: ImageInputs, runs: Sequence[int]) -> list[Unit]:
    """The units of one row, in the order of their placeholders. runs: of placeholders in the row, see `runs_of`.

    Raises:
        InvalidInputError: inputs that do not fit each other, or the row.
        UnsupportedError: inputs that do not belong to images, such as videos.
    """
    _check_names(model, inputs)
    _check_values(inputs)
    cut = _cut(model, inputs)
    tokens = _tokens(model, cut, list(runs))
    if tokens is None:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
        raise InvalidInputError(
            f"A row has {sum(runs)} image tokens (id {image_token_id(model)}), {list(runs)} side by side, and its "
            f"images ({shapes}) fill others. Expected as many: pass what the model's own processor returned for this "
            "row, its images in order, and do not cut rows within an image."
        )
    return [Unit(own, count) for own, count in zip(cut, tokens, strict=True)]


def stacked(units: Sequence[Unit]) -> dict[str, torch.Tensor]:
    """Tensors over all of these units, as the tower takes them.

    Raises UnsupportedError for sizes that the tower does not take in one call.
    """
    names = dict.fromkeys(name for unit in units for name in unit.inputs)
    joined = {}
    for name in names:
        values = [unit.inputs[name] for unit in units if name in unit.inputs]
        if name == _PIXELS and _STRIPS in names:
            joined[name] = torch.cat(values, dim=-1)
        elif len({value.shape[1:] for value in values}) == 1:
            joined[name] = torch.cat(values)
        elif names.keys().isdisjoint(_TELLING):
            shapes = sorted({tuple(value.shape[1:]) for value in values})
            raise UnsupportedError(
                f"Images of different sizes come together, {name} of {shapes} each, and nothing tells the vision tower "
                "of each what is filled up. Expected images of one size in a batch."
            )
        else:
            joined[name] = _filled(name, values)
    return {name: value for name, value in joined.items() if len(value)}


def _check_names(model: PreTrainedModel, inputs: ImageInputs) -> None:
    known = input_names(model)
    unknown = sorted(set(inputs) - set(known))
    if unknown:
        raise UnsupportedError(
            f"A row has {', '.join(unknown)}. Expected for {type(model).__name__} only what makes features of images "
            f"({', '.join(known)}): videos and sound are not supported on trees; leave out what belongs to text."
        )
    if _PIXELS not in inputs:
        raise InvalidInputError(f"A row's images have {', '.join(inputs) or 'nothing'}. Expected {_PIXELS} among them.")
    if _ROW_COUNTS in inputs and inputs[_ROW_COUNTS].max() > 1:
        raise UnsupportedError(
            f"A row has {inputs[_ROW_COUNTS].max()} images ({_ROW_COUNTS}), which {type(model).__name__} sees "
            "otherwise than each alone. Expected one image in a row."
        )


def _check_values(inputs: ImageInputs) -> None:
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            raise InvalidInputError(
                f"{name} of a row's images is a {type(value).__name__}. Expected a tensor over all of the row's "
                "images; pass what the model's own processor returned with return_tensors='pt'."
            )
        if value.ndim == 0 or len(value) == 0:
            raise InvalidInputError(
                f"{name} of a row's images is {tuple(value.shape)}. Expected an entry or more along the first "
                "dimension; pass None for a row without images."
            )
        if value.requires_grad:
            raise InvalidInputError(
                f"{name} of a row's images requires a gradient, and rows with the same image share one copy of it. "
                f"Expected inputs that do not; pass {name}.detach()."
            )
    grids = inputs.get(_GRIDS[0])
    if grids is not None and (grids.ndim != 2 or grids.shape[1] != 3):
        raise InvalidInputError(
            f"{_GRIDS[0]} of a row's images is {tuple(grids.shape)}. Expected [images, 3]: time, height and width."
        )


def _cut(model: PreTrainedModel, inputs: ImageInputs) -> list[dict[str, torch.Tensor]]:
    """Per unit, its part of every input."""
    inputs = _image_by_image(model, {name: value for name, value in inputs.items() if name != _ROW_COUNTS})
    grid = next((name for name in _GRIDS if name in inputs), None)
    count = len(inputs[grid or (_STRIPS if _STRIPS in inputs else _PIXELS)])
    parts = {}
    for name, value in inputs.items():
        sizes, dim = [1] * count, 0
        if name == _PIXELS and grid is not None:
            sizes = inputs[grid].prod(dim=-1).tolist()
        elif name == _PIXELS and _STRIPS in inputs:
            sizes, dim = (inputs[_STRIPS].prod(dim=-1) * value.shape[-2]).tolist(), -1
        elif name == _TILES:
            sizes = inputs[_TILE_COUNTS].tolist()
        if sum(sizes) != value.shape[dim]:
            raise InvalidInputError(
                f"{name} of a row's images has {value.shape[dim]} entries. Expected {sum(sizes)}, as {count} images "
                f"have by {', '.join(each for each in inputs if each != name) or 'themselves'}."
            )
        parts[name] = value.split(sizes, dim=dim)
    return [_cropped(dict(zip(parts, own, strict=True))) for own in zip(*parts.values(), strict=True)]


def _image_by_image(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """[rows, images, ..] -> [images, 1, ..], where each image is seen alone, without those that fill up a row."""
    pixels = inputs[_PIXELS]
    if pixels.ndim != 5 or _SIZES in inputs:
        return inputs
    own = {name: value.flatten(0, 1)[:, None] for name, value in inputs.items()}
    if "pixel_attention_mask" not in input_names(model):
        return own
    is_real = own[_PIXELS].flatten(1).any(dim=1)
    return {name: value[is_real] for name, value in own.items()}


def _cropped(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what pads an image to the size of others in its row."""
    if _SIZES not in own or own[_PIXELS].ndim != 4:
        return own
    height, width = own[_SIZES][0].tolist()
    return own | {_PIXELS: own[_PIXELS][..., :height, :width]}


def _tokens(model: PreTrainedModel, cut: list[dict[str, torch.Tensor]], runs: list[int]) -> list[int] | None:
    """How many placeholders each unit fills: as sizes say, or one run each, or all alike. None if nothing fits.

    The features of each are counted again when the tower has made them.
    """
    alike = [sum(runs) // len(cut)] * len(cut)
    ways = (_stated_tokens(model, cut), runs, alike)
    return next((way for way in ways if way and len(way) == len(cut) and sum(way) == sum(runs)), None)


def _stated_tokens(model: PreTrainedModel, cut: list[dict[str, torch.Tensor]]) -> list[int] | None:
    """As sizes and the config of most families have it."""
    vision: Any = getattr(model.config, "vision_config", None)
    if _GRIDS[0] in cut[0]:
        merged = getattr(vision, "spatial_merge_size", 1) ** 2
        return [int(own[_GRIDS[0]].prod()) // merged for own in cut]
    if _PLACES in cut[0]:
        pooled = getattr(vision, "pooling_kernel_size", 1) ** 2
        return [int((own[_PLACES] != -1).all(dim=-1).sum()) // pooled for own in cut]
    if _SHAPES in cut[0]:
        side = getattr(model.config, "downsample_factor", 1)
        return [int((own[_SHAPES] // side).prod()) for own in cut]
    patch = getattr(vision, "patch_size", None)
    if _SIZES in cut[0] and cut[0][_PIXELS].ndim == 4 and isinstance(patch, int):
        side = patch * getattr(model.config, "spatial_merge_size", 1)
        return [int((own[_SIZES] // side).prod()) for own in cut]
    return None


def _filled(name: str, values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Along the first dimension; others are filled up to the largest."""
    most = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    filled = []
    for value in values:
        missing = [large - own for large, own in zip(most, value.shape[1:], strict=True)]
        pad = [amount for size in reversed(missing) for amount in (0, size)]
        filled.append(torch.nn.functional.pad(value, pad, value=_FILL.get(name, 0)) if any(missing) else value)
    return torch.cat(filled)
