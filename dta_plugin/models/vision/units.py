"""A row's images as units that the vision tower sees apart from each other: an image, or a tile of one.

Processors return what belongs to a row's images as a few tensors over all of them. `row_units` cuts them into units and
says how many placeholder tokens each one fills, as the model's config has it; `stacked` puts units together again as
the tower takes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from dta_plugin.errors import InvalidInputError
from dta_plugin.models.introspection import decoder_of

# What a row's processor returned beside ids and masks, over all of its images.
ImageInputs = Mapping[str, torch.Tensor]

_PIXELS, _GRID = "pixel_values", "image_grid_thw"
_SIZES, _PLACES = "image_sizes", "image_position_ids"
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


def input_names(model: PreTrainedModel) -> list[str]:
    """What the tower takes for images."""
    features: Any = getattr(decoder_of(model), "get_image_features", None)
    names = () if features is None else inspect.signature(features).parameters
    return [name for name in names if name not in ("self", "kwargs", "return_dict")]


def row_units(model: PreTrainedModel, inputs: ImageInputs, placeholders: int) -> list[Unit]:
    """The units of one row, in the order of their placeholders. placeholders: how many the row has, in all.

    Raises InvalidInputError for inputs that do not fit each other, or the row, or that the model's tower does not take.
    """
    _check_names(model, inputs)
    _check_values(inputs)
    cut = _by_grid(inputs) if _GRID in inputs else _by_first_dimension(inputs)
    tokens = _tokens(model, cut, placeholders)
    if sum(tokens) != placeholders:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
        raise InvalidInputError(
            f"A row has {placeholders} image tokens (id {image_token_id(model)}), and its images ({shapes}) fill "
            f"{sum(tokens)}. Expected as many: pass what the model's own processor returned for this row, its images "
            "in order, and do not cut rows within an image."
        )
    return [Unit(own, count) for own, count in zip(cut, tokens, strict=True)]


def stacked(units: Sequence[Unit]) -> dict[str, torch.Tensor]:
    """Tensors over all of these units, as the tower takes them."""
    return {name: _joined(name, [unit.inputs[name] for unit in units]) for name in units[0].inputs}


def _check_names(model: PreTrainedModel, inputs: ImageInputs) -> None:
    known = input_names(model)
    unknown = sorted(set(inputs) - set(known))
    if unknown:
        raise InvalidInputError(
            f"A row has {', '.join(unknown)}. Expected for {type(model).__name__} only what makes features of images "
            f"({', '.join(known)}): videos and sound are not supported on trees; leave out what belongs to text."
        )
    if _PIXELS not in inputs:
        raise InvalidInputError(f"A row's images have {', '.join(inputs) or 'nothing'}. Expected {_PIXELS} among them.")


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
    if _GRID in inputs and (inputs[_GRID].ndim != 2 or inputs[_GRID].shape[1] != 3):
        raise InvalidInputError(
            f"{_GRID} of a row's images is {tuple(inputs[_GRID].shape)}. Expected [images, 3]: time, height and width."
        )


def _by_grid(inputs: ImageInputs) -> list[dict[str, torch.Tensor]]:
    """Pixels are patches of all images, one after the other; grids say how many of each."""
    grids = inputs[_GRID]
    patches = grids.prod(dim=-1).tolist()
    if sum(patches) != len(inputs[_PIXELS]):
        raise InvalidInputError(
            f"{_PIXELS} has {len(inputs[_PIXELS])} patches, and {_GRID} says {sum(patches)}. Expected as many."
        )
    pixels = inputs[_PIXELS].split(patches)
    return [{_PIXELS: own, _GRID: grid[None]} for own, grid in zip(pixels, grids, strict=True)]


def _by_first_dimension(inputs: ImageInputs) -> list[dict[str, torch.Tensor]]:
    counts = {name: len(value) for name, value in inputs.items()}
    if len(set(counts.values())) > 1:
        raise InvalidInputError(f"A row's images have {counts} entries. Expected as many of each.")
    cut = [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(counts[_PIXELS])]
    return [_cropped(own) for own in cut]


def _cropped(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what pads an image to the size of others in its row."""
    if _SIZES not in own or own[_PIXELS].ndim != 4:
        return own
    height, width = own[_SIZES][0].tolist()
    return own | {_PIXELS: own[_PIXELS][..., :height, :width]}


def _tokens(model: PreTrainedModel, cut: list[dict[str, torch.Tensor]], placeholders: int) -> list[int]:
    """How many placeholders each unit fills."""
    vision: Any = getattr(model.config, "vision_config", None)
    if _GRID in cut[0]:
        merged = getattr(vision, "spatial_merge_size", 1) ** 2
        return [int(own[_GRID].prod()) // merged for own in cut]
    if len(cut) == 1:
        return [placeholders]
    if _PLACES in cut[0]:
        pooled = getattr(vision, "pooling_kernel_size", 1) ** 2
        return [int((own[_PLACES] != -1).all(dim=-1).sum()) // pooled for own in cut]
    sizes = {tuple(own[_SIZES][0].tolist()) for own in cut} if _SIZES in cut[0] else set()
    if len(sizes) > 1:
        side = vision.patch_size * getattr(model.config, "spatial_merge_size", 1)
        return [int((own[_SIZES][0] // side).prod()) for own in cut]
    return [placeholders // len(cut)] * len(cut)


def _joined(name: str, values: list[torch.Tensor]) -> torch.Tensor:
    """Along the first dimension; others are filled up to the largest."""
    most = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    filled = []
    for value in values:
        missing = [large - own for large, own in zip(most, value.shape[1:], strict=True)]
        pad = [amount for size in reversed(missing) for amount in (0, size)]
        filled.append(torch.nn.functional.pad(value, pad, value=_FILL.get(name, 0)) if any(missing) else value)
    return torch.cat(filled)
