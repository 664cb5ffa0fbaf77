"""Rows with images as processors return them: a row is a list of parts, token ids and numbers of images.

Images are random pixels. Each form is that of some towers: what their processors return for one image, and with which
tokens it is in the row. Images of other numbers have other pixels, and other sizes where the form has sizes; 0 and 4
have one size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from transformers import PreTrainedModel

IMAGE = 90
# Tokens around images: as config names them, and others.
START, END, ROW_END = 92, 93, 94
INDICATORS = (81, 82)
Part: TypeAlias = list[int] | int  # token ids, or the number of an image
Inputs: TypeAlias = dict[str, torch.Tensor]
Pixels: TypeAlias = Callable[..., torch.Tensor]

# By number, in patches of 2 x 2 pixels: height and width.
_SIZES = [(4, 4), (4, 8), (8, 4), (4, 6)]
# The same in pixels, for towers that see tiles of 16 x 16 and the whole; and what is left of the tiles, in patches.
_TILED = [((16, 32), 2, (2, 4)), ((32, 16), 2, (4, 2)), ((32, 32), 4, (4, 4)), ((20, 32), 4, (2, 4))]


@dataclass(frozen=True, slots=True)
class Rows:
    """sequences: token ids. images: per sequence, what a processor would return for its images, or None."""

    sequences: list[list[int]]
    images: list[Inputs | None]

    def dense_inputs(self, model: PreTrainedModel) -> list[Inputs]:
        """Per row, what the model's own forward gets beside ids, its kinds of tokens included."""
        taken = inspect.signature(type(model).forward).parameters
        found: list[Inputs] = []
        for ids, images in zip(self.sequences, self.images, strict=True):
            row = torch.tensor([ids])
            seen = row.eq(IMAGE)
            kinds = {"moe_mm_token_type_ids": (seen | row.eq(START) | row.eq(END)).long()}
            if images is not None:
                kinds |= dict.fromkeys(("mm_token_type_ids", "token_type_ids"), seen.long())
                kinds["attention_mask"] = torch.ones_like(row)
            found.append({name: value for name, value in kinds.items() if name in taken} | (images or {}))
        return found


def rows_in(form: str, parts: Sequence[Sequence[Part]], dtype: torch.dtype) -> Rows:
    """Sequences of token ids and images."""
    sequences, images = [], []
    for row in parts:
        ids: list[int] = []
        found: list[Inputs] = []
        for part in row:
            if isinstance(part, int):
                tokens, inputs = _image(form, part, dtype)
                ids += tokens
                found.append(inputs)
            else:
                ids += part
        sequences.append(ids)
        images.append(over_images(found) if found else None)
    return Rows(sequences, images)


def over_images(found: list[Inputs]) -> Inputs:
    """As a processor returns them: padded to the largest where images have sizes of their own."""
    joined = {}
    for name in dict.fromkeys(name for inputs in found for name in inputs):
        values = [inputs[name] for inputs in found if name in inputs]
        dim = 0
        if name == "batch_num_images":
            values = [torch.stack(values).sum(dim=0)]
        elif name == "pixel_values" and "target_sizes" in found[0]:
            dim = -1
        elif found[0]["pixel_values"].ndim == 5 and "image_sizes" not in found[0]:
            dim = 1
        elif name == "pixel_values" and values[0].ndim > 3:
            values = _padded(values)
        joined[name] = torch.cat(values, dim=dim)
    return joined


def _padded(values: list[torch.Tensor]) -> list[torch.Tensor]:
    most = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    missing = [[large - own for large, own in zip(most, value.shape[1:], strict=True)] for value in values]
    pads = [[amount for size in reversed(sizes) for amount in (0, size)] for sizes in missing]
    return [torch.nn.functional.pad(value, pad) for value, pad in zip(values, pads, strict=True)]


def _image(form: str, number: int, dtype: torch.dtype) -> tuple[list[int], Inputs]:
    generator = torch.Generator().manual_seed(1000 + number)

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    name, _, count = form.partition(" ")
    return FORMS[name](number, pixels, int(count or 0))


def _wrapped(tokens: int) -> list[int]:
    return [START, *[IMAGE] * tokens, END]


def _in_rows(height: int, width: int) -> list[int]:
    return [token for _ in range(height) for token in [*[IMAGE] * width, ROW_END]]


def _grid(number: int, pixels: Pixels, channels: int) -> tuple[list[int], Inputs]:
    """Patches of `channels` numbers, two by two of which make a token."""
    height, width = _SIZES[number % 4]
    return _wrapped(height * width // 4), {
        "pixel_values": pixels(height * width, channels),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


def _grid_without_time(number: int, pixels: Pixels, channels: int) -> tuple[list[int], Inputs]:
    tokens, inputs = _grid(number, pixels, channels)
    return tokens, {"pixel_values": inputs["pixel_values"], "image_grid_hw": inputs["image_grid_thw"][:, 1:]}


def _square_grid(number: int, pixels: Pixels, channels: int) -> tuple[list[int], Inputs]:
    """The same, patches of three channels with height and width."""
    tokens, inputs = _grid(number, pixels, channels)
    return tokens, inputs | {"pixel_values": inputs["pixel_values"].unflatten(1, (3, 2, 2))}


def _merge_sizes(number: int, pixels: Pixels, channels: int) -> tuple[list[int], Inputs]:
    tokens, inputs = _grid(number, pixels, channels)
    return tokens, inputs | {"image_merge_sizes": torch.tensor([2])}


def _newlines(number: int, pixels: Pixels, more: int) -> tuple[list[int], Inputs]:
    """A grid with a feature at the end of each row, and `more`."""
    height, width = _SIZES[number % 4]
    return _wrapped(height // 2 * (width // 2 + 1) + more), _grid(number, pixels, 12)[1]


def _square(_: int, pixels: Pixels, tokens: int) -> tuple[list[int], Inputs]:
    return [ROW_END, *[IMAGE] * (tokens or 4), 95], {"pixel_values": pixels(1, 3, 16, 16)}


def _large_square(_: int, pixels: Pixels, tokens: int) -> tuple[list[int], Inputs]:
    return [ROW_END, *[IMAGE] * tokens, 95], {"pixel_values": pixels(1, 3, 32, 32)}


def _two_resolutions(_: int, pixels: Pixels, tokens: int) -> tuple[list[int], Inputs]:
    ids, inputs = _square(_, pixels, tokens)
    return ids, inputs | {"high_res_pixel_values": pixels(1, 3, 64, 64)}


def _indicated(_: int, pixels: Pixels, tokens: int) -> tuple[list[int], Inputs]:
    """Between tokens that become features as well."""
    first, last = INDICATORS
    return [first, *[IMAGE] * tokens, last], {"pixel_values": pixels(1, 3, 16, 16)}


def _sizes(number: int, pixels: Pixels, _: int) -> tuple[list[int], Inputs]:
    height, width = _SIZES[number % 4]
    return _in_rows(height // 2, width // 2), {
        "pixel_values": pixels(1, 3, 2 * height, 2 * width),
        "image_sizes": torch.tensor([[2 * height, 2 * width]]),
    }


def _codes(number: int, pixels: Pixels, _: int) -> tuple[list[int], Inputs]:
    """Two by two pixels make a token."""
    height, width = _SIZES[number % 4]
    return _wrapped(height * width // 4), {
        "pixel_values": pixels(1, 3, height, width),
        "image_sizes": torch.tensor([[height, width]]),
    }


def _places(number: int, pixels: Pixels, _: int) -> tuple[list[int], Inputs]:
    """Patches filled up to 32, with the place of each."""
    height, width = _SIZES[number % 4]
    places, values = torch.full((1, 32, 2), -1), pixels(1, 32, 12).abs().clamp(max=1)
    places[0, : height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)
    values[0, height * width :] = 0
    return [ROW_END, *[IMAGE] * (height * width // 4), 95], {"pixel_values": values, "image_position_ids": places}


def _shapes(number: int, pixels: Pixels, _: int) -> tuple[list[int], Inputs]:
    """Patches filled up to 32, with a mask."""
    height, width = _SIZES[number % 4]
    is_patch = torch.arange(32) < height * width
    return _wrapped(height * width // 4), {
        "pixel_values": pixels(1, 32, 12) * is_patch[None, :, None],
        "spatial_shapes": torch.tensor([[height, width]]),
        "pixel_attention_mask": is_patch[None].long(),
    }


def _strips(number: int, pixels: Pixels, times: int) -> tuple[list[int], Inputs]:
    """Patches side by side; two by two are merged, so many times."""
    height, width = [(4, 4), (4, 8), (8, 4), (4, 12)][number % 4]
    return _wrapped(height * width // 4**times), {
        "pixel_values": pixels(1, 3, 2, height * width * 2),
        "target_sizes": torch.tensor([[height, width]]),
    }


def _any_resolution(number: int, pixels: Pixels, _: int) -> tuple[list[int], Inputs]:
    """The whole and tiles, of 2 x 2 patches each; each row of patches over all tiles has an end of its own."""
    size, tiles, (height, width) = _TILED[number % 4]
    return [ROW_END, *[IMAGE] * (4 + height * (width + 1)), 95], {
        "pixel_values": pixels(1, 1 + tiles, 3, 16, 16),
        "image_sizes": torch.tensor([size]),
    }


def _any_resolution_alone(number: int, pixels: Pixels, _: int) -> tuple[list[int], Inputs]:
    """In tiles only where a row has no other image."""
    ids, inputs = _any_resolution(number, pixels, 0)
    return ids, inputs | {"batch_num_images": torch.tensor([1])}


def _tiles_beside(number: int, pixels: Pixels, tokens: int) -> tuple[list[int], Inputs]:
    """The whole, and 0 to 2 tiles in a tensor of their own. tokens: of the whole. A tile has as many, or one."""
    tiles = number % 3
    side, per_tile, more = (16, 1, 0) if tokens == 4 else (32, tokens, 1)
    inputs = {"pixel_values": pixels(1, 3, 32, 32), "num_local_patches": torch.tensor([tiles])}
    inputs |= {"pixel_values_local": pixels(tiles, 3, side, side)} if tiles else {}
    return [ROW_END, *[IMAGE] * (tokens + tiles * per_tile + more), 95], inputs


def _in_a_row(_: int, pixels: Pixels, tokens: int) -> tuple[list[int], Inputs]:
    """[rows, images, ..] and a mask of pixels."""
    return [ROW_END, *[IMAGE] * tokens, 95], {
        "pixel_values": pixels(1, 1, 3, 16, 16),
        "pixel_attention_mask": torch.ones(1, 1, 16, 16, dtype=torch.long),
    }


def _tiles_in_a_row(_: int, pixels: Pixels, tokens: int) -> tuple[list[int], Inputs]:
    """[rows, tiles, ..] and a mask of tiles."""
    ids, inputs = _in_a_row(_, pixels, tokens)
    return ids, inputs | {"pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}


def _patches(_: int, pixels: Pixels, __: int) -> tuple[list[int], Inputs]:
    return _in_rows(2, 2), {"pixel_values": pixels(1, 4, 48)}


FORMS: dict[str, Callable[[int, Pixels, int], tuple[list[int], Inputs]]] = {
    "grid": _grid,
    "grid-without-time": _grid_without_time,
    "square-grid": _square_grid,
    "merge-sizes": _merge_sizes,
    "newlines": _newlines,
    "square": _square,
    "large-square": _large_square,
    "two-resolutions": _two_resolutions,
    "indicated": _indicated,
    "sizes": _sizes,
    "codes": _codes,
    "places": _places,
    "shapes": _shapes,
    "strips": _strips,
    "any-resolution": _any_resolution,
    "any-resolution-alone": _any_resolution_alone,
    "tiles-beside": _tiles_beside,
    "in-a-row": _in_a_row,
    "tiles-in-a-row": _tiles_in_a_row,
    "patches": _patches,
}
